"""What only the values of an adapter tell: NaN or Inf, and whether it does anything at all.

Adapters are small, so all of their tensors are read once, in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.refs import TensorInfo, TensorRef
from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import Array, DType, decode32

BLOCK_ELEMENTS = 1 << 20
ROOT = "adapter"


@dataclass(frozen=True)
class Values:
    """`nonfinite`: tensors with NaN or Inf; `zero`: tensors that are zero everywhere."""

    nonfinite: tuple[str, ...]
    zero: tuple[str, ...]


def scan_values(adapter: Adapter) -> Values:
    """Read every float tensor of the adapter once."""
    nonfinite, zero = [], []
    with SpanReader({ROOT: adapter.path}) as reader:
        for t in adapter.tensors:
            if not t.dtype.mergeable:
                continue
            finite, any_set = _scan(reader, adapter.weights_file, t)
            if not finite:
                nonfinite.append(t.key)
            elif not any_set:
                zero.append(t.key)
    return Values(tuple(nonfinite), tuple(zero))


def _scan(reader: SpanReader, file: str, t: TensorInfo) -> tuple[bool, bool]:
    raw_type = np.dtype(t.dtype.raw)
    flat = TensorRef.of(ROOT, file, t)
    any_set = False
    for start in range(0, t.nbytes, BLOCK_ELEMENTS * raw_type.itemsize):
        block = np.empty(min(BLOCK_ELEMENTS, (t.nbytes - start) // raw_type.itemsize), raw_type)
        reader.into(flat, start, block)
        if not _finite(block, t.dtype):
            return False, True
        any_set = any_set or bool(block.any())
    return True, any_set


def _finite(raw: Array, dtype: DType) -> bool:
    """One sum of squares is finite unless an element is not, or unless it overflows: then look closely."""
    values = raw if dtype.raw == "<f8" else decode32(raw, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(values, values))) or bool(np.isfinite(values).all())
