"""AWQ: codes of 4 bits packed along the rows of the weight, a scale and a zero point a group.

gemm      qweight  I32  (in, out / 8)        word j of column k holds rows 8j + 0 2 4 6 1 3 5 7, lowest bits first
          qzeros   I32  (groups, out / 8)    in the same order
          scales   F16 BF16 F32  (groups, out)

gemv      qweight  I32  (out, in / 8)        columns 8j + 0 … 7 in word j of a row
          qzeros   I32  (out, width)         groups 8j + 0 … 7 in word j
          scales   …    (out, 8 · width)     width: words for the groups, up to a multiple of 2 for groups of 64
                                             columns and of 4 for groups of 32; what is left over is 0

    W[n, k] = (q[n, k] − z[n, g]) · s[n, g],  g = k // group_size

The zero point is stored as it is. A symmetric form (`zero_point` false) stores 8.

Sources: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and gemv.py; gptqmodel 7.6.0,
quantization/awq/utils/packing_utils.py (`dequantize_gemm`); auto-round 0.16.1, export/export_to_awq. Lin et al. 2024
for how scales are chosen, of which the file keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from inlay.codecs import packing
from inlay.codecs.packing import Codes, F32Array, Found
from inlay.dtypes import DTYPES, Array, decode32

METHODS = ("awq", "auto-round")
PARTS = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
OPTIONAL: dict[str, str] = {}
CODES = ("I32",)
NAME_SUFFIX = ".weight"
EXTRAS: tuple[str, ...] = ()

Span = tuple[int, int, int]

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AUTO_ROUND = ("auto_round:auto_awq", "auto_round:awq")


def settings(config: Mapping[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> dict[str, Any]:
    """Shape, version and grouping of the weight of this module."""
    version = _version(config, module)
    config = packing.declared(config, module)
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS:
        raise ValueError(f"{module} has {bits!r} bits; AWQ is read with 4")
    packing.check_types(module, found)
    if "qzeros" not in found:
        raise ValueError(f"{module} has no qzeros; save the checkpoint with AutoAWQ or gptqmodel, which store them")
    rows, words = found["qweight"][1]
    shape = [words * 8, rows] if version == "gemm" else [rows, words * 8]
    size = packing.group_size(config, shape[1], module)
    if size and shape[1] % size:
        raise ValueError(f"{module} has {shape[1]} columns, which groups of {size} do not fill")
    declared = config.get("group_size", config.get("q_group_size", 128))
    zero_point = bool(config.get("zero_point", not config.get("sym", False)))
    made = {"shape": shape, "bits": BITS, "group_size": declared, "version": version, "zero_point": zero_point}
    made["scale"] = found["scales"][0]
    packing.check_shapes(module, found, layout(made), f"version {version} and group_size {declared}")
    return made


def _version(config: Mapping[str, Any], module: str) -> str:
    """gemm or gemv."""
    if config.get("quant_method") == "auto-round":
        packed = str(config.get("packing_format", config.get("backend", ""))).lower()
        if packed not in _AUTO_ROUND:
            raise ValueError(
                f"{module}: auto-round's packing_format {packed!r} is none of AWQ ({', '.join(_AUTO_ROUND)})"
            )
        return "gemm"
    if config.get("quant_method") != "awq":
        raise ValueError(f"{module}: quant_method {config.get('quant_method')!r} is not awq")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise ValueError(
            f"{module} is stored in the {version} layout, which is not read; save the checkpoint as gemm with AutoAWQ"
        )
    return version


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of the parts."""
    out, columns = settings["shape"]
    groups = columns // _size(settings)
    if settings["version"] == "gemm":
        shapes = ((columns, out // 8), (groups, out // 8), (groups, out))
    else:
        width = _width(groups, _size(settings))
        shapes = ((out, columns // 8), (out, width), (out, 8 * width))
    types = ("I32", "I32", settings["scale"])
    return {part: (dtype, shape) for part, dtype, shape in zip(PARTS, types, shapes, strict=True)}


def _size(settings: Mapping[str, Any]) -> int:
    return int(settings["shape"][1] if settings["group_size"] == -1 else settings["group_size"])


def _width(groups: int, size: int) -> int:
    """Words for the zero points of a row, in gemv."""
    if size not in (32, 64) and size < 128:
        raise ValueError(f"gemv has groups of 32, 64, or 128 columns and more, not of {size}")
    multiple = {32: 4, 64: 2}.get(size, 1)
    return -(-groups // 8 // multiple) * multiple


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, Span]:
    """gemm: whole words of eight rows, and the scales of these rows; gemv: rows."""
    if settings["version"] == "gemv":
        return dict.fromkeys(PARTS, (0, first, last))
    words = (1, *packing.whole_words(first, last, BITS))
    return {"qweight": words, "qzeros": words, "scales": (1, first, last)}


def align(settings: Mapping[str, Any]) -> int:
    """Rows that share words."""
    return 8 if settings["version"] == "gemm" else 1


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows [first, last)."""
    columns, size = settings["shape"][1], _size(settings)
    zeros, scales = _zeros(parts, settings, first, last), _scales(parts["scales"], settings)
    if settings["version"] == "gemv":
        return packing.dequantise(packing.unpack(parts["qweight"], BITS, columns), zeros, scales, BITS, size)
    return packing.dequantise(_rows(parts["qweight"], first, last), zeros, scales, BITS, size)


def _rows(packed: Array, first: int, last: int) -> Codes:
    """Codes of rows [first, last) from words (columns, words) that begin at a multiple of eight: (rows, columns)."""
    words = packing.transpose(packed)
    codes = np.empty((len(words), 8, words.shape[1]), np.uint8)
    for place, row in enumerate(ORDER):
        codes[:, row] = words >> np.int32(4 * place)
    codes &= np.uint8(15)
    skipped = first % 8
    return codes.reshape(-1, words.shape[1])[skipped : skipped + last - first]


def _zeros(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> Codes:
    """Zero points of these rows, (rows, groups)."""
    if settings["version"] == "gemm":
        return _rows(parts["qzeros"], first, last)
    return packing.unpack(parts["qzeros"], BITS, settings["shape"][1] // _size(settings))


def _scales(raw: Array, settings: Mapping[str, Any]) -> F32Array:
    """Scales of these rows, (rows, groups)."""
    rows = raw.T if settings["version"] == "gemm" else raw[:, : settings["shape"][1] // _size(settings)]
    return np.ascontiguousarray(decode32(np.ascontiguousarray(rows), DTYPES[settings["scale"]]))


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Nearest codes, with the scales and zero points that are known or with new ones of the range of each group."""
    last, size = first + len(weight), _size(settings)
    if "scales" in known and "qzeros" in known:
        kept = {"qzeros": known["qzeros"], "scales": known["scales"]}
    elif "scales" in known or "qzeros" in known:
        raise ValueError("scales and zero points of AWQ are kept together or not at all")
    else:
        kept = _new(weight, settings)
    zeros, scales = _zeros(kept, settings, first, last), _scales(kept["scales"], settings)
    codes = packing.quantise(weight, zeros, scales.astype(np.float64), BITS, size)
    packed = _words(codes) if settings["version"] == "gemm" else packing.pack(codes, BITS)
    return {"qweight": packed, **kept}


def _new(weight: F32Array, settings: Mapping[str, Any]) -> dict[str, Array]:
    """Scales and zero points of the range of each group."""
    low, high = packing.ranges(weight, np.arange(0, weight.shape[1], _size(settings)))
    scales, zeros = packing.fit(low, high, BITS, not settings["zero_point"], 0, settings["scale"])
    if settings["version"] == "gemm":
        return {"qzeros": _words(zeros), "scales": np.ascontiguousarray(scales.T)}
    width = layout(settings)["qzeros"][1][1]
    padded = [np.pad(part, ((0, 0), (0, 8 * width - part.shape[1]))) for part in (zeros, scales)]
    return {"qzeros": packing.pack(padded[0], BITS), "scales": padded[1]}


def _words(codes: Codes) -> Array:
    """The reverse of `_rows`: (rows, columns) -> (columns, rows / 8)."""
    rows = codes.reshape(-1, 8, codes.shape[1])
    words = np.zeros((len(rows), codes.shape[1]), np.uint32)
    for place, row in enumerate(ORDER):
        words |= rows[:, row].astype(np.uint32) << np.uint32(4 * place)
    return packing.transpose(words.view(np.int32))


def fresh(shape: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight in gemm: `group_size`, `zero_point`, and the type of the `scale`."""
    known = {"bits": BITS, "group_size": 128, "zero_point": True, "scale": "F16"}
    made = packing.new_settings(shape, known, options)
    if made["bits"] != BITS:
        raise ValueError(f"bits is {made['bits']!r}; AWQ is written with 4")
    return {**made, "version": "gemm"}


def config(settings: Mapping[str, Any], excluded: list[str]) -> dict[str, Any]:
    """`quantization_config`."""
    return {
        "quant_method": "awq", "bits": BITS, "group_size": settings["group_size"], "version": settings["version"],
        "zero_point": settings["zero_point"], "modules_to_not_convert": excluded or None,
    }  # fmt: skip
