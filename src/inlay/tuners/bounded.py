"""float64 values with a bound on their distance from the exact result.

The bound is what makes a merge reproducible: where `value - error` and `value + error` round to the
same stored number, no other order of summation, machine or library can give a different one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.dtypes import Array, DType, F64Array, round_nearest

U = 2.0**-53  # unit roundoff of float64
TINY = 2.0**-1060  # covers underflow, far below every stored type
SLACK = 1.01  # covers the rounding of the bounds themselves, and second-order terms


@dataclass(frozen=True)
class Bounded:
    """`value` (rows, cols) and `error`, absolute, of a shape that broadcasts against it."""

    value: F64Array
    error: F64Array

    @classmethod
    def exact(cls, value: F64Array) -> Bounded:
        return cls(value, np.zeros((1, 1)))

    def rounded(self, dtype: DType) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Stored bits, and which elements the bound leaves open between two of them."""
        with np.errstate(invalid="ignore", over="ignore"):
            low = round_nearest(self.value - self.error, dtype)
            high = round_nearest(self.value + self.error, dtype)
        exact = np.broadcast_to(self.error == 0, low.shape)
        # Where nothing was added, -0.0 - 0.0 and -0.0 + 0.0 differ; the value itself is the answer.
        bits = np.where(exact, round_nearest(self.value, dtype), low) if exact.any() else low
        kind = f"u{low.dtype.itemsize}"
        open_ = (low.view(kind) != high.view(kind)) | ~np.isfinite(self.error)
        return bits, open_ & ~exact & np.isfinite(self.value)


def product(left: F64Array, right: F64Array, scaling: float) -> tuple[F64Array, F64Array]:
    """`scaling · left @ right` (rows, cols) and its error bound.

    |error| <= (r + 3) u |s| |left_i| |right_j|: the bound of a dot product in any order (Higham 2002,
    section 3.1), with Cauchy-Schwarz for the sum of magnitudes.
    """
    rank = left.shape[1]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        norms = np.outer(_norm(left, 1), _norm(right, 0))
        return scaling * (left @ right), (SLACK * (rank + 3) * U * abs(scaling)) * norms + TINY


def _norm(x: F64Array, axis: int) -> F64Array:
    """Euclidean norm, an upper bound where squares would underflow."""
    largest = np.abs(x).max(axis=axis, initial=0.0)
    norm: F64Array = np.sqrt((x * x).sum(axis=axis))
    return np.where(largest < 2.0**-500, largest * np.sqrt(x.shape[axis]), norm)
