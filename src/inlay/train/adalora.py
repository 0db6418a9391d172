"""AdaLoRA: what a checkpoint needs beside the adapter, to go on from.

The adapter is saved without the directions that were masked last, and the method may bring these back. So the state
holds all trained tensors as they are, and the running scores of importance by which directions are chosen
(Zhang et al. 2023, equations 8 to 10; PEFT's `RankAllocator`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inlay.errors import InputError

STATE = "adalora_state.safetensors"
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
PATTERN = "rank_pattern"


def save(model: Any, checkpoint: Path) -> None:
    """Write the state of `model`, a PeftModel, beside its adapter."""
    from safetensors.torch import save_file

    allocator = model.base_model.rankallocator
    tensors = {f"trained/{name}": p.detach() for name, p in _trained(model)}
    tensors |= {f"{kind}/{name}": t for kind in SCORES for name, t in getattr(allocator, kind).items()}
    pattern = json.dumps(model.peft_config["default"].rank_pattern)
    save_file({k: t.cpu().clone().contiguous() for k, t in tensors.items()}, checkpoint / STATE, {PATTERN: pattern})


def load(model: Any, checkpoint: Path) -> None:
    """Bring `model`, with a new adapter, to the state that was saved. Raises InputError where there is none."""
    import torch
    from safetensors import safe_open

    path = checkpoint / STATE
    if not path.is_file():
        raise InputError(f"{checkpoint}: lacks {STATE}, to go on from")
    allocator = model.base_model.rankallocator
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, p in _trained(model):
            p.copy_(file.get_tensor(f"trained/{name}"))
        own = dict(model.base_model.model.named_parameters())
        for kind in SCORES:
            names = [key.removeprefix(f"{kind}/") for key in file.keys() if key.startswith(f"{kind}/")]  # noqa: SIM118
            setattr(allocator, kind, {n: file.get_tensor(f"{kind}/{n}").to(own[n].device) for n in names})
        model.peft_config["default"].rank_pattern = json.loads(file.metadata()[PATTERN])


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
