"""MXFP4: experts of gpt-oss, 4-bit floats in groups of 32 with an exponent each.

    X_blocks   U8 (experts, out, groups, 16)   codes of e2m1, two a byte, the low nibble first, along `in`
    X_scales   U8 (experts, out, groups)       exponents, biased by 127 (F8_E8M0; 255 is NaN)

W[e, i, o] = e2m1(code of i in X_blocks[e, o]) · 2^(X_scales[e, o, i // 32] − 127)

X is the key of the weight itself, `…mlp.experts.gate_up_proj` or `…down_proj`. As transformers holds it, and writes it
where it is dequantised, it is (experts, in, out): transposed against what is stored. Its matrix has rows
(expert, in). Sources: Open Compute Project, "OCP Microscaling Formats (MX) Specification" 1.0, sections 5.3 and 6.3;
transformers 5.23 integrations/mxfp4.py `convert_moe_packed_tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import compiled
from inlay.codecs.floats import E2M1, encode_e2m1, table
from inlay.codecs.fp8 import look_up, paired
from inlay.dtypes import Array

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]
Found = Mapping[str, tuple[str, tuple[int, ...]]]

METHODS = ("mxfp4",)
PARTS = {"blocks": "_blocks", "scales": "_scales"}
OPTIONAL: dict[str, str] = {}
NAME_SUFFIX = ""
CODES = ("U8",)
EXTRAS: tuple[str, ...] = ()

GROUP = 32
BIAS = 127


def settings(config: Mapping[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> dict[str, Any]:
    """The shape, (experts, in, out)."""
    if missing := [part for part in PARTS if part not in found]:
        raise ValueError(f"{module} has no {module}{PARTS[missing[0]]}, and MXFP4 needs both blocks and scales")
    (blocks_dtype, blocks), (scales_dtype, scales) = found["blocks"], found["scales"]
    if blocks_dtype != "U8" or scales_dtype != "U8":
        raise ValueError(f"{module} has blocks of {blocks_dtype} and scales of {scales_dtype}; MXFP4 has U8 for both")
    if len(blocks) != 4 or blocks[-1] != GROUP // 2 or 0 in blocks:
        raise ValueError(f"blocks of {module} are {list(blocks)}; MXFP4 has (experts, out, groups, {GROUP // 2})")
    if scales != blocks[:-1]:
        raise ValueError(f"scales of {module} are {list(scales)} for blocks {list(blocks)}: not one a group")
    experts, out, groups, _ = blocks
    return {"shape": [experts, groups * GROUP, out]}


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Blocks and scales."""
    experts, columns, out = settings["shape"]
    groups = columns // GROUP
    return {"blocks": ("U8", (experts, out, groups, GROUP // 2)), "scales": ("U8", (experts, out, groups))}


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, tuple[int, int, int] | None]:
    """Whole experts: a row of the weight runs through all rows of what is stored."""
    rows = settings["shape"][1]
    experts = (0, first // rows, -(-last // rows))
    return {"blocks": experts, "scales": experts}


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows of (experts · in, out) in float32, exact up to 2^128."""
    rows, begin = settings["shape"][1], first // settings["shape"][1]
    pieces = []
    for expert in range(begin, -(-last // rows)):
        start, stop = max(first - expert * rows, 0), min(last - expert * rows, rows)
        groups = slice(start // GROUP, -(-stop // GROUP))
        stored = parts["blocks"][expert - begin, :, groups], parts["scales"][expert - begin, :, groups]
        pieces.append(_decode_groups(*stored)[start - groups.start * GROUP : stop - groups.start * GROUP])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def by_kernel(settings: Mapping[str, Any]) -> bool:
    """Always."""
    return True


def decode_into(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int, out: F32Array) -> None:
    """The same by the compiled kernel."""
    rows, begin = settings["shape"][1], first // settings["shape"][1]
    for expert in range(begin, -(-last // rows)):
        start, stop = max(first, expert * rows), min(last, (expert + 1) * rows)
        stored = parts["blocks"][expert - begin], parts["scales"][expert - begin]
        compiled.mxfp4(*stored, start - expert * rows, stop - expert * rows, out[start - first : stop - first])


def _decode_groups(blocks: U8Array, scales: U8Array) -> F32Array:
    """Rows (groups · 32, out) from blocks (out, groups, 16) and scales (out, groups).

    Bytes are transposed before they are looked up, at an eighth of the size of what comes of them, and in two steps
    of which each stays in cache. The low nibbles of a row of bytes are an even row of values, the high ones the next.
    """
    out, groups, half = blocks.shape
    packed = np.ascontiguousarray(np.ascontiguousarray(blocks.transpose(1, 0, 2)).transpose(0, 2, 1))
    scale = table("F8_E8M0")[np.ascontiguousarray(scales.T)][:, None, :]
    values = np.empty((groups, half, 2, out), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for odd, nibble in enumerate(_nibbles()):
            np.multiply(look_up(packed, *nibble), scale, out=values[:, :, odd])
    return values.reshape(groups * GROUP, out)


@cache
def _nibbles() -> list[tuple[F32Array, npt.NDArray[np.uint64]]]:
    """Tables of the value of each byte's low nibble, and of its high one."""
    byte = np.arange(256)
    return [(values, paired(values)) for values in (E2M1[byte & 15], E2M1[byte >> 4])]


def align(settings: Mapping[str, Any]) -> int:
    """The rows of an expert."""
    return int(settings["shape"][1])


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Whole experts. A new exponent is that of the largest magnitude of its group, less 2 (specification, 6.3).

    So the largest value is between 4 and 8 in units of the scale, and what is beyond 6 becomes 6: it errs by less
    than a quarter of itself, all others by at most half a step. A group of zeros has the exponent 0.
    """
    if not np.isfinite(weight).all():
        raise ValueError("a value is not finite, which MXFP4 cannot hold")
    _, rows, out = settings["shape"]
    groups = weight.reshape(-1, rows // GROUP, GROUP, out)
    if "scales" in known:
        scales = known["scales"]
    else:
        scales = np.ascontiguousarray(_new_scales(np.abs(groups).max(axis=2)).transpose(0, 2, 1))
    unit = table("F8_E8M0")[scales.transpose(0, 2, 1)][:, :, None, :]
    with np.errstate(over="ignore", under="ignore"):
        codes = encode_e2m1(groups / unit)
    packed = np.ascontiguousarray((codes[:, :, 0::2] | codes[:, :, 1::2] << 4).transpose(0, 1, 3, 2))
    return {"blocks": np.ascontiguousarray(packed.transpose(0, 2, 1, 3)), "scales": scales}


def _new_scales(largest: F32Array) -> U8Array:
    _, exponent = np.frexp(largest)  # of a magnitude in [½, 1) · 2^exponent
    return np.where(largest > 0, np.clip(exponent - 3 + BIAS, 0, 254), BIAS).astype(np.uint8)


def fresh(shape: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """New experts, (experts, in, out) with `in` a multiple of 32. There is nothing to choose."""
    if options:
        raise ValueError(f"MXFP4 has no option {', '.join(sorted(options))}; it has none")
    if len(shape) != 3 or 0 in shape or shape[1] % GROUP:
        raise ValueError(f"a weight {list(shape)} cannot be MXFP4: it is (experts, in, out), in a multiple of {GROUP}")
    return {"shape": list(shape)}


def config(settings: Mapping[str, Any], excluded: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` as transformers 5.23 writes it."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(excluded)}
