"""GPTQ: codes of 2, 3, 4 or 8 bits packed along the columns, a scale and a zero point a group.

    qweight   I32  (⌈in · b / 32⌉, out)       column j of it holds the codes of row j of the weight (`packing`)
    qzeros    I32  (groups, ⌈out · b / 32⌉)   zero points, packed along the rows of the weight
    scales    F16 BF16 F32  (groups, out)
    g_idx     I32  (in,)                       the group of each column; absent: column // group_size

    W[n, k] = (q[k, n] − z[g, n]) · s[g, n],  g = g_idx[k]

`checkpoint_format` gptq_v2 stores z. gptq (v1) stores (z − 1) mod 2^b, in one of two ways that differ where z is 0:

    field   each code by itself, z = (stored + 1) mod 2^b: AutoGPTQ, auto-round, and gptqmodel with 3 bits
    word    0x11111111 (4 bits) taken from the whole word, so that a zero point of 0 borrows from its neighbour:
            gptqmodel with 2, 4 and 8 bits, which adds it again to read

Sources: gptqmodel 7.6.0, nn_modules/qlinear/__init__.py (`pack_original`, `dequantize_weight`) and utils/model.py
(`convert_gptq_v2_to_v1_format_module`); auto-round 0.16.1, inference/backend.py (`GPTQ_FORMAT`, zeros of v1, and
`GPTQ_FORMAT_NO_ZP`, of v2). Frantar et al. 2023 for how codes are chosen, of which the file keeps nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import compiled, packing
from inlay.codecs.packing import Codes, F32Array, Found
from inlay.dtypes import DTYPES, Array, F64Array, decode32

METHODS = ("gptq", "auto-round")
PARTS = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
OPTIONAL = {"g_idx": ".g_idx"}
CODES = ("I32",)
NAME_SUFFIX = ".weight"
EXTRAS: tuple[str, ...] = ()

Span = tuple[int, int, int] | None

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_AUTO_ROUND = {"auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2",
               "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq"}  # fmt: skip


def settings(config: Mapping[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> dict[str, Any]:
    """Shape, packing and grouping of the weight of this module."""
    stored_as = _format(config, module)
    config = packing.declared(config, module)
    bits, sym = config.get("bits", 4), bool(config.get("sym", True))
    if bits not in packing.BITS:
        raise ValueError(f"{module} has {bits!r} bits; GPTQ is read with 2, 3, 4 and 8 (5 to 7 are gptq_p, planar)")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise ValueError(f"{module} is packed in {config['pack_dtype']}; only int32 is read")
    packing.check_types(module, found)
    if config.get("desc_act") and "g_idx" not in found:
        raise ValueError(f"{module} has no g_idx, but desc_act says that its columns are in an order of their own")
    (rows, out), groups = found["qweight"][1], found["scales"][1][0]
    columns = found["g_idx"][1][0] if "g_idx" in found else rows * 32 // bits
    size = packing.group_size(config, columns, module)
    made: dict[str, Any] = {"shape": [out, columns], "bits": bits, "group_size": config.get("group_size", 128)}
    made |= {"sym": sym, "desc_act": bool(config.get("desc_act", False)), "scale": found["scales"][0]}
    made |= {"zeros": "plain", "order": "none", "format": stored_as}
    if "g_idx" in found:
        made["order"] = _order(read("g_idx"), size, groups, module)
    packing.check_shapes(module, found, layout(made), f"{bits} bits and group_size {made['group_size']}")
    if stored_as == "gptq":
        made["zeros"] = _zeros_of_v1(config, made, read)
    return made


def _format(config: Mapping[str, Any], module: str) -> str:
    """gptq or gptq_v2."""
    if config.get("quant_method") == "auto-round":
        packed = str(config.get("packing_format", config.get("backend", "auto_round:gptq"))).lower()
        if packed not in _AUTO_ROUND:
            raise ValueError(
                f"{module}: auto-round's packing_format {packed!r} is none of GPTQ ({', '.join(_AUTO_ROUND)})"
            )
        return _AUTO_ROUND[packed]
    if config.get("quant_method") != "gptq":
        raise ValueError(f"{module}: quant_method {config.get('quant_method')!r} is not gptq")
    stored_as = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        stored_as = "marlin"
    if stored_as not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{module} is stored in the {stored_as} layout, which is not read; "
            "save the checkpoint as gptq or gptq_v2 with gptqmodel"
        )
    return stored_as


def _order(index: Array, size: int, groups: int, module: str) -> str:
    """Whether groups are runs of columns ("regular") or as `g_idx` says ("given")."""
    if index.size and not 0 <= index.min() <= index.max() < groups:
        raise ValueError(f"g_idx of {module} names groups {index.min()} to {index.max()}, of {groups} in scales")
    return "regular" if np.array_equal(index, np.arange(len(index)) // size) else "given"


def _zeros_of_v1(config: Mapping[str, Any], made: Mapping[str, Any], read: Callable[[str], Array]) -> str:
    """How v1 stores them, or "plain" where all are those of a symmetric form as v2 stores it.

    Some checkpoints say gptq and store 2^(b−1): Marlin, which takes the zero point of a symmetric form for granted,
    serves them all the same (vllm-project/vllm#38966).
    """
    bits, out = made["bits"], made["shape"][0]
    if made["sym"]:
        codes = packing.unpack(read("qzeros"), bits, out)
        if codes.size and (codes == 2 ** (bits - 1)).all():
            return "plain"
    makers = (config.get("meta") or {}).get("quantizer") or []
    makers = [makers] if isinstance(makers, str) else makers
    return "word" if bits in _ONES and any(str(m).startswith("gptqmodel") for m in makers) else "field"


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of the parts."""
    (out, columns), bits = settings["shape"], settings["bits"]
    groups = -(-columns // _size(settings))
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "qweight": ("I32", (packing.words(columns, bits), out)),
        "qzeros": ("I32", (groups, packing.words(out, bits))),
        "scales": (settings["scale"], (groups, out)),
    }
    return parts if settings["order"] == "none" else {**parts, "g_idx": ("I32", (columns,))}


def _size(settings: Mapping[str, Any]) -> int:
    return int(settings["shape"][1] if settings["group_size"] == -1 else settings["group_size"])


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, Span]:
    """Columns of the words and scales of these rows, and the words with their zero points."""
    needed: dict[str, Span] = {"qweight": (1, first, last), "scales": (1, first, last)}
    needed["qzeros"] = (1, *packing.whole_words(first, last, settings["bits"]))
    return needed if settings["order"] == "none" else {**needed, "g_idx": None}


