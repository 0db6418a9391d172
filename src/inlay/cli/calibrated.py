"""`inlay export --quant_method awq|gptq`: merge to 16 bits beside the destination, then quantise with calibration."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.cli.text import size
from inlay.errors import InputError
from inlay.extras import needs
from inlay.output.destination import check_destination
from inlay.output.staging import write_durably
from inlay.plan.request import parse_size
from inlay.plan.sidecars import BASE_CARD, CARD
from inlay.plan.types import Plan
from inlay.quantising.calibration import MAX_LENGTH, SAMPLES, Text, read_texts
from inlay.quantising.perplexity import perplexity
from inlay.quantising.quantise import Quantised, open_source, quantise
from inlay.records.manifest import MANIFEST, read_manifest

RECORD = "inlay_quant.json"
HELD_OUT = 4  # one text in so many is kept for the perplexities
SHARE_OF_MEMORY = 0.5  # of what is free, for a model in float32


def run(plan: Plan, args: argparse.Namespace, output_dir: str, merge: Callable[[Path], Any]) -> Quantised:
    """Quantise base + adapters into `output_dir`; `merge` carries out the plan into a folder.

    Raises InputError for what cannot be done, before the merge where it can be known.
    """
    destination = Path(output_dir)
    if problems := check_destination(destination, plan.roots, args.exist_ok, plan.cost.written):
        raise InputError("; ".join(f"{p.where}: {p.what}" for p in problems))
    options = _options(args)
    _check_method(args.quant_method, plan)
    texts = read_texts(None if args.dataset is None else Path(args.dataset))
    held_out = texts[::HELD_OUT] if len(texts) > 1 else []
    kept = [t for i, t in enumerate(texts) if i % HELD_OUT] if held_out else texts
    with _merged(plan, destination, merge) as source:
        figures: dict[str, float] = {}
        if held_out:
            for name, folder in {"base": plan.roots["base"], **({"merged": source} if plan.adapters else {})}.items():
                _measure(figures, name, folder, held_out, options["max_length"], args.quiet)

        def finish(folder: Path, result: Checkpoint) -> None:
            if held_out:
                _measure(figures, args.quant_method, folder, held_out, options["max_length"], args.quiet)
            record = _record(args, options, figures, source, result)
            _put_card(folder, source, args.quant_method)
            write_durably(folder / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())

        return quantise(
            source, destination, args.quant_method, texts=kept, exist_ok=args.exist_ok, finish=finish,
            progress=None if args.quiet else _progress, max_memory=parse_size(args.max_memory) * 8, **options,
        )  # fmt: skip


def _check_method(method: str, plan: Plan) -> None:
    """What can be known before the merge: that the base is in floats, and that the library is there."""
    if not plan.adapters:
        open_source(plan.roots["base"])
    if method == "gptq":
        with needs("gptq", "--quant_method gptq"):
            import gptqmodel  # noqa: F401
            import optimum  # noqa: F401


def _put_card(folder: Path, source: Path, method: str) -> None:
    """The card of the merge, if there was one, is that of the result."""
    card = folder / BASE_CARD
    if (source / MANIFEST).exists() and card.exists():
        text = card.read_text("utf-8")
        note = f"\nThe merged weights are stored in codes, chosen by {method}: see `{RECORD}`.\n"
        write_durably(folder / CARD, (text.rstrip() + "\n" + note).encode())
        card.unlink()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    if args.quant_bits is None:
        raise InputError("--quant_method awq and gptq need --quant_bits")
    if args.keep_16bit == "auto":
        raise InputError("--keep_16bit auto is for codes that are chosen without calibration; give a pattern")
    if args.keep_quant or args.scales:
        raise InputError("--keep_quant and --quant_method contradict each other; give one")
    if args.quant_config is not None:
        raise InputError(f"--quant_config has nothing to set for {args.quant_method}; leave it out")
    samples, length = args.quant_n_samples or SAMPLES, args.max_length or MAX_LENGTH
    if samples < 1 or length < 2:
        raise InputError("--quant_n_samples must be positive, and --max_length at least 2")
    return {
        "bits": args.quant_bits, "group_size": args.group_size or 128, "samples": samples, "max_length": length,
        "keep": [args.keep_16bit] if args.keep_16bit else [],
    }  # fmt: skip


@contextmanager
def _merged(plan: Plan, destination: Path, merge: Callable[[Path], Any]) -> Iterator[Path]:
    """The checkpoint to quantise: the base itself where the plan only copies it, else merged in a folder that goes."""
    if all(entry.copied for entry in plan.entries.values()):
        yield plan.roots["base"]
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.16bit-", dir=destination.parent))
    try:
        merge(folder / "merged")
        yield folder / "merged"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(
    figures: dict[str, float], name: str, folder: Path, texts: Sequence[Text], max_length: int, quiet: bool
) -> None:
    """Perplexity on texts that are not used for calibration, where the model in float32 has room."""
    base = open_checkpoint(folder)
    needed = 4 * sum(t.nbytes * 8 // t.dtype.bits for _, t in base.tensors.values() if t.dtype.mergeable)
    if needed > SHARE_OF_MEMORY * _free_memory():
        if not quiet:
            print(f"perplexity of {name}: not measured, the model in float32 takes {size(needed)}", file=sys.stderr)
        return
    figures[name] = perplexity(folder, texts, max_length)
    if not quiet:
        print(f"perplexity of {name}: {figures[name]:.4g} on {len(texts)} held-out texts", file=sys.stderr)


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _progress(done: int, all_: int) -> None:
    print(f"\rquantise: layer {done} of {all_}", end="\n" if done == all_ else "", file=sys.stderr, flush=True)


def _record(
    args: argparse.Namespace, options: Mapping[str, Any], figures: Mapping[str, float], source: Path, result: Checkpoint
) -> dict[str, Any]:
    """What the directory was made from, and how: the manifest of the merge, the method, the perplexities."""
    recipe = read_manifest(source) if (source / MANIFEST).exists() else None
    kept = {k: recipe[k] for k in ("plan", "base", "adapters", "settings") if k in recipe} if recipe else {}
    return {
        "format": 1, "method": args.quant_method, **options, "dataset": args.dataset, "headers": result.fingerprint,
        "perplexity": {k: float(f"{v:.6g}") for k, v in figures.items()}, "merged": kept,
    }  # fmt: skip
