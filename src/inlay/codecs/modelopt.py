"""NVIDIA ModelOpt checkpoints: NVFP4, MXFP8, and FP8 with a scale a tensor, a channel or a block.

    quant_algo                 weight             weight_scale                       weight_scale_2
    NVFP4, W4A16_NVFP4         U8 (out, in/2)     F8_E4M3 (out, in/16)               F32 []
    MXFP8                      F8_E4M3 (out, in)  U8 (out, in/32), 2^(code − 127)
    FP8                        F8_E4M3 (out, in)  F32 []
    FP8_PER_CHANNEL_PER_TOKEN  F8_E4M3 (out, in)  F32 (out)
    FP8_PB_WO                  F8_E4M3 (out, in)  F32 (out/128, 1, in/128, 1) or (out/128, in/128)

NVFP4: w = e2m1 · (weight_scale · weight_scale_2), the product of the scales rounded to float32; weight_scale_2 is the
greatest magnitude of the tensor over 448·6, the inverse of what compressed-tensors stores. The others: w = weight ·
weight_scale. Read from the sources, without the libraries: NVIDIA/Model-Optimizer, torch/quantization/qtensor/
nvfp4_tensor.py (dequantize, get_weights_scaling_factor) and torch/export/convert_hf_config.py; vLLM,
model_executor/layers/quantization/modelopt.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import grids, nvfp4, scaled, scaled_form
from inlay.codecs.floats import LARGEST, encode_float, table
from inlay.codecs.scaled_form import Found, Layout, Spans
from inlay.dtypes import Array

F32Array = npt.NDArray[np.float32]

METHODS = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
PARTS = {
    "weight": ".weight",
    "weight_scale": ".weight_scale",
}
OPTIONAL = {"weight_scale_2": ".weight_scale_2", "pre_quant_scale": ".pre_quant_scale"}
NAME_SUFFIX = ".weight"
CODES = ("U8", "F8_E4M3")
EXTRAS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")

GROUP = 16
FP4 = ("NVFP4", "W4A16_NVFP4")
STRATEGIES = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "channel", "FP8_PB_WO": "block", "MXFP8": "group"}


def settings(config: Mapping[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> dict[str, Any]:
    """Shape, algorithm and scales of the weight of this module."""
    scaled_form.require(module, found, "weight_scale")
    algorithm, group = _algorithm(config, module)
    if "pre_quant_scale" in found:
        raise ValueError(
            f"{module} has a pre_quant_scale, which its inputs are multiplied with ({algorithm}): an adapter trained "
            "on the model cannot be added to such a weight; merge into the model it was made from"
        )
    dtype, stored = found["weight"]
    if len(stored) != 2:
        raise ValueError(f"{module}.weight is {list(stored)}; a quantised weight is read as (out, in)")
    if dtype == "U8" and algorithm in FP4:
        if group not in (None, GROUP):
            raise ValueError(f"{module} is {algorithm} with group_size {group}; NVFP4 has groups of {GROUP}")
        settings = _fp4([stored[0], stored[1] * 2], algorithm)
        if found.get("weight_scale_2") == ("F32", (1,)):
            settings["second"] = [1]
    elif dtype == "F8_E4M3" and algorithm in STRATEGIES:
        settings = _fp8(list(stored), algorithm)
        flat = _flat(settings)
        if found["weight_scale"][1] in flat:
            settings["scale"] = [settings["scale"][0], list(found["weight_scale"][1])]
    else:
        raise ValueError(f"{module}.weight is {dtype}, but quant_algo is {algorithm}")
    scaled_form.check_layout(module, algorithm, found, layout(settings))
    return settings


def _algorithm(config: Mapping[str, Any], module: str) -> tuple[str, int | None]:
    """quant_algo of a module, and its group size: of hf_quant_config.json, or as config.json has them."""
    config = config.get("quantization") or config
    patterns = config.get("exclude_modules") or config.get("ignore") or ()
    excluded = next((p for p in patterns if fnmatch(module, p)), None)
    if excluded is not None:
        raise ValueError(f"{module} is quantised, but the config excludes it ({excluded})")
    algorithm = str(config.get("quant_algo") or "").upper()
    if algorithm == "MIXED_PRECISION":
        layers = config.get("quantized_layers") or {}
        if module not in layers:
            raise ValueError(f"{module} is quantised, but quantized_layers of the config does not have it")
        config = layers[module]
        algorithm = str(config.get("quant_algo") or "").upper()
    if algorithm not in (*FP4, *STRATEGIES):
        known = ", ".join((*FP4, *STRATEGIES))
        raise ValueError(f"{module} has quant_algo {algorithm or 'unset'}; of ModelOpt's, these are read: {known}")
    return algorithm, config.get("group_size")


def _fp4(shape: list[int], algorithm: str) -> dict[str, Any]:
    return {"shape": shape, "algorithm": algorithm, "second": []}


def _fp8(shape: list[int], algorithm: str) -> dict[str, Any]:
    """Settings as `scaled` has them."""
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": STRATEGIES[algorithm],
                               "group_size": 32, "block_structure": [128, 128]}  # fmt: skip
    made = scaled_form.made(shape, "F8_E4M3", weights, "U8" if algorithm == "MXFP8" else "F32")
    if algorithm == "FP8_PB_WO":
        bands, columns = made["scale"][1]
        made["scale"][1] = [bands, 1, columns, 1]
    elif algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        made["scale"][1] = [] if algorithm == "FP8" else [shape[0]]
    return made | {"algorithm": algorithm}


def _flat(settings: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Other shapes that scales of the same number are stored in."""
    if settings["algorithm"] == "FP8":
        return ((1,),)
    rows = settings["scale"][1]
    return ((rows[0], 1),) if len(rows) == 1 else ((rows[0], rows[2]),) if len(rows) == 4 else ()


