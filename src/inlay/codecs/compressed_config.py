"""What `quantization_config` of a compressed-tensors checkpoint says about one module.

A config has groups, each with `targets` and the arguments of weights and activations; `ignore` takes modules out.
A target is a module's name, "re:" and a pattern that its name begins with, or the name of its class. Names go before
patterns and these before classes, and among equals the first in the alphabet wins: compressed-tensors 0.17,
utils/match.py (match_targets) and quantization/quant_scheme.py (presets).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Json = dict[str, Any]

# Tensors beside a weight that say how activations and the cache are quantised, which end with the codes.
EXTRAS = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
          ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")  # fmt: skip

FIELDS = frozenset({"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic",
                    "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"})  # fmt: skip
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")

INT8_TOKENS: Json = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
FP8_TOKENS: Json = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
E4M3, U8 = "torch.float8_e4m3fn", "torch.uint8"


def _weights(num_bits: int, kind: str, strategy: str, **more: Any) -> Json:
    return {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def _activations(weights: Json, **more: Any) -> Json:
    return {**weights, "dynamic": True, **more}


_W4 = _weights(4, "int", "group", group_size=128)
_NVFP4 = _weights(4, "float", "tensor_group", group_size=16, scale_dtype=E4M3, zp_dtype=E4M3)
_MXFP4 = _weights(4, "float", "group", group_size=32, scale_dtype=U8, zp_dtype=U8)
_MXFP8 = _weights(8, "float", "group", group_size=32, scale_dtype=U8, zp_dtype=U8)
_BLOCK = _weights(8, "float", "block", block_structure=[128, 128])
_BY_128: Json = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "symmetric": True,
                 "dynamic": True}  # fmt: skip

# name -> (weights, input activations)
PRESETS: dict[str, tuple[Json, Json | None]] = {
    "W4A16": (_W4, None),
    "W4A16_ASYM": ({**_W4, "symmetric": False}, None),
    "W8A16": (_weights(8, "int", "group", group_size=128), None),
    "W8A8": (_weights(8, "int", "channel"), INT8_TOKENS),
    "INT8": (_weights(8, "int", "channel"), INT8_TOKENS),
    "W4A8": (_W4, INT8_TOKENS),
    "W4AFP8": (_W4, FP8_TOKENS),
    "FP8": (_weights(8, "float", "tensor"), {**_weights(8, "float", "tensor"), "observer": "static_minmax"}),
    "FP8_DYNAMIC": (_weights(8, "float", "channel"), FP8_TOKENS),
    "FP8_BLOCK": (_BLOCK, _BY_128),
    "NVFP4A16": (_NVFP4, None),
    "NVFP4": (_NVFP4, _activations(_NVFP4, dynamic="local", observer="static_minmax")),
    "MXFP4A16": (_MXFP4, None),
    "MXFP4": (_MXFP4, _activations(_MXFP4)),
    "MXFP8A16": (_MXFP8, None),
    "MXFP8": (_MXFP8, _activations(_MXFP8)),
}


def unwrap(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config itself, where older checkpoints hold it one level down; refused if it changes the maths."""
    for outer in ("compression_config", "quantization_config"):
        if isinstance(config.get(outer), Mapping):
            config = {**{k: v for k, v in config.items() if k != outer}, **config[outer]}
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ValueError(
            f"the checkpoint is stored sparse (sparsity_config.format {sparsity['format']}); "
            "decompress it with compressed-tensors 0.12 first"
        )
    transform = config.get("transform_config") or {}
    if transform.get("config_groups", transform):
        raise ValueError(
            "transform_config rotates weights and activations, so that an adapter trained on the model "
            "cannot be added to the stored weights; merge into the model it was made from"
        )
    return config


def scheme(config: Mapping[str, Any], module: str) -> Json:
    """`weights` and `input_activations` of the module's group, and the `format` it is stored in or None.

    Raises ValueError where the config does not say which group it is, or says that the module is not quantised.
    """
    config = unwrap(config)
    groups = config.get("config_groups") or {}
    if not groups:
        raise ValueError("quantization_config has no config_groups")
    ignored = next((entry for entry in config.get("ignore") or () if _names(entry, module)), None)
    if ignored is not None:
        raise ValueError(f"{module} is quantised, but quantization_config.ignore has it ({ignored})")
    name = _group(groups, module)
    group = groups[name]
    if isinstance(group, list):
        weights, activations = _preset(name)
        group = {"weights": weights, "input_activations": activations}
    stored = next((f for f in (group.get("format"), config.get("format")) if f not in NO_FORMAT), None)
    weights = arguments(group.get("weights"), name)
    return {"weights": weights, "input_activations": group.get("input_activations"), "format": stored}


# A config's `format` that leaves the form open: to each group, or to what its arguments imply.
NO_FORMAT = (None, "mixed-precision", "dense", "fakequant")


def _preset(name: str) -> tuple[Json, Json | None]:
    if name.upper() not in PRESETS:
        raise ValueError(f"config group {name} is no preset of compressed-tensors: {', '.join(PRESETS)}")
    return PRESETS[name.upper()]


