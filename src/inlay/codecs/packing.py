"""Codes of 2, 3, 4 and 8 bits in 32-bit words, and groups of columns that share a scale and a zero point.

Word      31 … 0        code i of a row is bits [i·b, (i + 1)·b) of its words put end to end, so the
          … c2 c1 c0    codes of 3 bits cross words: number 10 has two bits in word 0 and one in word 1

    weight = (code − zero) · scale        zero and scale of the column's group, one of each for every row

What GPTQ and AWQ share is here: both store words of int32, little-endian, and group the columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import DTYPES, Array, F64Array, decode, round_nearest

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]
F32Array = npt.NDArray[np.float32]

# From a chunk of the stream (bytes, numpy type) to one byte a code: x = (x | x << shift) & mask, step by step.
_CHUNK: dict[int, tuple[int, Any]] = {2: (1, np.uint32), 3: (3, np.uint64), 4: (1, np.uint16), 8: (1, np.uint8)}
_SPREAD: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((12, 0x000F000F), (6, 0x03030303)),
    3: ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707)),
    4: ((4, 0x0F0F),),
    8: (),
}
BITS = tuple(_CHUNK)
SCALES = ("F16", "BF16", "F32")
NOT_FINITE = "the weight has NaN or Inf, which a code cannot hold; check the adapter and the base"
Found = Mapping[str, tuple[str, tuple[int, ...]]]


def unit(bits: int) -> int:
    """The fewest codes that fill whole words."""
    return 32 if bits == 3 else 32 // bits


def words(codes: int, bits: int) -> int:
    """Words that hold this many codes."""
    return -(-codes * bits // 32)


def whole_words(first: int, last: int, bits: int) -> tuple[int, int]:
    """The words of codes [first, last), from the start of a unit on."""
    return first // unit(bits) * unit(bits) * bits // 32, words(last, bits)


def unpack(packed: Words, bits: int, count: int) -> Codes:
    """The first `count` codes of each row: (rows, words) -> (rows, count)."""
    if bits == 3 and packed.shape[1] % 3:
        packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 3)))
    size, wide = _CHUNK[bits]
    raw = np.ascontiguousarray(packed).view(np.uint8)
    spread = raw.astype(wide) if size == 1 else _three_bytes(raw)
    for shift, mask in _SPREAD[bits]:
        spread |= spread << wide(shift)
        spread &= wide(mask)
    return spread.view(np.uint8)[:, :count]


def _three_bytes(raw: Codes) -> npt.NDArray[np.uint64]:
    """Each three bytes as a number."""
    number = raw[:, 2::3].astype(np.uint64)
    for byte in (1, 0):
        number <<= np.uint64(8)
        number |= raw[:, byte::3]
    return number


def pack(codes: Codes, bits: int) -> Words:
    """The reverse of `unpack`, with zeros in what the codes leave of the last word."""
    rows, count = codes.shape
    size, wide = _CHUNK[bits]
    padded = np.zeros((rows, -(-count // unit(bits)) * unit(bits)), np.uint8)
    padded[:, :count] = codes
    spread = padded.view(wide)
    steps = _SPREAD[bits]
    for i, (shift, _) in reversed(list(enumerate(steps))):
        spread |= spread >> wide(shift)
        spread &= wide(steps[i - 1][1] if i else (1 << 8 * size) - 1)
    raw = spread.astype(np.uint8) if size == 1 else _bytes_of_three(spread)
    return np.ascontiguousarray(raw.view(np.int32)[:, : words(count, bits)])


def _bytes_of_three(number: npt.NDArray[np.uint64]) -> Codes:
    raw = np.empty((len(number), number.shape[1], 3), np.uint8)
    for byte in range(3):
        raw[:, :, byte] = number >> np.uint64(8 * byte) & np.uint64(0xFF)
    return raw.reshape(len(number), -1)


def transpose(packed: Words) -> Words:
    """A transposed copy, in strips of a cache line: three times as fast as numpy's own."""
    turned = np.empty(packed.shape[::-1], packed.dtype)
    for i in range(0, len(packed), 16):
        turned[:, i : i + 16] = packed[i : i + 16].T
    return turned


