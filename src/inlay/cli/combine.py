"""`inlay combine`: one LoRA adapter of several."""

from __future__ import annotations

import argparse
import json
import sys

from inlay.cli import options
from inlay.cli.progress import Bar
from inlay.cli.sources import resolve
from inlay.cli.text import plural, size
from inlay.run.combine import Combination, combine_adapters


def run(args: argparse.Namespace) -> int:
    with Bar(0, "combine", args.quiet) as bar:
        made = combine_adapters(
            [resolve(name, None, args.use_modelscope) for name in args.adapters],
            args.output_dir,
            combine_by=args.combine,
            weights=options.weights(args),
            density=args.density,
            majority_sign_method=args.majority_sign_method,
            svd_rank=args.svd_rank,
            seed=args.seed,
            exist_ok=args.exist_ok,
            progress=bar,
        )
    if not args.quiet:
        for warning in made.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(facts(made, args.combine), indent=1, ensure_ascii=False))
    elif not args.quiet:
        print(describe(made, args.combine, len(args.adapters)))
    return 0


def facts(made: Combination, method: str) -> dict[str, object]:
    """What was written, for programs."""
    return {
        "output_dir": str(made.output_dir),
        "combine": method,
        "modules": len(made.ranks),
        "rank": sorted(set(made.ranks.values())),
        "nbytes": made.nbytes,
        "warnings": list(made.warnings),
    }


def describe(made: Combination, method: str, adapters: int) -> str:
    ranks = ", ".join(map(str, sorted(set(made.ranks.values()))))
    what = f"{plural(adapters, 'adapter')} combined by {method}: {plural(len(made.ranks), 'module')}, rank {ranks}"
    return f"{what}, {size(made.nbytes)}: {made.output_dir}"