def _targets(group: Mapping[str, Any] | list[str]) -> list[str]:
    return list(group) if isinstance(group, list) else list(group.get("targets") or ())


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def _group(groups: Mapping[str, Any], module: str) -> str:
    """The name of the module's group. A later group takes a target that an earlier one has too."""
    if len(groups) == 1:  # the module has codes, and there is one way to make them
        return str(next(iter(groups)))
    owner = {target: name for name, group in groups.items() for target in _targets(group)}
    named = sorted((t for t in owner if _names(t, module)), key=lambda t: (t.startswith("re:"), t))
    if named:
        return str(owner[named[0]])
    wanted = ("Embedding",) if "embed" in module.rpartition(".")[2] else ("Linear", "LinearBase")
    classes = [target for target in wanted if target in owner]
    if not classes:
        raise ValueError(f"{module} is quantised, but no group of quantization_config targets it: {', '.join(owner)}")
    return str(owner[classes[0]])


def arguments(raw: Mapping[str, Any] | None, name: str) -> Json:
    """Arguments of a group's weights, checked, with their defaults: QuantizationArgs, quantization/quant_args.py."""
    if not raw:
        raise ValueError(f"config group {name} quantises no weights")
    unknown = sorted(key for key, value in raw.items() if key not in FIELDS and value)
    if unknown:
        raise ValueError(f"config group {name} has fields of weights that are not known: {', '.join(unknown)}")
    if raw.get("dynamic"):
        raise ValueError(f"config group {name} quantises weights dynamically, so they have no stored form")
    if not isinstance(raw.get("num_bits", 8), int):
        raise ValueError(f"config group {name} has num_bits {raw['num_bits']}")
    size, block = raw.get("group_size"), raw.get("block_structure")
    if isinstance(block, str):
        block = [int(side) for side in block.split("x")]
    inferred = "tensor" if size is None else "group" if size > 0 else "channel"
    found = {
        "num_bits": raw.get("num_bits", 8),
        "type": str(raw.get("type", "int")).lower(),
        "symmetric": raw.get("symmetric", True),
        "strategy": str(raw.get("strategy") or inferred).lower(),
        "group_size": size,
        "block_structure": block,
        "actorder": raw.get("actorder"),
        "scale_dtype": raw.get("scale_dtype"),
    }
    if found["strategy"] not in STRATEGIES:
        raise ValueError(
            f"config group {name} has weights of strategy {found['strategy']}, not {', '.join(STRATEGIES)}"
        )
    if "group" in found["strategy"] and not (isinstance(size, int) and size > 0):
        raise ValueError(f"config group {name} has strategy {found['strategy']} and group_size {size}")
    if found["strategy"] == "block" and not (isinstance(block, list) and len(block) == 2 and min(block) > 0):
        raise ValueError(f"config group {name} has strategy block and block_structure {block}")
    return found


def cell(weights: Mapping[str, Any], shape: list[int]) -> list[int]:
    """Rows and columns that share a scale, in a weight of this shape."""
    rows, columns = shape
    if weights["strategy"] == "block":
        return list(weights["block_structure"])
    if weights["strategy"] == "tensor":
        return [rows, columns]
    if weights["strategy"] == "channel":
        return [1, columns]
    size = weights["group_size"]
    if columns > size and columns % size:
        raise ValueError(
            f"a row has {columns} values, which is no multiple of its group_size {size}: "
            "compressed-tensors refuses such groups, and its readers would cut them otherwise"
        )
    return [1, min(size, columns)]


def fresh(options: Mapping[str, Any], presets: tuple[str, ...]) -> Json:
    """The group of a new checkpoint, as `scheme` gives it: options `scheme`, one of `presets`, and `group_size`."""
    unknown = sorted(set(options) - {"scheme", "group_size", "scale_dtype"})
    if unknown:
        raise ValueError(f"options that are not known: {', '.join(unknown)}")
    name = str(options.get("scheme", presets[0])).upper()
    if name not in presets:
        raise ValueError(f"scheme {name} is not one that can be made here without calibration: {', '.join(presets)}")
    weights, activations = PRESETS[name]
    if options.get("group_size") is not None:
        if weights.get("scale_dtype") or "group_size" not in weights:
            raise ValueError(f"scheme {name} takes no group_size")
        weights = {**weights, "group_size": options["group_size"]}
    return {"weights": arguments(weights, name), "input_activations": activations}


def made(settings: Mapping[str, Any], excluded: Iterable[str]) -> Json:
    """`quantization_config` of a checkpoint whose weights all have these settings, but for the excluded modules."""
    weights = {key: value for key, value in settings["weights"].items() if value is not None}
    group = {
        "targets": ["Linear"], "weights": {**weights, "dynamic": False},
        "input_activations": settings["activations"], "output_activations": None, "format": settings["format"],
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": settings["format"],
        "config_groups": {"group_0": group}, "ignore": list(excluded), "kv_cache_scheme": None,
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def check_format(group: Mapping[str, Any], formats: tuple[str, ...], module: str, stored: str) -> None:
    """Refused where the config names another form than that of the tensors that are there."""
    if group["format"] is not None and group["format"] not in formats:
        raise ValueError(
            f"{module} is stored as {stored}, which is {' or '.join(formats)}, "
            f"but its config group says format {group['format']}"
        )
