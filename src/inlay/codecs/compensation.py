"""Codes of which each row holds the whole delta of the adapter, at the least cost.

Plain rounding takes each value to its nearest code. Where a delta is smaller than the steps of the codes most of it is
lost so, and all in one direction, since the base itself lies on the codes. For a row with merged values w, delta δ and
codes that decode to q, the error d = q − w is chosen here such that

    ⟨δ, d⟩ = 0 as nearly as one code allows, with ‖d‖² as small as can be

that is d H dᵀ, the error of GPTQ and LDLQ, for H = I + m δδᵀ / ‖δ‖² and m → ∞: the direction that matters is that in
which the row was trained to move, and no text is needed to know it. From the nearest codes, values go to the code on
their other side in the order of what this does for ⟨δ, d⟩ over what it adds to ‖d‖², until ⟨δ, d⟩ is nearest to 0.
Rows are independent, so blocks may be cut anywhere. A row without a delta has its nearest codes.

A form takes part whose codes of 2 or 4 bits fill bytes, so that 4 or 16 decodings of its own give every value that an
element can have. Scales and zero points are kept. bench/compensate.py and docs/numerics.md have the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs.encoding import stored_item
from inlay.dtypes import DTYPES, Array, F64Array

F32Array = npt.NDArray[np.float32]

CHUNK = 1 << 16  # values that are chosen at once
BYTES = 16  # a value of a block: its base, its neighbours, what is chosen

# Codec -> bits of a code.
_BITS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "awq": lambda settings: int(settings["bits"]),
    "bnb4": lambda _: 4,
    "compressed_pack": lambda settings: int(settings["weights"]["num_bits"]),
    "gptq": lambda settings: int(settings["bits"]),
    "hqq": lambda settings: {"4bit_u8": 4, "2bit_u8": 2}.get(settings["packing"], 0),
    "mlx": lambda settings: int(settings["bits"]),
}


def bits_of(codec: str, settings: Mapping[str, Any]) -> int | None:
    """Bits of a code, where the codes of such a weight can be chosen so; None where they cannot."""
    bits = _BITS[codec](settings) if codec in _BITS else None
    return bits if bits in (2, 4) else None


def compensated(
    form: ModuleType, codec: str, settings: Mapping[str, Any], first: int,
    merged: F32Array, base: F32Array, known: Mapping[str, Array],
) -> F32Array:  # fmt: skip
    """Values that `encode` takes to the codes wanted, (rows, in): rows from `first` on.

    `base` has the same rows before any adapter; `known` all parts of them but the codes. `codec` is the name of `form`.
    """
    bits = bits_of(codec, settings)
    assert bits is not None, f"codes of {codec} cannot be chosen so"
    below, above = _neighbours(form, bits, settings, first, merged, known)
    values = np.array(merged, np.float32)
    step = max(1, CHUNK // max(1, merged.shape[1]))
    for at in range(0, len(merged), step):
        rows = slice(at, at + step)
        wanted, before = merged[rows].astype(np.float64), base[rows].astype(np.float64)
        low, high = below[rows].astype(np.float64), above[rows].astype(np.float64)
        nearer_low = wanted - low <= high - wanted
        off = np.where(nearer_low, low, high) - wanted
        other = np.where(nearer_low, high, low) - wanted
        moved = _moved(off, other, wanted - before)
        values[rows] = np.where(moved, np.where(nearer_low, above[rows], below[rows]), values[rows])
    return values


def _neighbours(
    form: ModuleType, bits: int, settings: Mapping[str, Any], first: int, merged: F32Array, known: Mapping[str, Array]
) -> tuple[F32Array, F32Array]:
    """The values of codes next to each value, below and above; the same one where all lie on one side."""
    last, part = first + len(merged), next(iter(form.layout(settings)))
    dtype, shape = form.layout(settings)[part]
    if (span := form.spans(settings, first, last)[part]) is not None:
        axis, begin, end = span
        shape = (*shape[:axis], end - begin, *shape[axis + 1 :])
    item = stored_item(DTYPES[dtype])
    below, above = np.full(merged.shape, -np.inf, np.float32), np.full(merged.shape, np.inf, np.float32)
    for code in range(1 << bits):
        filled = np.full(int(np.prod(shape)) * item.itemsize, code * (255 // ((1 << bits) - 1)), np.uint8)
        value = form.decode({**known, part: filled.view(item).reshape(shape)}, settings, first, last)
        np.maximum(below, value, out=below, where=value <= merged)
        np.minimum(above, value, out=above, where=value >= merged)
    low, high = np.isinf(below), np.isinf(above)
    return np.where(low, np.where(high, merged, above), below), np.where(high, np.where(low, merged, below), above)


def _moved(off: F64Array, other: F64Array, delta: F64Array) -> npt.NDArray[np.bool_]:
    """Which values go to the code on their other side: errors with the nearest code and with the other, deltas."""
    lack = (delta * off).sum(axis=1, keepdims=True)  # ⟨δ, d⟩
    gain = -np.sign(lack) * delta * (other - off)
    cost = np.square(other) - np.square(off)
    useful = (gain > 0) & (other != off) & np.isfinite(gain) & np.isfinite(cost)
    order = np.argsort(np.where(useful, -gain / np.maximum(cost, np.finfo(np.float64).tiny), 0), axis=1, kind="stable")
    gains = np.take_along_axis(np.where(useful, gain, 0), order, 1).cumsum(axis=1)
    count = np.abs(np.abs(lack) - np.concatenate([np.zeros_like(lack), gains], axis=1)).argmin(axis=1)
    moved = np.zeros(off.shape, np.bool_)
    np.put_along_axis(moved, order, np.arange(off.shape[1]) < count[:, None], 1)
    moved &= useful
    return moved
