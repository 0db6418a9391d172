"""The options of `infer`, `serve` and `compare`, and what they say to the library. `--seed` is of drawing tokens.

Light to import: help and errors come from here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inlay.cli import options

if TYPE_CHECKING:
    from inlay.infer.backend import Sampling, Source

BACKENDS = ("pt", "transformers", "vllm")
TASKS = ("causal_lm", "embedding", "seq_cls")
ENGINE = "--vllm_"
KWARGS = "--vllm_engine_kwargs"


def infer(parser: argparse.ArgumentParser) -> None:
    options.add_inputs(parser)
    _add_loading(parser)
    group = parser.add_argument_group("what to ask; without any of these, a conversation in the terminal")
    group.add_argument("--prompt", default=None, metavar="TEXT", help="ask this once")
    group.add_argument(
        "--val_dataset", nargs="+", action=options.Items, default=None, metavar="FILE",
        help="ask each row of these files (.jsonl, .json, .csv, .parquet)",
    )  # fmt: skip
    group.add_argument(
        "--val_dataset_sample", default=None, type=int, metavar="N", help="only N of the rows, the same for one --seed"
    )
    group.add_argument(
        "--result_path", default=None, metavar="FILE.jsonl",
        help="where the results go; a rerun continues there (<dataset>-result.jsonl)",
    )  # fmt: skip
    group.add_argument("--max_batch_size", default=1, type=int, metavar="N", help="rows that run together (1)")
    options.add_flag(group, "--strict", help="stop at a row that cannot be used, instead of leaving it out")
    group.add_argument(
        "--task_type", default="causal_lm", choices=TASKS, help="text, vectors of prompts, or scores of classes"
    )
    _add_generation(parser)
    options.add_printing(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    options.add_inputs(parser)
    _add_loading(parser)
    group = parser.add_argument_group("the endpoint")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    group.add_argument("--port", default=8000, type=int, metavar="N", help="port, 0 for any that is free (8000)")
    group.add_argument("--api_key", default=None, metavar="KEY", help="ask for this key (none; or INLAY_API_KEY)")
    group.add_argument(
        "--served_model_name",
        default=None,
        metavar="NAME",
        help="what the model is called (the last adapter, or the base)",
    )
    group.add_argument("--max_body_size", default="4MB", metavar="SIZE", help="largest request (4MB)")
    group.add_argument("--max_waiting", default=64, type=int, metavar="N", help="requests that may wait in line (64)")
    group.add_argument("--system", default=None, metavar="TEXT", help="system prompt for conversations without one")
    parser.add_argument("--task_type", default="causal_lm", choices=TASKS, help=argparse.SUPPRESS)
    options.add_printing(parser)


def compare(parser: argparse.ArgumentParser) -> None:
    options.add_inputs(parser)
    parser.add_argument(
        "--merged", default=None, metavar="DIR", help="what was made, by any tool; merged now if not given"
    )
    add_devices(parser)
    add_behaviour(parser)
    options.add_printing(parser)


def add_behaviour(parser: argparse.ArgumentParser) -> None:
    """Options of the behaviour check, for `compare` and `verify --behaviour true`."""
    group = parser.add_argument_group("behaviour")
    group.add_argument(
        "--prompts", default=None, metavar="FILE", help="prompts (.jsonl, as --val_dataset; 12 of inlay's own)"
    )
    group.add_argument(
        "--new_tokens", "--max_new_tokens", default=32, type=int, metavar="N", help="tokens of each reply (32)"
    )
    group.add_argument(
        "--draws", default=3, type=int, metavar="N", help="merges rounded in other ways, to measure by (3)"
    )
    group.add_argument("--result_path", default=None, metavar="FILE.json", help="write the figures there too")
    _add_template(group)


def add_devices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--device_map", default=None, metavar="DEVICE", help="auto, cpu, cuda:0 or JSON (the first GPU, or the CPU)"
    )
    group.add_argument("--attn_impl", default=None, metavar="NAME", help="sdpa, eager, flash_attention_2 …")
    options.add_flag(group, "--trust_remote_code", help="run the model code that comes with the checkpoint")


def _add_loading(parser: argparse.ArgumentParser) -> None:
    options.add_flag(parser, "--merge_lora", help="merge the adapters while loading; nothing is written")
    add_devices(parser)
    group = parser.add_argument_group("engine")
    group.add_argument("--infer_backend", "--backend", default="pt", choices=BACKENDS, help="pt (transformers) or vllm")
    group.add_argument(
        "--max_model_len", default=None, type=int, metavar="N", help="tokens of prompt and reply together"
    )
    group.add_argument(
        KWARGS, default=None, metavar="JSON", help="vLLM's engine arguments; each also as --vllm_NAME VALUE"
    )
    group.add_argument(
        "--cache_dir", default=None, metavar="DIR",
        help="vllm: merged copies for engines that cannot merge while loading (INLAY_CACHE_DIR, or ~/.cache/inlay)",
    )  # fmt: skip
    group.add_argument("--vllm", action="append", default=[], help=argparse.SUPPRESS)  # of engine_words


COMMANDS = {"infer": infer, "serve": serve, "compare": compare}


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to answer; what is not given is the model's generation_config.json's to say")
    group.add_argument(
        "--max_new_tokens", default=None, type=int, metavar="N", help="length of a reply (512, or what fits)"
    )
    group.add_argument(
        "--temperature", default=None, type=float, metavar="T", help="0 takes the likeliest token each time"
    )
    group.add_argument("--top_p", default=None, type=float, metavar="P", help="from the likeliest tokens of this share")
    group.add_argument("--top_k", default=None, type=int, metavar="K", help="from the K likeliest tokens")
    group.add_argument("--repetition_penalty", default=None, type=float, metavar="R", help="above 1 against repetition")
    group.add_argument("--num_beams", default=1, type=int, metavar="N", help="beam search, pt only (1)")
    group.add_argument(
        "--stop_words", nargs="+", default=[], metavar="WORD", help="texts that end a reply, and are no part of it"
    )
    group.add_argument(
        "--stream", nargs="?", const=True, default=True, type=options.boolean, metavar="true|false",
        help="print as it comes (true)",
    )  # fmt: skip
    _add_template(group)
    group.add_argument("--system", default=None, metavar="TEXT", help="system prompt")


def _add_template(group: Any) -> None:
    group.add_argument(
        "--use_chat_template", nargs="?", const=True, default=None, type=options.boolean, metavar="true|false",
        help="ask through the model's chat template, or have plain text continued",
    )  # fmt: skip


def engine_words(words: Sequence[str]) -> list[str]:
    """`--vllm_NAME VALUE`, of which vLLM knows more than are listed here, as `--vllm NAME=VALUE`."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith(ENGINE) or word.partition("=")[0] == KWARGS:
            found.append(word)
            continue
        name, equals, value = word.removeprefix(ENGINE).partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        found += ["--vllm", name + equals + value]
    return found


