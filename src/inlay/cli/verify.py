"""`inlay verify`: is a directory base + adapters?"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.checkpoints.decoded import quantisation
from inlay.cli import options
from inlay.cli.compare import describe as describe_behaviour
from inlay.cli.compare import measure
from inlay.cli.sources import find_model, open_adapters
from inlay.cli.text import count, plural
from inlay.errors import InputError
from inlay.verification import report as verdicts
from inlay.verification.report import Report, TensorVerdict
from inlay.verification.verify import verify

SHOWN = 6
MEANING = {
    verdicts.BASE: "the base's own",
    verdicts.EXACT: "base + adapters, every element correctly rounded",
    verdicts.ENCODED: "parts of weights in codes, each as near as its form allows",
    verdicts.ROUNDED: "base + adapters, off by roundings",
    verdicts.UNMERGED: "NOT MERGED: should be base + adapters, is the base",
    verdicts.CHANGED: "CHANGED: should be the base, is not",
    verdicts.WRONG: "WRONG: neither the base nor base + adapters",
    verdicts.MISSING: "MISSING",
    verdicts.EXTRA: "in neither base nor adapters",
}


def run(args: argparse.Namespace) -> int:
    adapters = open_adapters(args)
    model = find_model(args, adapters)
    if not adapters and not options.torch_dtype(args) and quantisation(open_checkpoint(model)) is None:
        raise InputError("give --adapters: what should be in the directory beside the base")
    report = verify(
        model,
        adapters,
        args.merged,
        weights=options.weights(args),
        torch_dtype=options.torch_dtype(args),
        combine_by=args.combine,
        options=options.combine_options(args),
        quant=options.quant(args),
        max_shard_size=args.max_shard_size,
        full=args.verify == "full",
    )
    passed = report.exact if args.exact else report.ok
    behaviour = measure(args, Path(args.merged)) if args.behaviour else None
    if args.json:
        found = {"behaviour": behaviour.to_json()} if behaviour else {}
        passed = passed and (behaviour is None or behaviour.ok)
        print(json.dumps({**report.to_json(), **found, "passed": passed}, indent=1, ensure_ascii=False))
    else:
        print(describe(report))
        print("passed" if passed else "FAILED")
        if behaviour:
            print("\n" + describe_behaviour(behaviour))
            passed = passed and behaviour.ok
    return 0 if passed else 1


def describe(report: Report) -> str:
    """The report for people: a line a verdict, the cases grouped by cause."""
    checked = sum(t.checked for t in report.tensors)
    how = "a sample of rows" if report.sampled else "every element"
    lines = [f"verified {plural(len(report.tensors), 'tensor')}, {how} ({count(checked)} elements):"]
    groups: defaultdict[str, list[TensorVerdict]] = defaultdict(list)
    for tensor in report.tensors:
        groups[tensor.verdict].append(tensor)
    for verdict, meaning in MEANING.items():
        if groups[verdict]:
            lines.append(f"  {len(groups[verdict]):>6}  {meaning}")
            lines += _cases(groups[verdict]) if verdict not in verdicts.GOOD else []
    lines += [f"  {file.file}: {file.what}" for file in report.files]
    return "\n".join(lines)


def _cases(tensors: list[TensorVerdict]) -> list[str]:
    lines = []
    by_cause: defaultdict[str, list[TensorVerdict]] = defaultdict(list)
    for tensor in tensors:
        by_cause[tensor.cause if "×" not in tensor.cause else "partly the wanted change"].append(tensor)
    for cause, found in by_cause.items():
        off, checked = sum(t.off for t in found), sum(t.checked for t in found)
        share = (
            f"{off:,} of {checked:,} elements ({off / checked:.2%}), up to {max(t.max_ulps for t in found):,} ulp"
            if off
            else ""
        )
        label = ": ".join(part for part in (cause, share) if part)
        lines += [f"          {label}"] if label else []
        lines += [f"            {_one(t)}" for t in found[:SHOWN]]
        lines += [f"            … and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return lines


def _one(tensor: TensorVerdict) -> str:
    return f"{tensor.key}  ({tensor.cause})" if "×" in tensor.cause else tensor.key
