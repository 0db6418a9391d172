"""Stored types: their names in a safetensors header, their sizes, and rounding to them.

Arithmetic happens in float64 (`decode`, `round_nearest`) or, in the kernel, in float32 with a
bound. bfloat16 has no numpy type, so 16-bit floats travel as their bits, uint16.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DType:
    """A stored type. `raw` is the numpy type that holds its bits, for those we compute with."""

    name: str
    bits: int
    kind: str  # "float", "int", "bool", "complex", or "code" for floats of 8 bits and fewer
    raw: str | None = None
    torch: str = ""
    fraction_bits: int = 0
    min_exponent: int = 0
    max_exponent: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.name,)  # one object a type, in worker processes too

    @property
    def mergeable(self) -> bool:
        """Whether a weight of this type can be added to: floats of 16 bits and more."""
        return self.kind == "float"

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements; sub-byte types are packed and must fill whole bytes."""
        if count * self.bits % 8:
            raise ValueError(f"{count} elements of {self.name} do not fill whole bytes")
        return count * self.bits // 8


def named(name: str) -> DType:
    """The type with this name. Raises KeyError for a name that the format does not have."""
    return DTYPES[name]


# The list of the safetensors format, version 0.8 (safetensors/src/tensor.rs, enum Dtype).
DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", 64, "float", "<f8", "float64", 52, -1022, 1023),
        DType("F32", 32, "float", "<f4", "float32", 23, -126, 127),
        DType("BF16", 16, "float", "<u2", "bfloat16", 7, -126, 127),
        DType("F16", 16, "float", "<u2", "float16", 10, -14, 15),
        DType("F8_E4M3", 8, "code", None, "float8_e4m3fn"),
        DType("F8_E5M2", 8, "code", None, "float8_e5m2"),
        DType("F8_E8M0", 8, "code", None, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "code", None, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "code", None, "float8_e5m2fnuz"),
        DType("F6_E3M2", 6, "code"),
        DType("F6_E2M3", 6, "code"),
        DType("F4", 4, "code", None, "float4_e2m1fn_x2"),
        DType("I64", 64, "int", "<i8", "int64"),
        DType("I32", 32, "int", "<i4", "int32"),
        DType("I16", 16, "int", "<i2", "int16"),
        DType("I8", 8, "int", "<i1", "int8"),
        DType("U64", 64, "int", "<u8", "uint64"),
        DType("U32", 32, "int", "<u4", "uint32"),
        DType("U16", 16, "int", "<u2", "uint16"),
        DType("U8", 8, "int", "<u1", "uint8"),
        DType("BOOL", 8, "bool", "<u1", "bool"),
        DType("C64", 64, "complex", None, "complex64"),
    )
}
F64, F32, BF16, F16 = (DTYPES[name] for name in ("F64", "F32", "BF16", "F16"))

# What users write after --torch_dtype, and what config.json holds.
BY_TORCH_NAME: dict[str, DType] = {
    "bfloat16": BF16, "bf16": BF16, "float16": F16, "fp16": F16, "half": F16,
    "float32": F32, "fp32": F32, "float": F32, "float64": F64,
}  # fmt: skip


def decode32(raw: Array, dtype: DType) -> npt.NDArray[np.float32]:
    """Values of stored bits as float32: exact for 16-bit types and float32."""
    if dtype is BF16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype is F16:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return raw.view(np.float16).astype(np.float32)
    return raw.astype(np.float32, copy=False)


def decode(raw: Array, dtype: DType) -> F64Array:
    """Values of stored bits as float64, exactly."""
    if dtype is F64:
        return raw.astype(np.float64, copy=False)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return decode32(raw, dtype).astype(np.float64)


def round_nearest(x: F64Array, dtype: DType) -> Array:
    """Stored bits of `x` rounded once, to nearest with ties to even; beyond the range gives Inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype is F64:
            return x.astype("<f8")
        if dtype is F32:
            return x.astype("<f4")
        if dtype is F16:
            return x.astype(np.float16).view("<u2")
        assert dtype is BF16, f"no rounding to {dtype.name}"
        bits = _round_to_odd(x).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint32(0x7FC0), nearest).astype("<u2")


def _round_to_odd(x: F64Array) -> npt.NDArray[np.float32]:
    """float32 with the last bit set where it is inexact, so that a later rounding is not a second one.

    Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms
    using rounding to odd".
    """
    nearest = x.astype(np.float32)
    bits = nearest.view(np.int32)
    error = x - nearest
    away = (error > 0) == ~np.signbit(nearest)
    adjust = (error != 0) & (bits & 1 == 0) & np.isfinite(nearest)
    stepped = bits + np.where(adjust, np.where(away, 1, -1), 0).astype(np.int32)
    return np.ascontiguousarray(stepped, dtype=np.int32).view(np.float32)


def is_finite(raw: Array, dtype: DType) -> npt.NDArray[np.bool_]:
    """Which elements are neither NaN nor Inf."""
    finite: npt.NDArray[np.bool_]
    if dtype is BF16:
        finite = raw & 0x7F80 != 0x7F80
    elif dtype is F16:
        finite = raw & 0x7C00 != 0x7C00
    else:
        finite = np.isfinite(raw)
    return finite


def round_fraction(x: Fraction, dtype: DType, negative_zero: bool = False) -> float:
    """The nearest value of `dtype` to an exact number, ties to even, as a Python float.

    Overflow gives an infinity, as IEEE 754 has it for rounding to nearest.
    """
    if x == 0:
        return -0.0 if negative_zero else 0.0
    sign = -1 if x < 0 else 1
    x = abs(x)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if x < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, dtype.min_exponent) - dtype.fraction_bits)
    nearest = round(x / step) * step  # Fraction.__round__ takes ties to even
    largest = (2 - Fraction(2) ** -dtype.fraction_bits) * Fraction(2) ** dtype.max_exponent
    if nearest > largest:
        return sign * float("inf")
    return sign * float(nearest) if nearest else sign * 0.0