def by_group(operation: Callable[..., Any], values: Array, numbers: Array, size: int) -> None:
    """`operation` in place on values (rows, columns) with a number for each group of `size` columns, (rows, groups)."""
    if size == 1:
        operation(values, numbers, out=values)
        return
    full = values.shape[1] // size
    if full:
        grouped = values[:, : full * size].reshape(len(values), full, size)
        operation(grouped, numbers[:, :full, None], out=grouped)
    if full * size < values.shape[1]:
        rest = values[:, full * size :]
        operation(rest, numbers[:, full : full + 1], out=rest)


def dequantise(codes: Codes, zeros: Codes, scales: F32Array, bits: int, size: int) -> F32Array:
    """(code − zero) · scale: an exact difference and one rounding. Codes (rows, columns), the others (rows, groups)."""
    if bits < 8:  # the difference fits a byte
        by_group(np.subtract, codes.view(np.int8), zeros.view(np.int8), size)
        values = codes.view(np.int8).astype(np.float32)
    else:
        values = codes.astype(np.float32)
        by_group(np.subtract, values, zeros.astype(np.float32), size)
    with np.errstate(over="ignore", invalid="ignore"):  # scales that are not finite show in the values
        by_group(np.multiply, values, scales, size)
    return values


def quantise(weight: F32Array, zeros: Codes, scales: F64Array, bits: int, size: int) -> Codes:
    """The nearest codes. float64, in which no quotient of two float32 is rounded across a half.

    A group whose scale is 0 decodes to 0 whatever its codes, and gets those of its zero point.
    """
    if not np.isfinite(weight).all():
        raise ValueError(NOT_FINITE)
    if not np.isfinite(scales).all():
        raise ValueError("a stored scale is NaN or Inf, so there is no nearest code; the checkpoint is damaged")
    codes = weight.astype(np.float64)
    by_group(np.divide, codes, np.where(scales == 0, np.inf, scales), size)
    np.rint(codes, out=codes)
    by_group(np.add, codes, zeros.astype(np.float64), size)
    np.clip(codes, 0, 2**bits - 1, out=codes)
    return codes.astype(np.uint8)


def ranges(weight: F32Array, starts: Array) -> tuple[F64Array, F64Array]:
    """Least and largest value of each group, 0 among them; [-1, 1] for a group of zeros, as AutoGPTQ has it.

    Groups are runs of columns that begin at `starts`.
    """
    low = np.minimum(np.minimum.reduceat(weight, starts, axis=1), 0).astype(np.float64)
    high = np.maximum(np.maximum.reduceat(weight, starts, axis=1), 0).astype(np.float64)
    if not np.isfinite(high - low).all():
        raise ValueError(NOT_FINITE)
    empty = (low == 0) & (high == 0)
    return np.where(empty, -1.0, low), np.where(empty, 1.0, high)


def fit(low: F64Array, high: F64Array, bits: int, sym: bool, least: int, dtype: str) -> tuple[Array, Codes]:
    """Stored scales and zero points for these ranges, of which `least` is the smallest zero point that can be stored.

    Symmetric: scale = 2 · max|w| / (2^b − 1), zero = 2^(b−1). Otherwise: scale = (high − low) / (2^b − 1),
    zero = −low / scale to the nearest. The scale is rounded up, so that no value lies more than half a step
    outside of the codes.
    """
    top = 2**bits - 1
    if sym:
        scales = store_up(np.maximum(-low, high) * 2 / top, dtype)
        return scales, np.full(low.shape, 2 ** (bits - 1), np.uint8)
    scales = store_up((high - low) / top, dtype)
    zeros = np.rint(-low / stored(scales, dtype))
    if least:
        above = zeros < least  # `least` leaves fewer steps above it
        scales = np.where(above, np.maximum(scales, store_up(high / (top - least), dtype)), scales)
        zeros = np.where(above, least, zeros)
    return scales, np.clip(zeros, 0, top).astype(np.uint8)


