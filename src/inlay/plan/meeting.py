"""How the adapters of a plan meet: sizes of their deltas, and the angles between them.

In rank space, without forming a delta: for Δ_a = s_a L_a R_a and Δ_b = s_b L_b R_b on one tensor

    ⟨Δ_a, Δ_b⟩ = s_a s_b Σ (L_aᵀ L_b) ∘ (R_a R_bᵀ)

so a few products of r × r matrices take the place of one as large as the weight. Low-rank pairs only, DoRA's
without its magnitude: what another method does to a weight has no factors to compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.checkpoints.spans import BASE, SpanReader
from inlay.dtypes import F64Array, decode
from inlay.plan.steps import Part, Step
from inlay.plan.types import Entry, Plan

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Meeting:
    """What several adapters, or one, do to one tensor, or to all of them together (`key` None).

    `sizes[i]` is the Frobenius norm of the delta of adapter i, `base` that of the weight where it was asked for;
    `cosines[i, j]`, i < j, is there for adapters that both act.
    """

    key: str | None
    sizes: Mapping[int, float]
    cosines: Mapping[tuple[int, int], float]
    base: float | None = None

    def relative(self, adapter: int) -> float | None:
        """Size of a delta, as a share of the base's."""
        return self.sizes[adapter] / self.base if self.base else None

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "key": self.key,
            "sizes": {names[i]: _finite(size) for i, size in self.sizes.items()},
            "relative": {names[i]: _finite(self.relative(i)) for i in self.sizes} if self.base else None,
            "cosines": [[names[i], names[j], _finite(c)] for (i, j), c in self.cosines.items()],
        }


def _finite(value: float | None) -> float | None:
    """None for what JSON has no number for: of a base with NaN, or sums beyond the range."""
    return value if value is not None and math.isfinite(value) else None


def meet(plan: Plan, *, base: bool = False) -> list[Meeting]:
    """One meeting a tensor with low-rank steps, in the order of the files, and their sum at the end.

    Reads the adapters' factors; with `base` the touched weights too, for their size.
    """
    found: list[Meeting] = []
    grams: dict[tuple[int, int], float] = {}
    total = 0.0
    with SpanReader(plan.roots) as reader:
        for entry in plan.weights.values():
            steps = [step for step in entry.steps if isinstance(step, Step) and step.left is not None]
            if not steps or entry.source.root != BASE:
                continue
            gram = _gram(reader, entry, steps)
            norm = _norm(reader, entry) if base else None
            found.append(_meeting(entry.key, gram, norm))
            for pair, value in gram.items():
                grams[pair] = grams.get(pair, 0.0) + value
            total += (norm or 0.0) ** 2
    return [*found, _meeting(None, grams, math.sqrt(total) if base else None)] if found else []


def _meeting(key: str | None, gram: Mapping[tuple[int, int], float], base: float | None) -> Meeting:
    sizes = {i: math.sqrt(max(0.0, value)) for (i, j), value in gram.items() if i == j}
    cosines = {
        (i, j): value / (sizes[i] * sizes[j]) for (i, j), value in gram.items() if i < j and sizes[i] and sizes[j]
    }
    return Meeting(key, sizes, cosines, base)


def _gram(reader: SpanReader, entry: Entry, steps: Sequence[Step]) -> dict[tuple[int, int], float]:
    """Inner products of the adapters' deltas on one entry; an adapter may have many steps, one an expert."""
    factors = [(_read(reader, step.left), _read(reader, step.right)) for step in steps if step.left]
    gram: dict[tuple[int, int], float] = {}
    for x, (step, (left, right)) in enumerate(zip(steps, factors, strict=True)):
        first, last = step.rows or (0, entry.matrix[0])
        for other, (other_left, other_right) in zip(steps[x:], factors[x:], strict=True):
            begin, end = other.rows or (0, entry.matrix[0])
            low, high = max(first, begin), min(last, end)
            if low >= high:
                continue
            lefts = left[low - first : high - first].T @ other_left[low - begin : high - begin]
            product = step.scaling * other.scaling * float(np.vdot(lefts, right @ other_right.T))
            pair = min(step.adapter, other.adapter), max(step.adapter, other.adapter)
            twice = 2 if pair[0] == pair[1] and step is not other else 1
            gram[pair] = gram.get(pair, 0.0) + twice * product
    return gram


def _read(reader: SpanReader, part: Part | None) -> F64Array:
    assert part is not None
    return decode(reader.view(part.ref, part.start, part.shape, part.strides), part.ref.dtype)


def _norm(reader: SpanReader, entry: Entry) -> float:
    source = entry.source_matrix
    rows, cols = source.matrix
    step = max(1, BLOCK_ELEMENTS // max(1, cols))
    total = 0.0
    for at in range(0, rows, step):
        values = decode(reader.rows(source, at, min(rows, at + step)), source.dtype)
        total += float(np.vdot(values, values))
    return math.sqrt(total)
