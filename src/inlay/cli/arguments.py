"""The arguments of each command. Light to import: help and errors come from here."""

from __future__ import annotations

import argparse

from inlay.cli import inference, options


def export(parser: argparse.ArgumentParser) -> None:
    options.add_inputs(parser)
    options.add_flag(parser, "--merge_lora", help="merge the adapters into the base")
    parser.add_argument("--output_dir", default=None, metavar="DIR", help="where to (<first adapter>-merged)")
    options.add_flag(parser, "--exist_ok", help="replace an existing result, once the new one is whole")
    parser.add_argument(
        "--verify", nargs="?", const="sample", default="sample", choices=("full", "sample", "none"),
        help="check before publishing: every element, a sample of rows and all files (default), or nothing",
    )  # fmt: skip
    options.add_codes(parser)
    parser.add_argument("--safe_serialization", type=options.boolean, default=True, help=argparse.SUPPRESS)
    options.add_resources(parser)
    options.add_printing(parser)


def plan(parser: argparse.ArgumentParser) -> None:
    options.add_inputs(parser)
    parser.add_argument("--output_dir", default=None, metavar="DIR", help="check this destination too")
    options.add_flag(parser, "--exist_ok", help="the destination may exist")
    options.add_flag(parser, "--merge_lora", help=argparse.SUPPRESS)
    options.add_codes(parser)
    options.add_resources(parser)
    options.add_printing(parser)


def verify(parser: argparse.ArgumentParser) -> None:
    options.add_inputs(parser)
    parser.add_argument("--merged", required=True, metavar="DIR", help="the directory to check, made by any tool")
    parser.add_argument(
        "--verify", default="full", choices=("full", "sample"), help="every element (default), or a sample of rows"
    )
    options.add_flag(parser, "--exact", help="fail on roundings too")
    options.add_flag(parser, "--behaviour", help="run base, base + adapters and merged on prompts too (inlay compare)")
    inference.add_devices(parser)
    inference.add_behaviour(parser)
    options.add_printing(parser)


def inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="directory or Hub id; of several adapters on --model: how they meet"
    )
    parser.add_argument(
        "--model", default=None, metavar="BASE", help="a base, to say which share of it an adapter trains"
    )
    options.add_flag(parser, "--use_modelscope", help="take ids from ModelScope")
    options.add_printing(parser)


def cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "clear"), help="list: what is there; clear: remove it")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="clear: only these, by the beginning of their keys")
    parser.add_argument(
        "--cache_dir", default=None, metavar="DIR", help="where the cache is (INLAY_CACHE_DIR, or ~/.cache/inlay)"
    )
    options.add_printing(parser)