def stored(raw: Array, dtype: str) -> F64Array:
    """Values of stored scales."""
    return decode(raw, DTYPES[dtype])


def store_up(exact: F64Array, dtype: str) -> Array:
    """Stored bits of the least value not below `exact`, which is positive."""
    raw = round_nearest(exact, DTYPES[dtype])
    value = stored(raw, dtype)
    if not np.isfinite(value).all():
        raise ValueError(f"a scale of {exact.max():g} is beyond {dtype}; store the scales in BF16 or F32")
    bits = raw.view(np.uint32 if dtype == "F32" else np.uint16)
    return np.asarray((bits + (value < exact)).astype(bits.dtype).view(raw.dtype))


def declared(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config with what it declares for this module: `dynamic` of gptqmodel, `extra_config` of auto-round."""
    for pattern, fields in (config.get("dynamic") or {}).items():
        if _matches(pattern.removeprefix("+:").removeprefix("-:"), module, re.match):
            if pattern.startswith("-:"):
                raise ValueError(f"{module} is quantised, but the config excludes it by {pattern!r} in dynamic")
            config = {**config, **fields}
            break
    extra = config.get("extra_config") or {}
    if module in extra:
        return {**config, **extra[module]}
    for pattern, fields in extra.items():
        if _matches(pattern, module, re.search):
            return {**config, **fields}
    return config


def _matches(pattern: str, module: str, how: Callable[[str, str], Any]) -> bool:
    try:
        return how(pattern, module) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} in quantization_config is no pattern: {error}") from error


def group_size(config: Mapping[str, Any], columns: int, module: str) -> int:
    """Columns of a group; −1 declares one group of all."""
    size = config.get("group_size", config.get("q_group_size", 128))
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise ValueError(f"group_size of {module} is {size!r}: neither −1 nor a count of columns")
    return columns if size == -1 else size


def check_types(module: str, found: Found) -> None:
    """ValueError where a part is of another type than these forms have, or no matrix."""
    for part, (dtype, shape) in found.items():
        allowed = SCALES if part == "scales" else ("I32",)
        if dtype not in allowed:
            raise ValueError(f"{part} of {module} is {dtype}, not {' or '.join(allowed)}")
        if len(shape) != (1 if part == "g_idx" else 2) or 0 in shape:
            raise ValueError(f"{part} of {module} has shape {list(shape)}; weights of two axes are read, none empty")


def check_shapes(module: str, found: Found, wanted: Found, declared: str) -> None:
    """ValueError where a part has another shape than the config and the codes ask for."""
    for part, (_, shape) in wanted.items():
        if tuple(found[part][1]) != shape:
            raise ValueError(
                f"{part} of {module} has shape {list(found[part][1])}; {declared}, as the config declares them, "
                f"ask for {list(shape)}"
            )


def new_settings(shape: tuple[int, ...], known: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`known` with the given options, and the shape, for a weight that fills words of 32 codes and whole groups."""
    unknown = options.keys() - known.keys()
    if unknown:
        raise ValueError(f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    made = {**known, **options}
    if made["bits"] not in BITS:
        raise ValueError(f"bits is {made['bits']!r}; codes have {', '.join(map(str, BITS))}")
    if made["scale"] not in SCALES:
        raise ValueError(f"scale is {made['scale']!r}; scales are stored in {', '.join(SCALES)}")
    if len(shape) != 2:
        raise ValueError(f"a weight of shape {list(shape)} is no matrix")
    size = group_size(made, shape[1], "the new weight")
    if shape[0] % 32 or shape[1] % 32 or shape[1] % size or not shape[1]:
        raise ValueError(
            f"a weight of shape {list(shape)} does not fill words of 32 codes and groups of {size} columns"
        )
    return {**made, "shape": list(shape)}
