"""Floats of eight bits and fewer: the value of each code, and the nearest code of a value.

    F8_E4M3   sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity, 0x7F and 0xFF are NaN; up to 448
    F8_E5M2   sign, 5 bits of exponent (bias 15), 2 of fraction; as float16, cut; up to 57344
    F8_E8M0   2^(code − 127), a scale; 0xFF is NaN
    E2M1      sign, 2 bits of exponent (bias 1), 1 of fraction: 0 ½ 1 1½ 2 3 4 6 and their negatives

Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; Open Compute Project, "OCP Microscaling Formats (MX)
Specification" 1.0, section 5.3. Tables are little endian, as safetensors is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "F4": 6.0}


def _values(exponent_bits: int, fraction_bits: int, bias: int) -> F32Array:
    """The value of each code of a float with a sign, as if it had neither infinity nor NaN."""
    codes = np.arange(1 << (1 + exponent_bits + fraction_bits))
    exponent = codes >> fraction_bits & (1 << exponent_bits) - 1
    fraction = codes & (1 << fraction_bits) - 1
    whole = np.where(exponent > 0, 1 << fraction_bits, 0) + fraction
    magnitude = np.ldexp(whole.astype(np.float64), np.maximum(exponent, 1) - bias - fraction_bits)
    sign = np.where(codes >> exponent_bits + fraction_bits, -1.0, 1.0)
    values: F32Array = np.copysign(magnitude, sign).astype(np.float32)
    return values


E2M1: F32Array = _values(2, 1, 1)
E2M1.flags.writeable = False


@cache
def table(dtype_name: str) -> F32Array:
    """The values of all 256 codes of an 8-bit float, float32, exact."""
    if dtype_name == "F8_E4M3":
        values = _values(4, 3, 7)
        values[0x7F], values[0xFF] = np.nan, np.copysign(np.nan, -1)
    elif dtype_name == "F8_E5M2":
        values = np.left_shift(np.arange(256, dtype=np.uint16), 8).view(np.float16).astype(np.float32)
    elif dtype_name == "F8_E8M0":
        values = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
    else:
        raise ValueError(f"{dtype_name} is no float of 8 bits with a table here: F8_E4M3, F8_E5M2, F8_E8M0")
    values.flags.writeable = False
    return values


def wide(values: F32Array) -> F32Array:
    """(256, k), the values that a byte holds, as (65536, 2k), those of two bytes, the lower byte's first."""
    pair = np.arange(1 << 16)
    both: F32Array = np.concatenate([values[pair & 0xFF], values[pair >> 8]], axis=1)
    both.flags.writeable = False
    return both


def look_up(codes: U8Array, both: F32Array) -> F32Array:
    """The values of bytes (…, n) by a table that `wide` made: float32 (…, n k), a new array.

    Two bytes a step: 0.2 ns a value for codes of 4 bits and 0.3 for 8, where a table of one byte takes 0.5.
    """
    k = both.shape[1] // 2
    shape = (*codes.shape[:-1], codes.shape[-1] * k)
    codes = np.ascontiguousarray(codes).reshape(-1)
    if codes.size % 2:
        return both[:256, :k][codes].reshape(shape)
    values = np.empty((codes.size // 2, 2 * k), np.float32)
    # "clip" leaves out the check of the indices, which are all in range, and the copy that it would need.
    np.take(both, codes.view(np.uint16), axis=0, out=values, mode="clip")
    return values.reshape(shape)


@cache
def _wide_table(dtype_name: str) -> F32Array:
    return wide(table(dtype_name)[:, None])


def decode_float(codes: U8Array, dtype_name: str) -> F32Array:
    """The values of codes of an 8-bit float, float32, a new array."""
    return look_up(codes, _wide_table(dtype_name))


def encode_float(values: npt.NDArray[Any], dtype_name: str) -> U8Array:
    """The nearest code of each value (float32 or float64), ties to even; past the end the last code, NaN for NaN."""
    if dtype_name not in ("F8_E4M3", "F8_E5M2"):
        raise ValueError(f"{dtype_name} is no float of 8 bits that values are rounded to: F8_E4M3, F8_E5M2")
    return _nearest(values, dtype_name)


def encode_e2m1(values: npt.NDArray[Any]) -> U8Array:
    """The nearest of the 16 codes of e2m1, 0 … 15, ties to even; past the end ±6. NaN is refused."""
    if np.isnan(values).any():
        raise ValueError("a value is NaN, which e2m1 cannot hold")
    return _nearest(values, "F4")


# The bits that `_nearest` cuts off: five of fraction are left, or seven.
_CUT: dict[Any, tuple[Any, int]] = {
    np.dtype(np.float32): (np.uint32, 16),
    np.dtype(np.float64): (np.uint64, 47),
}


def _nearest(values: npt.NDArray[Any], dtype_name: str) -> U8Array:
    """By a table over the upper bits of a float, whose last one says whether anything was cut off below it.

    That is rounding to odd with two bits more of fraction than any of these types has, or more, so that rounding
    once more is correct (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    if values.dtype != np.float64:
        values = values.astype(np.float32, copy=False)
    kind, cut = _CUT[values.dtype]
    bits = np.ascontiguousarray(values).view(kind)
    upper = (bits >> kind(cut)).astype(np.uint32)
    upper |= (bits & kind((1 << cut) - 1)) != 0
    nearest: U8Array = np.take(_codes(dtype_name, values.dtype), upper)
    return nearest


@cache
def _codes(dtype_name: str, dtype: np.dtype[Any]) -> U8Array:
    """The code of every float of `dtype` that has none of the bits which `_nearest` cuts off, by its upper bits."""
    kind, cut = _CUT[dtype]
    every = np.left_shift(np.arange(1 << 8 * dtype.itemsize - cut, dtype=kind), kind(cut)).view(dtype)
    values = E2M1 if dtype_name == "F4" else table(dtype_name)
    sign = len(values) // 2
    ladder = values[:sign][values[:sign] <= LARGEST[dtype_name]].astype(np.float64)
    middle = (ladder[:-1] + ladder[1:]) / 2
    magnitude = np.abs(np.nan_to_num(every, nan=0.0, posinf=np.inf, neginf=-np.inf).astype(np.float64))
    below = np.searchsorted(middle, magnitude, "left")  # at a middle, the code below it
    tie = np.append(middle, np.nan)[below] == magnitude
    codes: U8Array = (below + (tie & (below % 2 == 1)) + np.where(np.signbit(every), sign, 0)).astype(np.uint8)
    codes[np.isnan(every)] = np.where(np.signbit(every[np.isnan(every)]), 0xFF, 0x7F)
    codes.flags.writeable = False
    return codes
