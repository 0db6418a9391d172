"""Adapters of MLX: `adapters.safetensors` beside an `adapter_config.json` that holds the training arguments.

    <module>.lora_a (in, r), <module>.lora_b (r, out)    W' = W + scale · (lora_a lora_b)ᵀ
    <module>.m (out,)                                    DoRA: each output then gets this length
    any other name                                       a full copy (norms, embeddings, `fine_tune_type: full`)

`lora_parameters.scale` is the whole scaling; an `alpha` beside it is not looked at. Only files without a
scale fall back to alpha / rank. The layers are numbered as in the model, so `num_layers` is not needed.
Source: mlx-lm, tuner/lora.py and tuner/dora.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.adapters.peft_config import LARGEST, LARGEST_WHOLE, PeftConfig
from inlay.adapters.peft_names import FULL, PartName
from inlay.errors import AdapterError

WEIGHTS = "adapters.safetensors"
KINDS = ("lora", "dora", "full")
PARAMETERS = frozenset({"rank", "scale", "alpha", "dropout", "keys"})
_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "magnitude"}
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")


def is_mlx(raw: Mapping[str, Any]) -> bool:
    """Whether a config is MLX's: it names no PEFT method."""
    return "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw)


def parse_mlx_name(key: str) -> PartName:
    """The module and part that `key` names, in PEFT's words; the pairs are transposed."""
    found = _PART.fullmatch(key)
    return PartName(found["module"], _PARTS[found["part"]]) if found else PartName(key, FULL)


def parse_mlx_config(raw: Mapping[str, Any], where: Path) -> PeftConfig:
    """What decides the merged weight. Raises AdapterError for what is not known or malformed."""
    kind = raw.get("fine_tune_type") or ("dora" if raw.get("use_dora") else "lora")
    if kind not in KINDS:
        raise AdapterError(f"{where}: fine_tune_type {kind!r} is not known; {', '.join(KINDS)} are")
    parameters = raw.get("lora_parameters") or {}
    if not isinstance(parameters, dict):
        raise AdapterError(f"{where}: lora_parameters must be an object, found {parameters!r:.80}")
    unknown = sorted(parameters.keys() - PARAMETERS)
    if unknown:
        raise AdapterError(f"{where}: lora_parameters has {', '.join(unknown)}, which may change the weights")
    rank = parameters.get("rank", 8 if kind == "full" else None)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < LARGEST_WHOLE:
        raise AdapterError(f"{where}: lora_parameters.rank must be a positive integer, found {rank!r:.80}")
    scale = _number(parameters, "scale", where)
    alpha = _number(parameters, "alpha", where)
    if scale is None and alpha is None and kind != "full":
        raise AdapterError(f"{where}: lora_parameters has neither scale nor alpha, so the strength is not known")
    model = raw.get("model")
    scaling = scale if scale is not None else (alpha or 0.0) / rank
    return PeftConfig(
        raw={},
        r=rank,
        lora_alpha=scaling * rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=kind == "dora" or bool(raw.get("use_dora")),
        fan_in_fan_out=False,
        bias="none",
        lora_bias=False,
        modules_to_save=(),
        trainable_token_indices={},
        ensure_weight_tying=False,
        base_model=model if isinstance(model, str) and model else None,
        task_type=None,
        peft_version=None,
        fixed_scaling=scaling,
    )


def _number(parameters: Mapping[str, Any], name: str, where: Path) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        raise AdapterError(f"{where}: lora_parameters.{name} must be a number, found {value!r:.80}")
    return float(value)
