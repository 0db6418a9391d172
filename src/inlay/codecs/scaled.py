"""One code a value, int8 or float8, with a grid of scales and perhaps one of zero points.

    weight              I8 or F8_E4M3, (out, in)
    weight_scale        F32, BF16 or F16, of the grid's extent; U8 or F8_E8M0 for MXFP8, 2^(code − 127)
    weight_zero_point   I8 of the same shape, or, packed, I32 with 32/bits rows a word, the code plus 2^(bits−1)
    weight_g_idx        I32, (in): the group of each column, where columns were reordered

w = (q − z)·s, the difference exact, the product rounded once: compressed-tensors 0.17, quantization/lifecycle/
forward_helpers.py (_dequantize), which rounds it once to the type of the scale. New scales are those of
quantization/utils/helpers.py (calculate_qparams), computed in float32.

`settings` here hold: shape, cell, codes, weights (the arguments: num_bits, type, symmetric, strategy), scale and
zero_point ([dtype, shape] or None), g_idx (dtype or None) and ordered (whether it says anything).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import grids
from inlay.codecs.floats import LARGEST, decode_float, encode_float, table
from inlay.codecs.scaled_form import EPS, EXPONENTS, rows_a_word
from inlay.dtypes import DTYPES, Array, decode32, round_nearest

F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows [first, last)."""
    codes = parts["weight"]
    values = codes.astype(np.float32) if settings["codes"] == "I8" else decode_float(codes, settings["codes"])
    rescale(values, parts, settings, first, last)
    return values


