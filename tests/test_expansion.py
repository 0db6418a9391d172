"""Exact sums of many elements against rational arithmetic, one element at a time."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from inlay.dtypes import BF16, F16, F32, decode, round_fraction, round_nearest
from inlay.tuners import expansion


def cases(seed: int, bits: int, r: int, scalings: tuple[float, ...]) -> tuple[np.ndarray, list[expansion.Triple]]:
    """Few bits make ties, many make sums that no float64 holds."""
    rng = np.random.default_rng(seed)

    def few(*shape: int) -> np.ndarray:
        return rng.integers(-(2**bits), 2**bits, shape) * 2.0 ** rng.integers(-bits - 6, 3, shape).astype(float)

    base = few(400)
    base[::7] = rng.choice([0.0, -0.0], base[::7].shape)
    pairs = [(few(400, r), few(400, r), s) for s in scalings]
    for left, _, _ in pairs:
        left[::14] = 0  # sums that are zero, some of them of -0.0
    return base, pairs


@pytest.mark.parametrize("bits", [3, 8, 11, 24])
@pytest.mark.parametrize("scalings", [(1.0,), (2.0, 0.75), (8 / 3**0.5, -0.1)])
def test_against_rational_arithmetic(bits: int, scalings: tuple[float, ...]) -> None:
    base, pairs = cases(bits, bits, 5, scalings)
    values, right = expansion.sums(base, pairs)
    assert right.mean() > 0.9 or bits == 24
    for dtype in (F32, BF16, F16):
        found = decode(round_nearest(values, dtype), dtype)
        for i in np.flatnonzero(right):
            exact = Fraction(base[i]) + sum(
                Fraction(s) * sum(Fraction(a) * Fraction(b) for a, b in zip(left[i], right_[i], strict=True))
                for left, right_, s in pairs
            )
            wanted = round_fraction(exact, dtype, negative_zero=base[i] == 0 and bool(np.signbit(base[i])))
            assert found[i] == wanted and np.signbit(found[i]) == np.signbit(wanted), (i, dtype.name)


def test_what_is_not_exact_is_left() -> None:
    """Sums whose parts lie further apart than two float64 reach, products that underflow, infinities."""
    base = np.array([1.0, 1.0, 1.0, np.inf, 1.0])
    left = np.array([[2.0**-120], [2.0**-600], [2.0**1000], [1.0], [1.0]])
    factor = np.array([[1.0 + 2.0**-30], [2.0**-600], [2.0**1000], [1.0], [1.0 + 2.0**-52]])
    _, right = expansion.sums(base, [(left, factor, 1.0 + 2.0**-52)])
    assert right.tolist() == [False, False, False, False, True]
    lower = (np.full((1, 2), 1.0), np.array([[2.0**-60, 2.0**-200 * (1 + 2.0**-52)]]), 1.0)
    assert not expansion.sums(np.array([1.0]), [lower])[1][0]
