"""`inlay export`: merge, verify, publish."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from inlay.cli.plan import describe_survival, plan_from
from inlay.cli.progress import Bar
from inlay.cli.text import plural, size
from inlay.cli.verify import describe as describe_report
from inlay.errors import CheckFailed, InputError
from inlay.plan.quant import CALIBRATED
from inlay.plan.types import Plan
from inlay.run.execute import run_plan
from inlay.run.survival import Survived, require_survival
from inlay.verification.report import Report
from inlay.verification.verify import verify_plan

if TYPE_CHECKING:
    from inlay.quantising.quantise import Quantised


def run(args: argparse.Namespace) -> int:
    _check_request(args)
    started = time.monotonic()
    output_dir = args.output_dir or _default_output(args.adapters[0])
    plan, survived = plan_from(args, output_dir)
    if not args.accept_loss:
        require_survival(survived)
    if not args.quiet:
        for warning in plan.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    report, made = _result(plan, survived, args, output_dir)
    seconds = time.monotonic() - started
    nbytes = plan.cost.written if made is None else made.nbytes
    if args.json:
        facts = {
            "output_dir": output_dir,
            "plan": plan.digest,
            "nbytes": nbytes,
            "shards": len(plan.shards),
            "seconds": round(seconds, 3),
            "warnings": list(plan.warnings),
            "notes": list(plan.notes),
            "survival": survived and survived.to_json(),
            "verify": report and report.to_json(),
            "quantised": made and {"method": made.method, "weights": made.weights, "excluded": list(made.excluded)},
        }
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    elif not args.quiet:
        if report is not None:
            print(describe_report(report))
        if survived is not None:
            print(describe_survival(survived))
        if made is not None:
            print(_describe_codes(made))
        print(f"{size(nbytes)} in {plural(len(plan.shards), 'shard')}, {seconds:.1f} s: {output_dir}")
    return 0


def _result(
    plan: Plan, survived: Survived | None, args: argparse.Namespace, output_dir: str
) -> tuple[Report | None, Quantised | None]:
    """Carry out the plan; with calibration, quantise what comes out of it."""
    if args.quant_method not in CALIBRATED:
        return _merge(plan, survived, args, output_dir), None
    from inlay.cli import calibrated

    reports: list[Report | None] = []
    made = calibrated.run(
        plan, args, output_dir, lambda folder: reports.append(_merge(plan, survived, args, str(folder)))
    )
    return (reports[0] if reports else None), made


def _describe_codes(made: Quantised) -> str:
    left = f", {plural(len(made.excluded), 'module')} left in 16 bits" if made.excluded else ""
    return f"{plural(made.weights, 'weight')} in codes ({made.method}, {made.tokens:,} tokens of calibration){left}"


def _default_output(adapter: str) -> str:
    """`<adapter>-merged` beside the adapter; in the current folder for an adapter from a hub."""
    if not os.path.exists(adapter):
        return f"{adapter.replace('/', '--')}-merged"
    path = os.path.normpath(adapter)
    if os.path.isfile(path):
        return f"{os.path.splitext(path)[0]}-merged"
    return f"{os.path.abspath(path) if os.path.basename(path) in ('.', '..') else path}-merged"


def _check_request(args: argparse.Namespace) -> None:
    if args.adapters and not args.merge_lora:
        raise InputError("--adapters without --merge_lora: add --merge_lora true to merge them")
    if args.merge_lora and not args.adapters:
        raise InputError("--merge_lora without --adapters: nothing to merge")
    if not args.adapters and not args.output_dir:
        raise InputError("give --output_dir")
    if not args.safe_serialization:
        raise InputError("--safe_serialization false is not supported: the result is safetensors")
    calibrating = [n for n in ("dataset", "quant_n_samples", "max_length") if getattr(args, n) is not None]
    if calibrating and args.quant_method not in CALIBRATED:
        raise InputError(f"--{calibrating[0]} is for --quant_method {' and '.join(CALIBRATED)}; leave it out")
    if args.num_threads is not None and args.num_threads < 1:
        raise InputError(f"--num_threads must be positive, not {args.num_threads}")


def _merge(plan: Plan, survived: Survived | None, args: argparse.Namespace, output_dir: str) -> Report | None:
    """Run the plan, verifying before publication."""
    found: list[Report] = []

    def check(folder: Path) -> None:
        report = verify_plan(plan, folder, full=args.verify == "full", staged=True)
        found.append(report)
        if not report.exact:
            raise CheckFailed(
                f"the merged weights are not what was planned; nothing was published\n{describe_report(report)}"
            )

    if not args.quiet:
        print("Merging LoRA weights into base model..." if plan.adapters else "Writing model...", file=sys.stderr)
    with Bar(plan.cost.written, "merge", args.quiet) as bar:
        run_plan(
            plan,
            output_dir,
            exist_ok=args.exist_ok,
            max_memory=args.max_memory,
            workers=args.num_threads,
            device=args.device_map,
            progress=bar,
            check=None if args.verify == "none" else check,
            survived=survived,
            accept_loss=args.accept_loss,
        )
    return found[0] if found else None
