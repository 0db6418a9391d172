"""Options as users of ms-swift type them, and their spellings.

Lists take spaces or commas, booleans a value or none, `_` and `-` are the same, older names are aliases.
Nothing here imports more than the standard library, so that help and errors are instant.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from inlay.plan.combination import Options
    from inlay.plan.quant import Quant

EXAMPLES = """examples:
  inlay export --model BASE --adapters ADAPTER --merge_lora true --output_dir OUT
  inlay export --adapters A B --adapter_weights 1.0 0.5 --merge_lora true --torch_dtype bfloat16
  inlay plan   --model BASE --adapters ADAPTER
  inlay verify --model BASE --adapters ADAPTER --merged OUT
  inlay inspect PATH
  inlay combine --adapters A B --combine ties --density 0.5 --output_dir C
"""

# Those of `inlay.tuners.combining.METHODS`, which would load numpy.
COMBINE_METHODS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
# Those of `inlay.tuners.mixing.METHODS`.
MIX_METHODS = ("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "slerp", "model_stock")


class Parser(argparse.ArgumentParser):
    """Errors name the nearest option; exit code 2."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            near = difflib.get_close_matches(unknown, self._option_string_actions, 1, 0.6)
            message = f"unknown option {unknown}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: error: {message}\nTry '{self.prog} --help'.\n")


def spelled(argv: Sequence[str]) -> list[str]:
    """Options with dashes inside, as in --max-memory, in their spelling with underscores."""
    result = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        result.append(word)
    return result


def boolean(text: str) -> bool:
    """true/false as ms-swift takes them."""
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


class Items(argparse.Action):
    """A list with spaces, commas or both, in one option or several; a path that is there keeps its comma."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        items: list[str] = []
        for value in values:
            items += [value] if os.path.exists(value) else [part for part in value.split(",") if part]
        if not items:
            parser.error(f"{option_string} is empty")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *items])


def add_flag(parser: argparse._ActionsContainer, *names: str, help: str) -> None:
    """A boolean: `--name`, `--name true`, `--name false`."""
    parser.add_argument(*names, nargs="?", const=True, default=False, type=boolean, metavar="true|false", help=help)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Options of every command that puts adapters on a base."""
    group = parser.add_argument_group("what to merge")
    group.add_argument(
        "--model",
        "--model_id_or_path",
        metavar="BASE",
        help="directory or Hub id of the base; the adapter's own if not given",
    )
    group.add_argument(
        "--adapters", "--adapter", "--ckpt_dir", nargs="+", action=Items, default=[], metavar="DIR",
        help="adapters in the order in which they are applied: folders, or the single file of an image LoRA",
    )  # fmt: skip
    group.add_argument(
        "--adapter_weights",
        nargs="+",
        action=Items,
        default=None,
        metavar="W",
        help="a factor for each adapter (1.0 each)",
    )
    group.add_argument(
        "--combine", "--combination_type", default=None, choices=("sum", "override", *COMBINE_METHODS, *MIX_METHODS),
        metavar="METHOD",
        help="several adapters: sum (default); override, where the later one wins if full copies contradict each "
        f"other; PEFT's {', '.join(COMBINE_METHODS)}; mergekit's {', '.join(MIX_METHODS)}",
    )  # fmt: skip
    _add_combine_options(group)
    group.add_argument(
        "--gamma", default=None, type=float, metavar="G",
        help="breadcrumbs: share of the largest elements to drop (0.01)",
    )  # fmt: skip
    group.add_argument(
        "--epsilon", default=None, type=float, metavar="E",
        help="della: how far the probability of keeping an element goes from the density (0.15)",
    )  # fmt: skip
    _add_base_codes(group)
    group.add_argument("--revision", "--model_revision", default=None, help="revision of a base from the Hub")
    add_flag(group, "--use_modelscope", help="take ids from ModelScope instead of the Hugging Face Hub")
    group.add_argument("--train_type", "--tuner_type", "--sft_type", default=None, help=argparse.SUPPRESS)
    dtype = parser.add_argument_group("type and layout of the result")
    dtype.add_argument(
        "--torch_dtype", "--dtype", default=None, metavar="TYPE",
        help="bfloat16, float16 or float32 for all float weights; each tensor's own if not given",
    )  # fmt: skip
    add_flag(dtype, "--fp16", help="the same as --torch_dtype float16")
    add_flag(dtype, "--bf16", help="the same as --torch_dtype bfloat16")
    dtype.add_argument(
        "--max_shard_size", default=None, metavar="SIZE", help="largest shard, e.g. 5GB; the base's layout if not given"
    )


