"""PiSSA and OLoRA: saved as a LoRA on the original base.

They start by taking a part of the weight away, W0 = W − s·B0 A0, and train the pair from (A0, B0). What they trained is

    W0 + s·B A = W + s·(B A − B0 A0) = W + s·[B  −B0] [A; A0]

a pair of twice the rank with the same scaling (Meng et al. 2024, appendix C; PEFT's
`path_initial_model_for_weight_conversion`). The pair as it was trained is kept in `unconverted/`, to go on from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.errors import InputError

UNCONVERTED = "unconverted"
INITIAL = "initial.safetensors"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def pairs(model: Any) -> dict[str, Any]:
    """Copies of the pair of every module, by its name in the saved file."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {k: t.detach().cpu().clone().contiguous() for k, t in state.items() if ".lora_A." in k or ".lora_B." in k}


def convert(trained: Mapping[str, Any], initial: Mapping[str, Any]) -> dict[str, Any]:
    """The pairs for the original base; other tensors as they are."""
    import torch

    converted = dict(trained)
    for key, first in initial.items():
        now = trained[key].to(torch.float32)
        if ".lora_A." in key:
            converted[key] = torch.cat([now, first.to(torch.float32)], dim=0)
        else:
            converted[key] = torch.cat([now, -first.to(torch.float32)], dim=1)
    return converted


def convert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with twice the rank and the alpha that keeps the scaling."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return {**config, "r": config["r"] * 2, "lora_alpha": config["lora_alpha"] * factor, "init_lora_weights": True}


def convert_checkpoint(checkpoint: Path, initial: Mapping[str, Any]) -> None:
    """Turn what PEFT saved in `checkpoint` into a LoRA on the original base, keeping the former in a folder."""
    import json

    from safetensors.torch import load_file, save_file

    kept = checkpoint / UNCONVERTED
    kept.mkdir(exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        os.replace(checkpoint / name, kept / name)
    save_file(dict(initial), kept / INITIAL)
    save_file(convert(load_file(kept / WEIGHTS), initial), checkpoint / WEIGHTS, {"format": "pt"})
    config = convert_config(json.loads((kept / CONFIG).read_text("utf-8")))
    (checkpoint / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def check_start(checkpoint: Path, initial: Mapping[str, Any]) -> None:
    """Whether this machine takes the same part of the base away as the one that began. Raises InputError."""
    import torch
    from safetensors.torch import load_file

    began = load_file(checkpoint / UNCONVERTED / INITIAL)
    if began.keys() != initial.keys() or any(not torch.equal(t, initial[k]) for k, t in began.items()):
        raise InputError(
            f"{checkpoint}: the base is decomposed into other pairs here than where the run began (another machine or "
            "version of torch), so the run cannot go on; start a new one"
        )
