"""compressed-tensors `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: two e2m1 a byte.

    weight_packed         U8, (out, in/2), the lower bits first
    weight_scale          F8_E4M3, (out, in/16); for MXFP4 U8, (out, in/32), 2^(code − 127)
    weight_global_scale   F32, [1], of NVFP4 only: 448·6 / the greatest magnitude of the tensor

NVFP4: w = e2m1 · (scale / global), the quotient rounded to float32. MXFP4: w = e2m1 · scale. The library rounds
either to bfloat16. compressed-tensors 0.17, compressors/nvfp4/base.py, compressors/mxfp4/base.py,
quantization/utils/helpers.py (generate_gparam, calculate_qparams). NVIDIA's own checkpoints hold the inverse of the
global scale: `modelopt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import compressed_config, grids, nvfp4, scaled_form
from inlay.codecs.floats import LARGEST, encode_float, table
from inlay.codecs.scaled import exponents
from inlay.codecs.scaled_form import Found, Layout, Spans
from inlay.dtypes import Array

F32Array = npt.NDArray[np.float32]

METHODS = ("compressed-tensors",)
PARTS = {
    "weight_packed": ".weight_packed",
    "weight_scale": ".weight_scale",
}
OPTIONAL = {"weight_global_scale": ".weight_global_scale"}
NAME_SUFFIX = ".weight"
CODES = ("U8",)
EXTRAS = compressed_config.EXTRAS

# The form -> size of a group, and the types in which its scales may be.
FORMS = {"nvfp4-pack-quantized": (16, ("F8_E4M3",)), "mxfp4-pack-quantized": (32, ("U8", "F8_E8M0"))}
EPS = 0.125  # replaces a scale of a group that is 0, in calculate_qparams


def settings(config: Mapping[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> dict[str, Any]:
    """Shape, group and types of the weight of this module."""
    scaled_form.require(module, found, "weight_scale")
    group = compressed_config.scheme(config, module)
    compressed_config.check_format(group, tuple(FORMS), module, f"weight_packed {found['weight_packed'][0]}")
    weights = group["weights"]
    if (weights["type"], weights["num_bits"], weights["symmetric"]) != ("float", 4, True):
        raise ValueError(f"{module}.weight_packed is U8, but its config group is not symmetric float of 4 bits")
    form = group["format"] or ("mxfp4-pack-quantized" if weights["group_size"] == 32 else "nvfp4-pack-quantized")
    size, types = FORMS[form]
    if weights["group_size"] != size:
        raise ValueError(f"{module} is {form}, but its config group has group_size {weights['group_size']}, not {size}")
    if found["weight_scale"][0] not in types:
        raise ValueError(f"{module}.weight_scale is {found['weight_scale'][0]}; {form} has {' or '.join(types)}")
    if len(found["weight_packed"][1]) != 2:
        raise ValueError(f"{module}.weight_packed is {list(found['weight_packed'][1])}, not (out, in/2)")
    rows, octets = found["weight_packed"][1]
    settings = _made([rows, octets * 2], group, form, found["weight_scale"][0])
    if found.get("weight_global_scale") in (("F32", ()), ("F32", (1, 1))):
        settings["global"] = list(found["weight_global_scale"][1])
    scaled_form.check_layout(module, form, found, layout(settings))
    return settings


def fresh(shape: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight. Options: `scheme`. NVFP4 activations need calibration, NVFP4A16 does not."""
    group = compressed_config.fresh(options, ("NVFP4A16", "MXFP4A16", "MXFP4"))
    form = "mxfp4-pack-quantized" if group["weights"]["group_size"] == 32 else "nvfp4-pack-quantized"
    if shape[1] % FORMS[form][0]:
        raise ValueError(f"a row of {shape[1]} values does not fill groups of {FORMS[form][0]}")
    return _made(list(shape), group, form, FORMS[form][1][0])


config = compressed_config.made


def _made(shape: list[int], group: Mapping[str, Any], form: str, scale_dtype: str) -> dict[str, Any]:
    return {
        "shape": shape, "group": FORMS[form][0], "scale": scale_dtype, "format": form,
        "global": None if form.startswith("mx") else [1],
        "weights": group["weights"], "activations": group["input_activations"],
    }  # fmt: skip


def layout(settings: Mapping[str, Any]) -> Layout:
    """Codes, scales of groups, and the scale of the tensor."""
    rows, columns = settings["shape"]
    parts: Layout = {
        "weight_packed": ("U8", (rows, columns // 2)),
        "weight_scale": (settings["scale"], (rows, -(-columns // settings["group"]))),
    }
    if settings["global"] is not None:
        parts["weight_global_scale"] = ("F32", tuple(settings["global"]))
    return parts


def spans(settings: Mapping[str, Any], first: int, last: int) -> Spans:
    """Rows, and the scale of the tensor."""
    rows: Spans = {"weight_packed": (0, first, last), "weight_scale": (0, first, last)}
    return rows if settings["global"] is None else {**rows, "weight_global_scale": None}


def align(settings: Mapping[str, Any]) -> int:
    """Rows stand alone."""
    return 1


def _steps(parts: Mapping[str, Array], settings: Mapping[str, Any]) -> F32Array:
    if settings["global"] is None:
        return table("F8_E8M0")[parts["weight_scale"]]
    steps = table("F8_E4M3")[parts["weight_scale"]]
    steps /= parts["weight_global_scale"].reshape(())
    return steps


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows [first, last)."""
    return nvfp4.decode(parts["weight_packed"], _steps(parts, settings), settings["group"])


def measure(weight: F32Array, settings: Mapping[str, Any]) -> F32Array:
    """[greatest magnitude], for the scale of the tensor; empty for MXFP4."""
    if settings["global"] is None:
        return np.zeros(0, np.float32)
    return np.array([np.max(np.abs(weight), initial=0)], np.float32)


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Codes of rows that begin at `first`, and their scales."""
    grids.require_finite(weight, first)
    parts = {part: known[part] for part in ("weight_scale", "weight_global_scale") if part in known}
    if settings["global"] is not None and "weight_global_scale" not in parts:
        if parts:
            raise ValueError("weight_scale is to be kept without weight_global_scale, which it is relative to")
        parts["weight_global_scale"] = _global_scale(known["measured"]).reshape(settings["global"])
    if "weight_scale" not in parts:
        parts["weight_scale"] = _scales(nvfp4.largest(weight, settings["group"]), parts, settings)
    return {"weight_packed": nvfp4.encode(weight, _steps(parts, settings), settings["group"]), **parts}


def _global_scale(measured: Array) -> F32Array:
    """generate_gparam: 1 where the tensor is 0 or so small that the quotient is infinite."""
    greatest = np.maximum(measured.astype(np.float32), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):  # torch divides a number by a tensor so, in two roundings
        scale = np.float32(LARGEST["F8_E4M3"] * LARGEST["F4"]) * (np.float32(1) / greatest)
    return np.where(np.isfinite(scale), scale, np.float32(1))


def _scales(largest: F32Array, parts: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """calculate_qparams, whose scales here are rounded to their stored type at once."""
    if settings["global"] is None:
        return exponents(largest, LARGEST["F4"])
    scales: F32Array = parts["weight_global_scale"].reshape(()) * (largest / np.float32(LARGEST["F4"]))
    codes = encode_float(scales, "F8_E4M3")
    return np.where(codes == 0, encode_float(np.array([EPS]), "F8_E4M3"), codes)