def align(settings: Mapping[str, Any]) -> int:
    """Rows whose zero points fill whole words."""
    return packing.unit(settings["bits"])


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows [first, last)."""
    bits, columns = settings["bits"], settings["shape"][1]
    codes = packing.unpack(packing.transpose(parts["qweight"]), bits, columns)
    zeros = _zeros(parts["qzeros"], settings, first, last)
    scales = np.ascontiguousarray(decode32(parts["scales"], DTYPES[settings["scale"]]).T)
    if settings["order"] != "given":
        return packing.dequantise(codes, zeros, scales, bits, _size(settings))
    index = parts["g_idx"]
    return packing.dequantise(codes, zeros.take(index, 1), scales.take(index, 1), bits, 1)


def by_kernel(settings: Mapping[str, Any]) -> bool:
    """4 bits, and groups that are runs of columns."""
    return bool(settings["bits"] == 4 and settings["order"] != "given")


def decode_into(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int, out: F32Array) -> None:
    """The same by the compiled kernel."""
    zeros = _zeros(parts["qzeros"], settings, first, last)
    scales = np.ascontiguousarray(decode32(parts["scales"], DTYPES[settings["scale"]]).T)
    compiled.words(parts["qweight"], zeros, scales, _size(settings), out)


def _zeros(packed: Array, settings: Mapping[str, Any], first: int, last: int) -> Codes:
    """Zero points of these rows, (rows, groups)."""
    bits = settings["bits"]
    skipped = first % packing.unit(bits)
    if settings["zeros"] == "word":
        packed = (packed.view(np.uint32) + np.uint32(_ONES[bits])).view(np.int32)
    zeros = packing.unpack(packed, bits, skipped + last - first)[:, skipped:]
    if settings["zeros"] == "field":
        zeros = zeros + np.uint8(1) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(zeros.T)


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Nearest codes, with the scales and zero points that are known or with new ones of the range of each group."""
    bits, last = settings["bits"], first + len(weight)
    index = _index(settings, known)
    if "scales" in known and "qzeros" in known:
        raw, packed = known["scales"], known["qzeros"]
        zeros = _zeros(packed, settings, first, last)
    elif "scales" in known or "qzeros" in known:
        raise ValueError("scales and zero points of GPTQ are kept together or not at all")
    else:
        low, high = _ranges(weight, settings, index)
        least = int(settings["zeros"] != "plain")  # 0 is what v1 stores in two ways
        scales, zeros = packing.fit(low, high, bits, settings["sym"], least, settings["scale"])
        raw, packed = np.ascontiguousarray(scales.T), _packed_zeros(zeros, settings)
    values = packing.stored(np.ascontiguousarray(raw.T), settings["scale"])
    if settings["order"] == "given":
        codes = packing.quantise(weight, zeros.take(index, 1), values.take(index, 1), bits, 1)
    else:
        codes = packing.quantise(weight, zeros, values, bits, _size(settings))
    parts = {"qweight": packing.transpose(packing.pack(codes, bits)), "qzeros": packed, "scales": raw}
    return parts if settings["order"] == "none" else {**parts, "g_idx": index}


