"""compressed-tensors `int-quantized`, `float-quantized`, `naive-quantized` and `mxfp8-quantized`: one code a value.

Parts and arithmetic are those of `scaled`. Blocks are cut by `block_structure`, as the library compresses and vLLM
reads; its own decompress (0.17) divides the weight by the number of scales instead, so that it is wrong where blocks
do not fill the weight: 192 rows in blocks of 128 become two of 96. compressors/naive_quantized/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inlay.codecs import compressed_config, scaled, scaled_form
from inlay.dtypes import Array

METHODS = ("compressed-tensors",)
PARTS = {
    "weight": ".weight",
    "weight_scale": ".weight_scale",
}
OPTIONAL = {"weight_zero_point": ".weight_zero_point", "weight_g_idx": ".weight_g_idx"}
NAME_SUFFIX = ".weight"
CODES = ("I8", "F8_E4M3")
EXTRAS = compressed_config.EXTRAS

FORMATS = {
    "I8": ("int-quantized", "naive-quantized"),
    "F8_E4M3": ("float-quantized", "naive-quantized", "mxfp8-quantized"),
}


def settings(
    config: Mapping[str, Any], module: str, found: scaled_form.Found, read: Callable[[str], Array]
) -> dict[str, Any]:
    """Shape, arguments and grid of the weight of this module."""
    group = compressed_config.scheme(config, module)
    codes, shape = found["weight"]
    if codes not in CODES:
        raise ValueError(f"{module}.weight is {codes}; compressed-tensors stores codes as {' or '.join(CODES)}")
    compressed_config.check_format(group, FORMATS[codes], module, f"weight {codes}")
    settings = scaled_form.read_settings(module, list(shape), codes, group["weights"], found, read)
    exponents = settings["scale"][0] in scaled_form.EXPONENTS
    if group["format"] is not None and exponents != (group["format"] == "mxfp8-quantized"):
        raise ValueError(f"{module}.weight_scale is {settings['scale'][0]}, but its format is {group['format']}")
    return settings | _more(group, settings)


def fresh(shape: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight. Options: `scheme`, `scale_dtype` (BF16; MXFP8 has its own)."""
    group = compressed_config.fresh(options, ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "INT8", "MXFP8", "MXFP8A16"))
    weights = group["weights"]
    codes = "F8_E4M3" if weights["type"] == "float" else "I8"
    scale_dtype = "U8" if weights["scale_dtype"] else options.get("scale_dtype", "BF16")
    made = scaled_form.made(list(shape), codes, weights, scale_dtype)
    return made | _more({"format": None, **group}, made)


config = compressed_config.made


def _more(group: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says beside the arguments of weights."""
    plain = "int-quantized" if settings["codes"] == "I8" else "float-quantized"
    stored = "mxfp8-quantized" if settings["scale"][0] in scaled_form.EXPONENTS else plain
    return {"activations": group["input_activations"], "format": group["format"] or stored}


layout = scaled_form.layout
spans = scaled_form.spans
decode = scaled.decode
align = scaled_form.align
measure = scaled.measure
encode = scaled.encode