def _add_base_codes(group: argparse._ArgumentGroup) -> None:
    """What a base is taken for, where codes come in."""
    group.add_argument(
        "--base_as", default=None, choices=("dequantised", "simulated", "original"),
        help="a base in codes is taken dequantised; a 16-bit one as it is (original), or as a quantiser would leave it "
        "(simulated), which is what a QLoRA adapter was trained against",
    )  # fmt: skip
    group.add_argument(
        "--trained_quant", default=None, metavar="FORM",
        help="how the base was quantised in training: nf4, nf4-single, fp4, fp4-single, int8 (the adapter's args.json)",
    )  # fmt: skip


def add_codes(parser: argparse.ArgumentParser) -> None:
    """Options for a result in codes."""
    group = parser.add_argument_group("result in codes")
    add_flag(group, "--keep_quant", help="keep the base's codes: what an adapter changes is encoded again")
    group.add_argument(
        "--scales",
        default=None,
        choices=("reuse", "fresh"),
        help="--keep_quant: the stored scales (reuse), or new ones",
    )
    group.add_argument(
        "--compensate",
        default=None,
        choices=("adapter",),
        help="--keep_quant: choose codes that hold each row's whole delta, not the nearest ones",
    )
    add_flag(group, "--accept_loss", help="even if the codes are too coarse for half of what the adapters add")
    group.add_argument(
        "--keep_16bit",
        default=None,
        metavar="auto|REGEX",
        help="modules that stay in 16 bits; auto: those that lose most",
    )
    group.add_argument(
        "--quant_method", default=None, metavar="METHOD",
        help="store the result in codes: bnb, fp8, int8, mxfp4, rtn (at once), awq, gptq (with calibration)",
    )  # fmt: skip
    group.add_argument("--quant_bits", default=None, type=int, metavar="N", help="bits of a code, 4 or 8")
    group.add_argument("--group_size", default=None, type=int, metavar="N", help="columns that share a scale (128)")
    group.add_argument("--quant_config", default=None, metavar="JSON", help="further options of the method")
    group.add_argument("--dataset", default=None, metavar="FILE", help="calibration texts (a small set of inlay's own)")
    group.add_argument("--quant_n_samples", default=None, type=int, metavar="N", help="calibration samples")
    group.add_argument("--max_length", default=None, type=int, metavar="N", help="tokens in a calibration sample")
    group.add_argument(
        "--survival", default="sample", choices=("sample", "full"),
        help="how much of the adapters is in the result: on a sample of rows, or on everything",
    )  # fmt: skip


def add_resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument("--max_memory", default="1GB", metavar="SIZE", help="cap on working memory, e.g. 512MB (1GB)")
    group.add_argument("--num_threads", default=None, type=int, metavar="N", help="threads (all processors)")
    group.add_argument(
        "--device_map", default="cpu", metavar="DEVICE",
        help="cpu, auto or cuda:N; the bytes are the same, and a merge is bound by the disk (cpu)",
    )  # fmt: skip


def add_printing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add_flag(group, "--json", help="print the facts as JSON")
    add_flag(group, "--quiet", help="no progress, no log")


