"""Steps of several adapters on one tensor as one delta, mixed element by element (`inlay.tuners.mixing`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from inlay.checkpoints.refs import Made, TensorRef
from inlay.checkpoints.spans import adapter_root
from inlay.dtypes import F64
from inlay.errors import Problem
from inlay.plan.combination import Options
from inlay.plan.combine import Draft
from inlay.plan.steps import Delta, Part, Step
from inlay.tuners import mixing
from inlay.tuners.combining import MAJORITY_SIGNS

Rows = tuple[int, int]
Run = Sequence[Step]  # one pair on one stretch of rows after the other: all of a module whose rows lie in another order


def mix(
    drafts: Mapping[str, Draft], name: str, weights: Sequence[float], options: Options, names: Sequence[str],
    problems: list[Problem],
) -> None:  # fmt: skip
    """The pairs of all adapters on a tensor, or on one module of it, become one delta each."""
    for key, draft in drafts.items():
        if draft.source is not None or draft.patches:
            what = f"is replaced, wholly or in rows, by {names[min(draft.by)]}; {name} mixes what is added"
            problems.append(Problem(key, what))
            continue
        other = [step for step in draft.steps if not isinstance(step, Step) or step.magnitude is not None]
        if other:
            who = names[other[0].adapter]
            problems.append(Problem(key, f"{who} is {other[0].tuner}; {name} mixes the deltas of LoRA pairs"))
            continue
        runs = _runs([step for step in draft.steps if isinstance(step, Step)])
        by_rows: dict[Rows, list[Run]] = {}
        for run in runs:
            by_rows.setdefault(_reach(run), []).append(run)
        if why := _not_mixable(runs, list(by_rows)):
            problems.append(Problem(key, f"{why}; {name} mixes deltas of the same rows"))
            continue
        draft.steps[:] = [_mixed(key, found, rows, name, weights, options) for rows, found in by_rows.items()]


def _runs(steps: Sequence[Step]) -> Sequence[Run]:
    """Steps of one pair whose rows follow on each other, together."""
    runs: list[list[Step]] = []
    ending: dict[tuple[Hashable, int], list[Step]] = {}
    for step in sorted(steps, key=lambda s: (s.adapter, s.rows or (0, 0))):
        first, last = _reach([step])
        run = ending.pop((_origin(step), first), None) if step.rows else None
        if run is None:
            run = []
            runs.append(run)
        run.append(step)
        ending[_origin(step), last] = run
    return runs


def _origin(step: Step) -> Hashable:
    """What the steps of one pair have in common."""
    return step.adapter, step.right, step.left and step.left.ref


def _reach(run: Run) -> Rows:
    """Rows of the entry's matrix."""
    first, last = run[0], run[-1]
    if first.rows is None or last.rows is None:
        return 0, first.left.shape[0] if first.left else 1
    return first.rows[0], last.rows[1]


def _not_mixable(runs: Sequence[Run], ranges: Sequence[Rows]) -> str:
    """No elements, a module in several places, or ranges of rows that overlap without being the same: a message."""
    if any(0 in (last - first, runs[0][0].right.shape[1]) for first, last in ranges):
        return "the base's tensor has no elements"
    origins = Counter(_origin(run[0]) for run in runs if run[0].rows)
    if any(count > 1 for count in origins.values()):
        return "a module has its rows in several places of it"
    crossing = next((f"{a} and {b}" for a, b in pairwise(sorted(ranges)) if b[0] < a[1]), "")
    return crossing and f"the adapters reach rows {crossing} of it"


def _mixed(key: str, runs: Sequence[Run], rows: Rows, name: str, weights: Sequence[float], options: Options) -> Delta:
    positions = sorted({run[0].adapter for run in runs})
    refs: dict[str, TensorRef] = {}
    terms: list[list[dict[str, Any]]] = []
    for i, position in enumerate(positions):
        terms.append([])
        for j, run in enumerate(r for r in runs if r[0].adapter == position):
            pair = run[0]
            refs[f"right{i}.{j}"] = pair.right.ref
            if pair.left is not None:
                refs[f"left{i}.{j}"] = pair.left.ref
            left = [_place(step.left) for step in run if step.left is not None]
            terms[-1].append({"scaling": pair.scaling, "left": left, "right": _place(pair.right)})
    whole = any(run[0].rows is None for run in runs)
    shape = rows[1] - rows[0], runs[0][0].right.shape[1]
    how = {
        "name": name, "tensor": key if whole else f"{key}[{rows[0]}:{rows[1]}]", "positions": positions,
        "weights": [weights[p] for p in positions], "density": 1.0 if options.density is None else options.density,
        "gamma": mixing.GAMMA if options.gamma is None else options.gamma,
        "epsilon": mixing.EPSILON if options.epsilon is None else options.epsilon,
        "majority_sign": options.majority_sign_method or MAJORITY_SIGNS[0], "seed": options.seed or 0,
    }  # fmt: skip
    made = Made.of("mixture", refs, {"mix": how, "terms": terms, "shape": list(shape)}, shape[1])
    ref = TensorRef(adapter_root(positions[0]), "", key, F64, shape, 0, made)
    return Delta(positions[0], name, ref, None if whole else rows)


def _place(part: Part) -> list[int]:
    return [part.start, *part.shape, *part.strides]
