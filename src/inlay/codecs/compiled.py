"""The compiled kernels that decode straight into an array; see `_decode.c`.

A codec that uses them has `by_kernel(settings)` and `decode_into(parts, settings, first, last, out)`, which fills what
its `decode` in numpy returns, with the same bytes. They are built with
the package where a C compiler is there; `INLAY_KERNEL=0` turns them off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import Array

try:
    from inlay.codecs import _decode
except ImportError:  # no C compiler at installation
    _decode = None  # type: ignore[assignment]

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]


def available() -> bool:
    """Whether the kernels were built and are not turned off."""
    return _decode is not None and sys.byteorder == "little" and os.environ.get("INLAY_KERNEL", "1") != "0"


def serves(form: ModuleType, settings: Mapping[str, Any]) -> bool:
    """Whether a weight with these settings is decoded by a kernel."""
    return available() and hasattr(form, "decode_into") and bool(form.by_kernel(settings))


def _at(array: Array, kind: Any) -> int:
    """The address of a contiguous array of this type."""
    assert array.flags.c_contiguous and array.dtype == kind, f"{array.dtype} {array.strides} for {kind}"
    return int(array.ctypes.data)


def sixteen(
    codes: U8Array, skip: int, table: F32Array, scales: F32Array, within: int, block: int, out: F32Array
) -> None:
    """Values from number `skip` of the codes on, two a byte, high half first: table[code] · scale of its block.

    `within` is the place of the first in its block, whose scale is the first.
    """
    assert skip >= 0 and 2 * codes.size >= skip + out.size and scales.size * block >= within + out.size
    assert table.size == 16 and 0 <= within < block
    where = _at(codes, np.uint8), _at(table, np.float32), _at(scales, np.float32)
    _decode.sixteen(where[0], skip, out.size, where[1], where[2], within, block, _at(out, np.float32))


def nested(codes: U8Array, table: F32Array, absmax: F32Array, within: int, block: int, offset: float) -> F32Array:
    """table[code] · absmax of its block + offset, both rounded."""
    assert table.size == 256 and absmax.size * block >= within + codes.size and 0 <= within < block
    out = np.empty(codes.size, np.float32)
    where = _at(codes, np.uint8), _at(table, np.float32), _at(absmax, np.float32)
    _decode.nested(where[0], codes.size, where[1], where[2], within, block, offset, out.ctypes.data)
    return out


def words(packed: Array, zeros: U8Array, scales: F32Array, size: int, out: F32Array) -> None:
    """(code − zero) · scale of codes of 4 bits, packed along the first axis of int32 (⌈columns / 8⌉, rows).

    Zeros and scales are (rows, groups) for groups of `size` columns, `out` is (rows, columns). The words may be
    columns of a larger array.
    """
    (rows, columns), (count, width) = out.shape, packed.shape
    groups = scales.shape[1]
    assert width == rows and count * 8 >= columns and groups * size >= columns
    assert scales.shape == zeros.shape == (rows, groups)
    assert packed.dtype == np.int32 and (packed.strides[1] == 4 or width == 1) and packed.strides[0] % 4 == 0
    _decode.words(
        packed.ctypes.data, packed.strides[0] // 4, rows, columns, _at(zeros, np.uint8), _at(scales, np.float32),
        groups, size, _at(out, np.float32),
    )  # fmt: skip


def e4m3(codes: U8Array, scales: F32Array, size: int, out: F32Array) -> None:
    """Codes of F8_E4M3 (rows, columns) times the scale of each `size` columns, (rows or 1, ⌈columns / size⌉)."""
    rows, columns = out.shape
    assert codes.shape == out.shape and scales.shape[0] in (1, rows) and scales.shape[1] * size >= columns
    between = scales.shape[1] if len(scales) > 1 else 0
    _decode.e4m3(
        _at(codes, np.uint8), rows, columns, _at(scales, np.float32), between, size, _at(out, np.float32)
    )  # fmt: skip


def mxfp4(blocks: U8Array, scales: U8Array, first: int, last: int, out: F32Array) -> None:
    """Rows [first, last) of an expert: blocks (out, groups, 16) and scales (out, groups) as (rows, out)."""
    columns, groups, _ = blocks.shape
    assert scales.shape == (columns, groups) and out.shape == (last - first, columns) and 0 <= first < last
    assert last <= 32 * groups and blocks.shape[2] == 16
    where = _at(blocks, np.uint8), _at(scales, np.uint8)
    _decode.mxfp4(*where, groups, columns, first, last, _at(out, np.float32))
