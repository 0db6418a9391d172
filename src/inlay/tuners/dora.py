"""DoRA: LoRA, then every output is given a trained length.

W' = m / ‖W₀ + s B A‖ · (W + s B A)        Liu et al. 2024, eq. 5

The norm runs over the inputs of one output: along the rows of a Linear, along the columns where the
weight is stored (in, out); for an embedding PEFT takes it along the vocabulary, one per dimension.
W₀ is the weight before any adapter and W the weight after the adapters that came first, which is what
a model with both adapters computes (PEFT 0.21; earlier versions took the norm of W + s B A instead).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners import lora
from inlay.tuners.bounded import SLACK, Bounded, U

PARTS = ("left", "right", "magnitude")
ADDITIVE = False

_WIDE = np.longdouble


def squares(base: Bounded, parts: Mapping[str, F64Array], scaling: float, axis: int) -> tuple[F64Array, F64Array]:
    """Sums over `axis` of (W₀ + s B A)² and of the squared errors of its elements, for one row block."""
    sum_ = lora.merge(base, parts, scaling)
    errors = np.broadcast_to(sum_.error, sum_.value.shape)
    total = np.add.reduce(np.square(sum_.value, dtype=_WIDE), axis=axis)
    return np.asarray(total, np.float64), np.asarray(np.add.reduce(errors * errors, axis=axis))


def norm(total: F64Array, errors: F64Array, count: int) -> tuple[F64Array, F64Array]:
    """Length of each output from its sums, and a bound on its relative error."""
    length = np.sqrt(total)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.sqrt(errors) / length
    return length, SLACK * (relative + 4 * U + count * float(np.finfo(_WIDE).eps))


def merge(weight: Bounded, parts: Mapping[str, F64Array], scaling: float, length: tuple[F64Array, F64Array]) -> Bounded:
    """Merged rows. `length` and `parts["magnitude"]` broadcast against them: (rows, 1) or (1, cols).

    An output of length zero has no direction to scale: its result is NaN, which the caller reports.
    """
    sum_ = lora.merge(weight, parts, scaling)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = parts["magnitude"] / length[0]
        value = factor * sum_.value
        error = SLACK * (np.abs(factor) * sum_.error + np.abs(value) * (length[1] + 4 * U))
    return Bounded(value, error)