def source(args: argparse.Namespace) -> Source:
    """What to load. Raises InputError."""
    from pathlib import Path

    from inlay.cli.sources import find_model, open_adapters
    from inlay.errors import InputError
    from inlay.infer.backend import Source
    from inlay.infer.vllm_settings import parse_settings

    adapters = open_adapters(args)
    merge = getattr(args, "merge_lora", False)
    if merge and not adapters:
        raise InputError("--merge_lora without --adapters: nothing to merge")
    flags = dict(_setting(word) for word in getattr(args, "vllm", []))
    engine = parse_settings(flags, getattr(args, "vllm_engine_kwargs", None))
    if engine and args.infer_backend != "vllm":
        raise InputError(
            f"--vllm_{next(iter(engine))} is of --infer_backend vllm; leave it out with {args.infer_backend}"
        )
    weights = options.weights(args)
    return Source(
        model=find_model(args, adapters),
        adapters=tuple(adapters),
        merge=merge,
        weights=None if weights is None else tuple(weights),
        torch_dtype=options.torch_dtype(args),
        combine_by=args.combine or "sum",
        options=options.combine_options(_without_seed(args)),
        quant=options.quant(args),
        device_map=args.device_map,
        attn_impl=args.attn_impl,
        task=getattr(args, "task_type", "causal_lm"),
        trust_remote_code=args.trust_remote_code,
        max_model_len=getattr(args, "max_model_len", None),
        engine=engine,
        cache_dir=Path(cache_dir) if (cache_dir := getattr(args, "cache_dir", None)) else None,
    )


def _without_seed(args: argparse.Namespace) -> argparse.Namespace:
    """Here `--seed` decides on tokens; on a merge only where the way to combine draws at random too."""
    draws = (args.combine or "").startswith(("dare", "della"))
    return args if draws else argparse.Namespace(**{**vars(args), "seed": None})


def _setting(word: str) -> tuple[str, str | bool]:
    name, equals, value = word.partition("=")
    return name, value if equals else True


def sampling(args: argparse.Namespace) -> Sampling:
    """How to answer. Raises InputError for a number out of range."""
    from inlay.infer.backend import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        stop_words=tuple(args.stop_words),
        seed=args.seed,
        num_beams=args.num_beams,
    )