def add_combining(parser: argparse.ArgumentParser) -> None:
    """Options of `inlay combine`."""
    group = parser.add_argument_group("what to combine")
    group.add_argument(
        "--adapters", "--adapter", "--ckpt_dir", nargs="+", action=Items, required=True, metavar="DIR",
        help="LoRA adapters of one base",
    )  # fmt: skip
    group.add_argument(
        "--adapter_weights", nargs="+", action=Items, default=None, metavar="W",
        help="a factor for each adapter, negative ones too (1.0 each)",
    )  # fmt: skip
    add_flag(group, "--use_modelscope", help="take ids from ModelScope instead of the Hugging Face Hub")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--combine", "--combination_type", default="cat", choices=COMBINE_METHODS, metavar="METHOD",
        help=f"{', '.join(COMBINE_METHODS)}; cat, the default, is the exact sum",
    )  # fmt: skip
    _add_combine_options(group)
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where to write the adapter")
    add_flag(parser, "--exist_ok", help="replace an adapter that is there, once the new one is whole")
    add_printing(parser)


def _add_combine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--density",
        default=None,
        type=float,
        metavar="D",
        help="share of elements to keep: ties, dare, magnitude_prune, breadcrumbs, della",
    )
    group.add_argument(
        "--majority_sign_method", default=None, choices=("total", "frequency"),
        help="ties: the sign of the sum (total, the default), or of most adapters",
    )  # fmt: skip
    group.add_argument(
        "--svd_rank", default=None, type=int, metavar="R", help="rank of svd and …_svd (largest of the adapters)"
    )
    group.add_argument("--seed", default=None, type=int, metavar="N", help="decides what dare and della drop (0)")


def combine_options(args: argparse.Namespace) -> Options:
    """The settings of the way to combine."""
    from inlay.plan.combination import Options

    return Options(
        args.density, args.majority_sign_method, args.svd_rank, args.seed,
        getattr(args, "gamma", None), getattr(args, "epsilon", None),
    )  # fmt: skip


def quant(args: argparse.Namespace) -> Quant:
    """What is asked of codes; without calibration, which is a step of its own."""
    import json

    from inlay.errors import InputError
    from inlay.plan.quant import CALIBRATED, Quant

    given = getattr(args, "quant_config", None)
    try:
        config = None if given is None else json.loads(given)
    except ValueError as error:
        raise InputError(f"--quant_config is not JSON: {error}") from None
    if config is not None and not isinstance(config, dict):
        raise InputError(f"--quant_config must be a JSON object, found {given}")
    method = getattr(args, "quant_method", None)
    if method in CALIBRATED:
        return Quant(args.base_as, args.trained_quant)
    keep_16bit = getattr(args, "keep_16bit", None)
    return Quant(
        args.base_as, args.trained_quant, getattr(args, "keep_quant", False), getattr(args, "scales", None),
        None if keep_16bit == "auto" else keep_16bit, method, getattr(args, "quant_bits", None),
        getattr(args, "group_size", None), config, getattr(args, "compensate", None),
    )  # fmt: skip


def torch_dtype(args: argparse.Namespace) -> str | None:
    """The type asked for by any of its three options."""
    from inlay.dtypes import BY_TORCH_NAME
    from inlay.errors import InputError

    flags = (("float16", args.fp16), ("bfloat16", args.bf16), (args.torch_dtype, args.torch_dtype != "auto"))
    asked = [name for name, there in flags if name and there]
    if len({BY_TORCH_NAME.get(name.lower().removeprefix("torch."), name) for name in asked}) > 1:
        raise InputError(f"contradicting types: {', '.join(sorted(asked))}; give one")
    return asked[0] if asked else None


def weights(args: argparse.Namespace) -> list[float] | None:
    """Adapter weights as numbers."""
    from inlay.errors import InputError

    try:
        numbers = None if args.adapter_weights is None else [float(w) for w in args.adapter_weights]
    except ValueError as error:
        raise InputError(f"--adapter_weights: {error}") from None
    if numbers is not None and not all(abs(w) < float("inf") for w in numbers):
        raise InputError("--adapter_weights must be finite numbers")
    return numbers
