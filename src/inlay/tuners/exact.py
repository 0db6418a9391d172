"""Single elements without rounding error, for the few that floating point leaves open.

LoRA is a sum of products of floats, hence a rational number. DoRA divides by a square root, so it is
evaluated to 120 digits, which decides every case but a tie that no trained magnitude produces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np

from inlay.dtypes import DType, F64Array, round_fraction

DIGITS = 120


@dataclass(frozen=True)
class ExactStep:
    """One adapter's step as it bears on a line of the weight (the axis along which DoRA takes its norm).

    `left` (r,) belongs to the line, `right` (r, n) to its elements; `magnitude` is None for LoRA.
    """

    left: F64Array
    right: F64Array
    scaling: float
    magnitude: float | None = None


def element(base: float, position: int, line: F64Array | None, steps: Sequence[ExactStep], dtype: DType) -> float:
    """Correctly rounded value of the element at `position` of a line.

    `line` holds the weights of the whole line before any step; only DoRA needs it.
    """
    if all(step.magnitude is None for step in steps):
        x = Fraction(base) + sum((_delta(step, position) for step in steps), Fraction(0))
        return round_fraction(x, dtype, negative_zero=base == 0 and bool(np.signbit(base)))
    assert line is not None
    return _with_norms(base, position, line, steps, dtype)


def _delta(step: ExactStep, position: int) -> Fraction:
    pairs = zip(step.left.tolist(), step.right[:, position].tolist(), strict=True)
    return Fraction(step.scaling) * sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))


def _with_norms(base: float, position: int, line: F64Array, steps: Sequence[ExactStep], dtype: DType) -> float:
    with localcontext() as context:
        context.prec = DIGITS
        x = Decimal(base)
        for step in steps:
            x += _decimal(_delta(step, position))
            if step.magnitude is not None:
                x *= Decimal(step.magnitude) / _length(line, step)
        return round_fraction(Fraction(x), dtype)


def _decimal(x: Fraction) -> Decimal:
    return Decimal(x.numerator) / Decimal(x.denominator)


def _length(line: F64Array, step: ExactStep) -> Decimal:
    """‖w + s left · right‖ over the line, from an exact sum of squares."""
    total = sum(((Fraction(w) + _delta(step, j)) ** 2 for j, w in enumerate(line.tolist())), Fraction(0))
    return _decimal(total).sqrt()