def fresh(shape: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight. Options: `scheme`, a quant_algo whose activations need no calibration."""
    unknown = sorted(set(options) - {"scheme"})
    if unknown:
        raise ValueError(f"options that are not known: {', '.join(unknown)}")
    algorithm = str(options.get("scheme", "W4A16_NVFP4")).upper()
    made_here = ("W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8")
    if algorithm not in made_here:
        raise ValueError(f"scheme {algorithm} is not one made here without calibration: {', '.join(made_here)}")
    if algorithm == "W4A16_NVFP4" and shape[1] % GROUP:
        raise ValueError(f"a row of {shape[1]} values does not fill groups of {GROUP}")
    return _fp4(list(shape), algorithm) if algorithm in FP4 else _fp8(list(shape), algorithm)


def config(settings: Mapping[str, Any], excluded: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose weights all have these settings, but for the excluded modules."""
    size = {"group_size": GROUP} if settings["algorithm"] in FP4 else {}
    return {"quant_method": "modelopt", "quant_algo": settings["algorithm"], **size, "ignore": list(excluded)}


def layout(settings: Mapping[str, Any]) -> Layout:
    """Codes and scales."""
    if settings["algorithm"] not in FP4:
        return scaled_form.layout(settings)
    rows, columns = settings["shape"]
    return {
        "weight": ("U8", (rows, columns // 2)),
        "weight_scale": ("F8_E4M3", (rows, columns // GROUP)),
        "weight_scale_2": ("F32", tuple(settings["second"])),
    }


def spans(settings: Mapping[str, Any], first: int, last: int) -> Spans:
    """Rows, and the scale of the tensor."""
    if settings["algorithm"] not in FP4:
        return scaled_form.spans(settings, first, last)
    return {"weight": (0, first, last), "weight_scale": (0, first, last), "weight_scale_2": None}


def align(settings: Mapping[str, Any]) -> int:
    """Rows of a block."""
    return 1 if settings["algorithm"] in FP4 else scaled_form.align(settings)


def _steps(parts: Mapping[str, Array]) -> F32Array:
    steps: F32Array = table("F8_E4M3")[parts["weight_scale"]] * parts["weight_scale_2"].reshape(())
    return steps


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows [first, last)."""
    if settings["algorithm"] not in FP4:
        return scaled.decode(parts, settings, first, last)
    return nvfp4.decode(parts["weight"], _steps(parts), GROUP)


def measure(weight: F32Array, settings: Mapping[str, Any]) -> F32Array:
    """[greatest magnitude] for NVFP4; what `scaled` asks for otherwise."""
    if settings["algorithm"] not in FP4:
        return scaled.measure(weight, settings)
    return np.array([np.max(np.abs(weight), initial=0)], np.float32)


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Codes of rows that begin at `first`, and their scales."""
    if settings["algorithm"] not in FP4:
        return scaled.encode(weight, settings, first, known)
    grids.require_finite(weight, first)
    parts = {part: known[part] for part in ("weight_scale", "weight_scale_2") if part in known}
    if "weight_scale_2" not in parts:
        if parts:
            raise ValueError("weight_scale is to be kept without weight_scale_2, which it is relative to")
        parts["weight_scale_2"] = _second(known["measured"]).reshape(settings["second"])
    if "weight_scale" not in parts:
        divisor = np.float32(LARGEST["F4"]) * parts["weight_scale_2"].reshape(())
        scales = nvfp4.largest(weight, GROUP) / divisor
        scales[scales == 0] = 1  # get_weights_scaling_factor, which keeps every scale from being 0
        parts["weight_scale"] = encode_float(np.maximum(scales, np.float32(2.0**-9)), "F8_E4M3")
    return {"weight": nvfp4.encode(weight, _steps(parts), GROUP), **parts}


def _second(measured: Array) -> F32Array:
    """get_weights_scaling_factor_2; 1 for a tensor of zeros, where ModelOpt would divide by 0."""
    scale = measured.astype(np.float32) / np.float32(LARGEST["F8_E4M3"] * LARGEST["F4"])
    return np.where(scale > 0, scale, np.float32(1))
