"""`inlay plan`: what export would do."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from inlay.cli import options
from inlay.cli.sources import find_model, open_adapters
from inlay.cli.text import count, plural, rows, size
from inlay.errors import InputError
from inlay.plan.build import make_plan
from inlay.plan.combination import SUMS
from inlay.plan.meeting import Meeting, meet
from inlay.plan.quant import Quant
from inlay.plan.types import Plan, to_json
from inlay.run.survival import Survived, require_survival, survival, worst_modules

SHOWN = 8
LEAST_AGREED = 3


def run(args: argparse.Namespace) -> int:
    plan, survived = plan_from(args, args.output_dir)
    meetings = meet(_summed(args, plan)) if len(plan.adapters) > 1 else []
    if args.json:
        met = {"meeting": [m.to_json([a.name for a in plan.adapters]) for m in meetings]} if meetings else {}
        left = {"survival": {**survived.to_json(), "of": [s.to_json() for s in survived.tensors]}} if survived else {}
        value = {**to_json(plan), **met, **left, "digest": plan.digest}
        json.dump(value, sys.stdout, indent=1, ensure_ascii=False)  # piece by piece: the text can be 60 MB
        print()
    else:
        left_of = _listed("what survives", [describe_survival(survived)]) if survived else ""
        print("\n\n".join(part for part in (describe(plan), left_of, describe_meeting(plan, meetings)) if part))
    if not args.accept_loss:
        require_survival(survived)
    return 0


def _summed(args: argparse.Namespace, plan: Plan) -> Plan:
    """The plan in which each adapter stands for itself: how they meet does not depend on how they are combined."""
    if plan.settings.combine in SUMS:
        return plan
    adapters = open_adapters(args)
    return make_plan(find_model(args, adapters), adapters, max_memory=args.max_memory)


def plan_from(args: argparse.Namespace, output_dir: str | None) -> tuple[Plan, Survived | None]:
    """The plan that the options ask for, and how much of the adapters would survive.

    With `--keep_16bit auto` a first plan tells which modules stay in 16 bits.
    """
    quant = options.quant(args)
    if args.keep_16bit == "auto" and not quant.keep and not args.quant_method:
        raise InputError("--keep_16bit auto is for --keep_quant or --quant_method; the result is in floats as it is")
    plan = _plan(args, output_dir, quant)
    survived = survival(plan, full=args.survival == "full" or args.keep_16bit == "auto")
    if args.keep_16bit == "auto" and survived and (worst := worst_modules(survived)):
        pattern = f"^(?:{'|'.join(map(re.escape, worst))})$"
        plan = _plan(args, output_dir, replace(quant, keep_16bit=pattern))
        survived = survival(plan, full=args.survival == "full")
    return plan, survived


def describe_survival(survived: Survived) -> str:
    """One line for people."""
    o = survived.overall
    how = f"a sample of {plural(len(survived.tensors), 'tensor')}" if survived.sampled else "every element"
    return (
        f"{o.kept:.1%} of what the adapters add is in the result, with an error of {o.error:.2%} of its size; "
        f"{o.changed:.1%} of the elements change ({how})"
    )


def _plan(args: argparse.Namespace, output_dir: str | None, quant: Quant) -> Plan:
    adapters = open_adapters(args)
    return make_plan(
        find_model(args, adapters),
        adapters,
        weights=options.weights(args),
        torch_dtype=options.torch_dtype(args),
        combine_by=args.combine or "sum",
        options=options.combine_options(args),
        quant=quant,
        max_shard_size=args.max_shard_size,
        max_memory=args.max_memory,
        output_dir=output_dir,
        exist_ok=args.exist_ok,
    )


def describe(plan: Plan) -> str:
    """The plan for people."""
    cost = plan.cost
    share = cost.touched_parameters / max(1, cost.parameters)
    parts = [rows([("base", _base(plan)), *(("adapter", _adapter(plan, i)) for i in range(len(plan.adapters)))])]
    parts.append(
        rows(
            [
                ("touches", f"{_reached(plan)}: {share:.1%} of {count(cost.parameters)} parameters"),
                ("reads", size(cost.read)),
                ("computes", size(cost.computed)),
                ("copies", size(cost.copied)),
                ("writes", f"{size(cost.written)} in {plural(len(plan.shards), 'shard')}"),
                ("works in", f"{size(cost.memory)} beside the interpreter"),
                ("plan", plan.digest),
            ]
        )
    )
    if len(plan.adapters) > 1:
        parts.append(_several(plan))
    parts += [
        _listed("sidecars", _sidecars(plan)),
        _listed("left out", [f"{f}: {why}" for f, why in plan.left_out.items()]),
    ]
    parts += [_listed("notes", list(plan.notes)), _listed("warnings", list(plan.warnings))]
    return "\n\n".join(part for part in parts if part)


def describe_meeting(plan: Plan, meetings: Sequence[Meeting]) -> str:
    """How the adapters meet: over all tensors, then the tensors on which a pair agrees least."""
    if not meetings:
        return ""
    names = [a.name for a in plan.adapters]
    *single, overall = meetings
    lines = [f"{names[i]}: size {_of_base(overall, i)}" for i in overall.sizes]
    for i, j in overall.cosines:
        ranked = sorted((m for m in single if (i, j) in m.cosines), key=lambda m: m.cosines[i, j])
        lines.append(
            f"{names[i]} and {names[j]}: cosine {overall.cosines[i, j]:+.3f} over {plural(len(ranked), 'tensor')}"
        )
        lines += [f"  {m.cosines[i, j]:+.3f}  {m.key}" for m in ranked[:LEAST_AGREED]]
    return _listed("how the adapters meet", lines)


def _of_base(meeting: Meeting, adapter: int) -> str:
    share = meeting.relative(adapter)
    return f"{meeting.sizes[adapter]:.3g}" + (f", {share:.2%} of the weights it changes" if share else "")


def _base(plan: Plan) -> str:
    return f"{plan.base_name}  ({plural(len(plan.entries), 'tensor')})"


def _adapter(plan: Plan, i: int) -> str:
    use = plan.adapters[i]
    ranks = ", ".join(map(str, use.rank)) or "none"
    scalings = ", ".join(f"{s:g}" for s in use.scaling) or "none"
    weight = f", weight {use.weight:g}" if use.weight != 1 else ""
    return (
        f"{use.name}  {use.tuner}, rank {ranks}, scaling {scalings}{weight}, {plural(use.modules, 'module')}, "
        f"{count(use.parameters)} parameters"
    )


def _reached(plan: Plan) -> str:
    """Modules reached, by the last word of their name."""
    kinds = Counter(key.removesuffix(".weight").rpartition(".")[2] for key, e in plan.entries.items() if e.touched)
    listed = [f"{n} × {kind}" if n > 1 else kind for kind, n in kinds.most_common(SHOWN)]
    return ", ".join(listed + (["…"] if len(kinds) > SHOWN else [])) or "nothing"


def _several(plan: Plan) -> str:
    order = (
        "the order of the adapters matters: one of them scales or turns what came before it"
        if plan.order_matters
        else "the order of the adapters does not matter"
    )
    return f"{plural(len(plan.overlaps), 'tensor')} are changed by more than one adapter; {order}"


def _sidecars(plan: Plan) -> list[str]:
    groups: dict[str, list[str]] = {}
    for sidecar in plan.sidecars:
        where = "base" if sidecar.root == "base" else plan.adapters[int(sidecar.root.removeprefix("adapter"))].name
        changed = sidecar.edits or sidecar.removed
        edited = " (edited)" if changed else f" (from {sidecar.source})" if sidecar.source != sidecar.file else ""
        groups.setdefault(where, []).append(sidecar.file + edited)
    return [f"from {where}: {', '.join(files)}" for where, files in groups.items()]


def _listed(title: str, lines: list[str]) -> str:
    return f"{title}\n" + "\n".join(f"  {line}" for line in lines) if lines else ""