def rescale(values: F32Array, parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> None:
    """`values` of codes, (q − z)·s in place."""
    columns = parts["weight_g_idx"] if settings["ordered"] else None
    zeros = zero_points(parts, settings, first, last)
    if zeros is not None:
        grids.apply(np.subtract, values, zeros, settings["cell"], first, columns)
    scales = scale_values(parts["weight_scale"], settings)
    grids.apply(np.multiply, values, scales, settings["cell"], first, columns)


def scale_values(raw: Array, settings: Mapping[str, Any]) -> F32Array:
    """A grid of scales, (bands, columns)."""
    dtype, columns = settings["scale"][0], grids.extent(settings["shape"], settings["cell"])[1]
    values = table("F8_E8M0")[raw] if dtype in EXPONENTS else decode32(raw, DTYPES[dtype])
    return np.ascontiguousarray(values).reshape(-1, columns)


def zero_points(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array | None:
    """A grid of zero points, (bands, columns), or None where there are none."""
    if "weight_zero_point" not in parts:
        return None
    raw, bits = parts["weight_zero_point"], settings["weights"]["num_bits"]
    if raw.dtype != np.int32:
        zeros: F32Array = raw.astype(np.float32).reshape(-1, grids.extent(settings["shape"], settings["cell"])[1])
        return zeros
    begin, end = grids.band(settings["cell"], first, last)
    words = raw[:, None, :] >> np.arange(0, 32, bits, dtype=np.int32)[:, None] & (1 << bits) - 1
    skipped = begin % rows_a_word(settings)
    codes = words.reshape(-1, raw.shape[1])[skipped : skipped + end - begin]
    unpacked: F32Array = (codes - (1 << bits - 1)).astype(np.float32)
    return unpacked


def measure(weight: F32Array, settings: Mapping[str, Any]) -> F32Array:
    """[greatest, −least] value, 0 among them, for a scale of the whole tensor; empty where each band has its own."""
    if grids.extent(settings["shape"], settings["cell"]) != (1, 1):
        return np.zeros(0, np.float32)
    return np.array([np.max(weight, initial=0), -np.min(weight, initial=0)], np.float32)


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Codes of rows that begin at `first`, and their scales."""
    quotients, parts = quantise(weight, settings, first, known)
    if settings["codes"] != "I8":
        return {"weight": encode_float(quotients, settings["codes"]), **parts}
    return {"weight": integers(quotients, settings), **parts}


def integers(quotients: F64Array, settings: Mapping[str, Any]) -> npt.NDArray[np.int8]:
    """The nearest integers in range, ties to even."""
    half = 1 << settings["weights"]["num_bits"] - 1
    np.rint(quotients, out=quotients)
    np.clip(quotients, -half, half - 1, out=quotients)
    return quotients.astype(np.int8)


def quantise(
    weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]
) -> tuple[F64Array, dict[str, Array]]:
    """w/s + z of each value, in float64 so that a rounding of it finds the nearest code, and the parts beside codes."""
    grids.require_finite(weight, first)
    if settings["g_idx"] and "weight_g_idx" not in known:
        raise ValueError("the columns of this weight are in groups by weight_g_idx, which must be kept")
    columns = known["weight_g_idx"] if settings["ordered"] else None
    parts = _scales(weight, settings, known, columns)
    if "weight_g_idx" in known:
        parts["weight_g_idx"] = known["weight_g_idx"]
    scales = scale_values(parts["weight_scale"], settings).astype(np.float64)
    scales[scales == 0] = np.inf  # any code gives 0; this one is that of 0
    quotients = weight.astype(np.float64)
    grids.apply(np.divide, quotients, scales, settings["cell"], first, columns)
    zeros = zero_points(parts, settings, first, first + len(weight))
    if zeros is not None:
        grids.apply(np.add, quotients, zeros.astype(np.float64), settings["cell"], first, columns)
    return quotients, parts


def _scales(
    weight: F32Array, settings: Mapping[str, Any], known: Mapping[str, Array], columns: Array | None
) -> dict[str, Array]:
    """The scales and zero points that are known, or new ones."""
    kept = {part: known[part] for part in ("weight_scale", "weight_zero_point") if part in known}
    wanted = 2 if settings["zero_point"] else 1
    if len(kept) == wanted:
        return kept
    if kept:
        raise ValueError(f"{', '.join(kept)} is to be kept without its companion; keep both or neither")
    if known.get("measured") is not None and len(known["measured"]):
        high, low = known["measured"][:1, None], -known["measured"][1:, None]
    else:
        together = weight if columns is None else np.take(weight, np.argsort(columns, kind="stable"), axis=1)
        low, high = grids.extremes(together, settings["cell"])
    scales, raw = _new_scales(low, high, settings)
    parts = {"weight_scale": _shaped(raw, settings["scale"][1])}
    if settings["zero_point"]:
        half = 1 << settings["weights"]["num_bits"] - 1
        zeros = np.zeros_like(low)
        if not settings["weights"]["symmetric"]:
            zeros = np.clip(np.rint(-half - low / scales), -half, half - 1)
        parts["weight_zero_point"] = _stored_zeros(zeros.astype(np.int32), settings)
    return parts


def _shaped(grid: Array, whole: list[int]) -> Array:
    """A grid of these bands in the shape that the part is stored in."""
    return grid.reshape((len(grid), *whole[1:]) if whole else ())


def _new_scales(low: F32Array, high: F32Array, settings: Mapping[str, Any]) -> tuple[F32Array, Array]:
    """Scales as values and as stored: the range of a cell over that of the codes."""
    weights, dtype = settings["weights"], settings["scale"][0]
    largest = np.maximum(high, np.abs(low))
    if dtype in EXPONENTS:
        raw: Array = exponents(largest, LARGEST["F8_E4M3"])
        return table("F8_E8M0")[raw], raw
    steps = np.float32(2 * LARGEST["F8_E4M3"] if weights["type"] == "float" else (1 << weights["num_bits"]) - 1)
    scales = largest / (steps / 2) if weights["symmetric"] else (high - low) / steps
    raw = round_nearest(scales.astype(np.float64), DTYPES[dtype])
    stored = decode32(raw, DTYPES[dtype])
    if not np.isfinite(stored).all():
        raise ValueError(f"a scale of {scales.max():.3g} is beyond {dtype}, in which the checkpoint stores scales")
    stored = np.where(stored == 0, np.float32(EPS[dtype]), stored)
    return stored, round_nearest(stored.astype(np.float64), DTYPES[dtype])


def exponents(largest: F32Array, last: float) -> npt.NDArray[np.uint8]:
    """Codes of powers of two that take `largest` to below 1¾ of the greatest power in the format whose end is `last`.

    generate_mx_scales in compressed-tensors 0.17, quantization/utils/mxfp_utils.py.
    """
    power = (np.ascontiguousarray(largest, np.float32).view(np.int32) + 0x200000) >> 23
    codes: npt.NDArray[np.uint8] = np.maximum(power - int(np.log2(last)), 0).astype(np.uint8)
    return codes


def _stored_zeros(zeros: npt.NDArray[np.int32], settings: Mapping[str, Any]) -> Array:
    """A grid of zero points as it is stored; the rows that fill the last word are 0 bits."""
    if settings["zero_point"][0] != "I32":
        return _shaped(zeros.astype(np.int8), settings["zero_point"][1])
    bits, rows = settings["weights"]["num_bits"], rows_a_word(settings)
    codes = np.zeros((-(-len(zeros) // rows) * rows, zeros.shape[1]), np.uint32)
    codes[: len(zeros)] = zeros + (1 << bits - 1)
    words = codes.reshape(-1, rows, zeros.shape[1]) << np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    packed: Array = np.bitwise_or.reduce(words, axis=1).view(np.int32)
    return packed
