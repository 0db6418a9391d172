"""bitsandbytes int8 (LLM.int8): eight bits a value, one absmax for a row.

    weight         I8 (out, in), −127 … 127
    SCB            F32 (out), the largest magnitude of each row
    weight_format  U8, one number: 0 for rows in order. Older versions had layouts for one kind of GPU each.

    value = code · SCB[row] · (1 / 127)        both products rounded      Dettmers et al. 2022, LLM.int8(), section 2

bitsandbytes 0.50.2: _ops.py, int8_vectorwise_dequant; backends/default/ops.py, int8_vectorwise_quant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import Array

F32Array = npt.NDArray[np.float32]

METHODS = ("bitsandbytes",)
PARTS = {"weight": ".weight", "SCB": ".SCB"}
OPTIONAL = {"weight_format": ".weight_format"}  # bitsandbytes takes rows in order where it is absent
NAME_SUFFIX = ".weight"
CODES = ("I8",)
EXTRAS: tuple[str, ...] = ()

FORMATS = ("row", "col32", "col_turing", "col_ampere")  # LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING of bitsandbytes/utils.py
CHUNK_ROWS = 64
INVERSE = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes writes it


def settings(
    config: Mapping[str, Any],
    module: str,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Array],
) -> dict[str, Any]:
    """The shape, and whether weight_format is stored."""
    if config.get("load_in_4bit") and not config.get("load_in_8bit"):
        raise ValueError(f"{module} has 8-bit parts, but quantization_config has load_in_4bit")
    missing = [PARTS[part] for part in PARTS if part not in found]
    if missing:
        raise ValueError(f"{module} has no {', '.join(missing)}: not a complete 8-bit weight of bitsandbytes")
    if "weight_format" in found:
        _check_format(module, found["weight_format"], read)
    dtype, shape = found["weight"]
    if dtype != "I8" or len(shape) != 2:
        raise ValueError(f"{module}.weight is {dtype} {list(shape)}, but with SCB beside it, it must be an I8 matrix")
    if found["SCB"] != ("F32", shape[:1]):
        kind, length = found["SCB"]
        raise ValueError(f"{module}.SCB is {kind} {list(length)}, but the weight's rows need F32 [{shape[0]}]")
    return {"shape": list(shape), "weight_format": "weight_format" in found}


def _check_format(module: str, found: tuple[str, tuple[int, ...]], read: Callable[[str], Array]) -> None:
    if found != ("U8", ()):
        raise ValueError(f"{module}.weight_format is {found[0]} {list(found[1])}, but must be one U8")
    number = int(read("weight_format").reshape(()))
    if number:
        name = FORMATS[number] if number < len(FORMATS) else f"number {number}"
        raise ValueError(
            f"{module}.weight_format is {name}, a layout for one kind of GPU; only row is read: "
            "load the model with the version of bitsandbytes that wrote it, and save it in 16 bits"
        )


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each part's dtype and shape."""
    out, columns = settings["shape"]
    parts: dict[str, tuple[str, tuple[int, ...]]] = {"weight": ("I8", (out, columns)), "SCB": ("F32", (out,))}
    return {**parts, "weight_format": ("U8", ())} if settings["weight_format"] else parts


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, tuple[int, int, int] | None]:
    """The rows themselves."""
    return {"weight": (0, first, last), "SCB": (0, first, last)}


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows `[first, last)`, float32 (last − first, in)."""
    values = np.empty(parts["weight"].shape, np.float32)
    for start in range(0, len(values), CHUNK_ROWS):  # rows that stay in the cache between the products
        rows = slice(start, start + CHUNK_ROWS)
        np.multiply(parts["weight"][rows], parts["SCB"][rows, None], out=values[rows])
        values[rows] *= INVERSE
    return values


def align(settings: Mapping[str, Any]) -> int:
    """Rows stand alone."""
    return 1


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Codes to nearest, ties to even, as int8_vectorwise_quant; beyond a stored SCB the largest code.

    A layer of bitsandbytes casts the weight to float16 before; here float32 is quantised as it is.
    """
    values = np.ascontiguousarray(weight, np.float32)
    parts: dict[str, Array] = {}
    if "SCB" in known:
        scales = known["SCB"]
    else:
        parts["SCB"] = scales = np.abs(np.maximum(values.max(axis=1), -values.min(axis=1)))
        if not np.isfinite(scales).all():
            raise ValueError("the weight has NaN or infinite values, which 8 bits cannot hold")
    steps = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    steps *= np.float32(127)  # 127 / scales is computed so in torch, with two roundings
    codes = np.empty(values.shape, np.int8)
    for start in range(0, len(values), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        scaled = values[rows] * steps[rows, None]
        np.clip(np.rint(scaled, out=scaled), -127, 127, out=scaled)
        codes[rows] = scaled
    return {"weight": codes, **parts}


def finish(parts: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    """The number that says that rows are in order."""
    return {"weight_format": np.zeros((), np.uint8)} if settings["weight_format"] else {}


def fresh(shape: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight. There are no options."""
    if options:
        raise ValueError(f"bitsandbytes int8 has no options, and was given {', '.join(sorted(options))}")
    if len(shape) != 2 or math.prod(shape) == 0:
        raise ValueError(f"a weight {list(shape)} is not a matrix, which bitsandbytes int8 needs")
    return {"shape": list(shape), "weight_format": True}


def config(settings: Mapping[str, Any], excluded: list[str]) -> dict[str, Any]:
    """`quantization_config` as transformers 5 writes it (BitsAndBytesConfig.to_dict)."""
    return {
        "quant_method": "bitsandbytes", "_load_in_4bit": False, "_load_in_8bit": True,
        "load_in_4bit": False, "load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(excluded) or None, "llm_int8_threshold": 6.0,
    }  # fmt: skip
