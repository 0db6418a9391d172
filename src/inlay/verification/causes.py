"""Why a merged tensor is not the exact one: known mistakes, tried one after the other.

Each candidate is what some tool computes in place of `base + Σ deltas`, rounded once. The first that
explains nearly all elements is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from inlay.dtypes import Array, DType, F64Array, decode, round_nearest
from inlay.plan.steps import Step
from inlay.plan.types import AdapterUse
from inlay.verification.recompute import Expected

EXPLAINED = 0.999  # share of elements a candidate has to hit; the order of a float32 sum can miss a few
TWICE = "the adapter applied twice"


def find_cause(expected: Expected, stored: Array, dtype: DType, adapters: Sequence[AdapterUse]) -> str:
    """The mistake that turns `expected` into `stored` (rows of stored bits), or what is left of the delta."""
    if not expected.deltas or any(step.magnitude is not None for step, _ in expected.deltas):
        return ""
    wanted = stored.view(f"u{stored.itemsize}")
    for cause, value in _candidates(expected, dtype, adapters):
        got = round_nearest(value, dtype)
        if np.mean(got.view(f"u{got.itemsize}") == wanted) >= EXPLAINED:
            return cause
    return _share_of_delta(expected, decode(stored, dtype))


def _candidates(expected: Expected, dtype: DType, adapters: Sequence[AdapterUse]) -> Iterator[tuple[str, F64Array]]:
    base, deltas = expected.base, expected.deltas
    total = sum((delta for _, delta in deltas), np.zeros_like(base))

    def rounded(x: F64Array) -> F64Array:
        return decode(round_nearest(x, dtype), dtype)

    yield "the delta rounded to the stored type before it was added", base + rounded(total)
    yield from _rounded_in_turn(base, deltas, rounded)
    yield TWICE, base + 2 * total
    yield TWICE, rounded(base + total) + total
    yield TWICE, rounded(base + rounded(total)) + rounded(total)
    yield from _wrong_scaling(base, deltas)
    if len(deltas) > 1:
        yield from _some_only(base, deltas, adapters)


def _rounded_in_turn(
    base: F64Array, deltas: Sequence[tuple[Step, F64Array]], rounded: Any
) -> Iterator[tuple[str, F64Array]]:
    if len(deltas) < 2:
        return
    after_each, delta_first = base, base
    for _, delta in deltas:
        after_each = rounded(after_each + delta)
        delta_first = rounded(delta_first + rounded(delta))
    yield "rounded after each adapter", after_each
    yield "each delta rounded, and the sum rounded after each adapter", delta_first


def _wrong_scaling(base: F64Array, deltas: Sequence[tuple[Step, F64Array]]) -> Iterator[tuple[str, F64Array]]:
    smaller = sum((delta / math.sqrt(step.rank) for step, delta in deltas), np.zeros_like(base))
    larger = sum((delta * math.sqrt(step.rank) for step, delta in deltas), np.zeros_like(base))
    yield "scaled with alpha/r instead of alpha/√r (rsLoRA ignored)", base + smaller
    yield "scaled with alpha/√r instead of alpha/r", base + larger
    if any(step.scaling != 1 for step, _ in deltas) and all(step.scaling for step, _ in deltas):
        yield "the scaling left out", base + sum((d / step.scaling for step, d in deltas), np.zeros_like(base))


def _some_only(
    base: F64Array, deltas: Sequence[tuple[Step, F64Array]], adapters: Sequence[AdapterUse]
) -> Iterator[tuple[str, F64Array]]:
    (first, _), (last, last_delta) = deltas[0], deltas[-1]
    scaled = last_delta * (first.scaling / last.scaling) if last.scaling else last_delta
    yield f"only the last adapter, {adapters[last.adapter].name}, with the scaling of the first", base + scaled
    for step, delta in deltas:
        yield f"only the adapter {adapters[step.adapter].name}", base + delta
    total = sum((delta for _, delta in deltas), np.zeros_like(base))
    for step, delta in deltas:
        yield f"without the adapter {adapters[step.adapter].name}", base + total - delta


def _share_of_delta(expected: Expected, stored: F64Array) -> str:
    """How much of the wanted change is there, by least squares."""
    wanted, found = expected.value - expected.base, stored - expected.base
    size = float(np.vdot(wanted, wanted))
    if not size or not np.isfinite(found).all():
        return ""
    share = float(np.vdot(wanted, found)) / size
    rest = float(np.linalg.norm(found - share * wanted)) / math.sqrt(size)
    return f"{share:.3g} × the wanted change, and a rest of {rest:.2g} × its size"