def _index(settings: Mapping[str, Any], known: Mapping[str, Array]) -> npt.NDArray[np.int32]:
    """The group of each column."""
    if settings["order"] != "given":
        return (np.arange(settings["shape"][1]) // _size(settings)).astype(np.int32)
    if "g_idx" not in known:
        raise ValueError("the order of columns (desc_act) cannot be made anew; g_idx of the base must be kept")
    return np.asarray(known["g_idx"], np.int32)


def _ranges(weight: F32Array, settings: Mapping[str, Any], index: npt.NDArray[np.int32]) -> tuple[F64Array, F64Array]:
    if settings["order"] != "given":
        return packing.ranges(weight, np.arange(0, weight.shape[1], _size(settings)))
    order = np.argsort(index, kind="stable")
    present, starts = np.unique(index[order], return_index=True)
    shape = (len(weight), layout(settings)["scales"][1][0])
    low, high = np.full(shape, -1.0), np.full(shape, 1.0)  # of a group without columns
    low[:, present], high[:, present] = packing.ranges(weight[:, order], starts)
    return low, high


def _packed_zeros(zeros: Codes, settings: Mapping[str, Any]) -> Array:
    """Zero points (rows, groups), of which none is 0 in v1, so that its two ways agree."""
    stored = zeros if settings["zeros"] == "plain" else zeros - np.uint8(1)
    return packing.pack(np.ascontiguousarray(stored.T), settings["bits"])


def fresh(shape: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight: `bits`, `group_size`, `sym`, and the type of the `scale`. v1, without desc_act.

    Inference engines want rows and columns that fill words, and whole groups; others are refused here.
    """
    known = {"bits": 4, "group_size": 128, "sym": True, "scale": "F16"}
    chosen = packing.new_settings(shape, known, options)
    return {**chosen, "desc_act": False, "zeros": "field", "order": "regular", "format": "gptq"}


def config(settings: Mapping[str, Any], excluded: list[str]) -> dict[str, Any]:
    """`quantization_config`, with what is not quantised in `dynamic`, as gptqmodel and vLLM read it."""
    made = {
        "quant_method": "gptq", "bits": settings["bits"], "group_size": settings["group_size"],
        "desc_act": settings["desc_act"], "sym": settings["sym"], "checkpoint_format": settings["format"],
        "pack_dtype": "int32", "lm_head": False,
    }  # fmt: skip
    return {**made, "dynamic": {f"-:^{re.escape(name)}$": {} for name in excluded}} if excluded else made
