"""Sums of products without rounding error, for many elements at once: pairs of float64 (Dekker 1971, Shewchuk 1997).

Each element is w + Σ s · a · b. With a · b exact in float64 (factors of 32 bits and fewer), s · (a · b) and the sum
are kept as high and low parts; whether the low part has lost anything is known, so the result is either exact or
left to `exact`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inlay.dtypes import F64Array

SPLIT = 2.0**27 + 1
LARGEST = 2.0**900  # beyond which splitting would overflow, and below whose inverse it would underflow

Triple = tuple[F64Array, F64Array, float]


def sums(base: F64Array, pairs: Sequence[Triple]) -> tuple[F64Array, npt.NDArray[np.bool_]]:
    """The sums rounded to odd, and which of them are right.

    `base` (n,); each pair has left (n, r), right (n, r) and a scaling. A sum rounded to odd rounds to any type of at
    most 50 bits as the exact one does (Boldo and Melquiond 2008). A zero has the sign of a base that is zero.
    """
    high, low = base.copy(), np.zeros_like(base)
    right_ = np.ones(base.shape, bool)
    with np.errstate(all="ignore"):
        for left, right, scaling in pairs:
            for k in range(left.shape[1]):
                product, lost = _product(left[:, k], right[:, k])
                term, rest = _product(product, np.full_like(product, scaling))
                right_ &= (lost == 0) & _in_range(left[:, k], right[:, k], product, term, scaling)
                high, error = _sum(high, term)
                for part in (error, rest):
                    low, lost = _sum(low, part)
                    right_ &= lost == 0
        high, low = _sum(high, low)
        right_ &= np.isfinite(high) & np.isfinite(low)
        odd = _to_odd(high, low)
    return np.where((odd == 0) & (base == 0), base, odd), right_


def _sum(a: F64Array, b: F64Array) -> tuple[F64Array, F64Array]:
    """a + b rounded, and what was lost (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _product(a: F64Array, b: F64Array) -> tuple[F64Array, F64Array]:
    """a · b rounded, and what was lost (Dekker, Veltkamp)."""
    p = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: F64Array) -> tuple[F64Array, F64Array]:
    big = SPLIT * a
    high = big - (big - a)
    return high, a - high


def _in_range(a: F64Array, b: F64Array, product: F64Array, term: F64Array, scaling: float) -> npt.NDArray[np.bool_]:
    """Whether nothing over- or underflows: all are zero or far from the ends."""
    fine = np.ones(a.shape, bool)
    for x in (a, b, product, term, np.full_like(a, scaling)):
        size = np.abs(x)
        fine &= (size < LARGEST) & (size > 1 / LARGEST) | (x == 0)
    fine &= (product != 0) | (a == 0) | (b == 0)
    fine &= (term != 0) | (product == 0) | (scaling == 0)
    return fine


def _to_odd(high: F64Array, low: F64Array) -> F64Array:
    """The neighbour of high + low whose last bit is set, where low is not zero."""
    even = high.view(np.int64) & 1 == 0
    away = np.nextafter(high, np.where(low > 0, np.inf, -np.inf))
    odd: F64Array = np.where((low != 0) & even, away, high)
    return odd
