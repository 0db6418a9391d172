"""The compiled kernel for sums of low-rank products; see `_kernel.c`.

It is built with the package where a C compiler is there, and not needed: the float64 path gives the
same bytes at about a quarter of the speed. `INLAY_KERNEL=0` turns it off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.dtypes import BF16, F16, F32, F64, Array, DType

try:
    from inlay.tuners import _kernel
except ImportError:  # no C compiler at installation
    _kernel = None  # type: ignore[assignment]

KINDS = {BF16.name: 0, F16.name: 1, F32.name: 2}
OPEN_CAPACITY = 1 << 10

F32Array = npt.NDArray[np.float32]


def available() -> bool:
    """Whether the kernel was built and is not turned off."""
    return _kernel is not None and os.environ.get("INLAY_KERNEL", "1") != "0"


def fits(source: DType, out: DType, parts: Sequence[DType]) -> bool:
    """Whether it can do this merge: types that it knows, and factors that float32 holds exactly."""
    return available() and out.name in KINDS and source.name in KINDS and F64 not in parts


@dataclass(frozen=True)
class Packed:
    """`right` (rank, cols) of all steps on a tensor, in panels, with the norms of its columns."""

    rank: int
    cols: int
    panels: F32Array
    norms: F32Array
    scale: npt.NDArray[np.float64]

    @classmethod
    def of(cls, right: F32Array, scale: npt.NDArray[np.float64]) -> Packed:
        rank, cols = right.shape
        width = -(-cols // _kernel.PANEL) * _kernel.PANEL
        packed = cls(rank, cols, np.empty(rank * width, np.float32), np.empty(width, np.float32), scale)
        right = np.ascontiguousarray(right)
        _kernel.pack(right.ctypes.data, rank, cols, packed.panels.ctypes.data, packed.norms.ctypes.data)
        return packed


@dataclass(frozen=True)
class Result:
    """Flat indices of the elements that are still open, and whether a result is not finite."""

    open: npt.NDArray[np.int64]
    finite: bool


def merge(weight: Array, source: DType, left: F32Array, right: Packed, out: Array, dtype: DType) -> Result:
    """Round `weight + left · diag(scale) · right` into `out`; both (rows, cols), stored bits.

    `left` is (rows, rank) float32. Elements listed as open are not decided yet. The interpreter is free
    while it works.
    """
    rows, cols = weight.shape
    assert out.shape == weight.shape == (rows, right.cols) and left.shape == (rows, right.rank)
    assert weight.flags.c_contiguous and out.flags.c_contiguous and left.flags.c_contiguous
    assert left.dtype == np.float32 and out.itemsize * 8 == dtype.bits and right.scale.shape == (right.rank,)
    capacity = OPEN_CAPACITY
    while True:
        indices = np.empty(capacity, np.int64)
        count, nonfinite = _kernel.merge(
            weight.ctypes.data, KINDS[source.name], out.ctypes.data, KINDS[dtype.name], rows, cols, right.rank,
            left.ctypes.data, right.scale.ctypes.data, right.panels.ctypes.data, right.norms.ctypes.data,
            indices.ctypes.data, capacity,
        )  # fmt: skip
        if count <= capacity:
            return Result(indices[:count], not nonfinite)
        capacity = count


def convert(weight: Array, source: DType, out: Array, dtype: DType) -> Result:
    """Round `weight` to another type: a merge of rank zero, for which the factors are never looked at."""
    none = np.zeros(1, np.float32)
    flat, flat_out = weight.reshape(1, -1), out.reshape(1, -1)
    right = Packed(0, flat.shape[1], none, none, np.zeros(0))
    return merge(flat, source, np.zeros((1, 0), np.float32), right, flat_out, dtype)
