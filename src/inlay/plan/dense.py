"""Placing the parts of tuners that are no low-rank pair: which file, which orientation, which settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from inlay.checkpoints.header import TensorInfo
from inlay.keys import families
from inlay.plan.placer import Placer
from inlay.plan.types import Dense
from inlay.tuners import dense


def place(placer: Placer, module: str, parts: Mapping[str, TensorInfo]) -> None:
    """One module of such an adapter."""
    name = placer.config.tuner
    file = dense.tuner(name)
    parts = {**{k: t for k, t in placer.adapter.shared.items() if k in file.SHARED}, **parts}
    missing = sorted({*file.REQUIRED, *file.SHARED} - parts.keys())
    draw = set(missing) == set(file.SHARED) and getattr(file, "DRAWN", False) and _left_out(placer)
    if missing and not draw:
        why = f"; {file.MISSING}" if hasattr(file, "MISSING") and set(missing) <= set(file.SHARED) else ""
        placer.problem(module, f"incomplete: has {', '.join(sorted(parts))}, lacks {', '.join(missing)}{why}")
        return
    if not placer.parts_are_numbers(module, parts):  # those that all modules share too
        return
    key = placer.weight_key(module)
    if key is None or not placer.target_is_float(module, key):
        return
    rank, alpha = placer.config.rank(module), placer.config.alpha(module)
    settings = file.settings(placer.config.raw, rank, alpha if placer.config.has_alpha else None)
    if draw:
        settings["largest"] = _largest(placer)
    shapes = {k: t.shape for k, t in parts.items()}
    shape = placer.shape(key)
    transposed = _transposed(placer, module, file, shapes, settings, shape)
    if transposed is None:
        return
    logical = shape[::-1] if transposed else shape
    refs = {k: placer.ref(t) for k, t in parts.items()}
    position, weight = placer.found.position, placer.found.weight
    if getattr(file, "CHANGES_WEIGHT", True):
        step = Dense(position, name, refs, settings, logical, transposed, weight=weight if file.ADDITIVE else 1.0)
        placer.found.steps.setdefault(key, []).append(step)
    if placer.config.has_rank:
        placer.found.ranks.add(rank)
    if isinstance(settings.get("scaling"), float):
        placer.found.scalings.add(settings["scaling"])
    _bias(placer, module, Dense(position, name, refs, settings, logical, bias=True), file, shapes)


def _left_out(placer: Placer) -> bool:
    """Whether the config says that what all modules share is not in the file."""
    return placer.config.raw.get("save_projection") is False


def _largest(placer: Placer) -> list[int]:
    """Largest number of outputs and of inputs among the modules of the adapter."""
    sizes = []
    for module in placer.adapter.parts:
        key = placer.names.key(module + ".weight")
        if key in placer.base.tensors and len(placer.base.tensors[key][1].shape) > 1:
            out, *inputs = placer.base.tensors[key][1].shape
            turned = families.stored_transposed(placer.model_type, module)
            sizes.append((inputs[0], out) if turned else (out, math.prod(inputs)))
    return [max((out for out, _ in sizes), default=0), max((in_ for _, in_ in sizes), default=0)]


def _bias(placer: Placer, module: str, step: Dense, file: ModuleType, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """What the tuner does to the layer's bias, where there is one."""
    if not hasattr(file, "touches_bias") or not file.touches_bias(shapes, step.settings):
        return
    key = placer.names.key(module + ".bias")
    if key in placer.base.tensors:
        placer.found.steps.setdefault(key, []).append(step)
    elif not getattr(file, "CHANGES_WEIGHT", True):
        placer.problem(module, f"changes the layer's bias, and the base has no {key}")


def _transposed(
    placer: Placer, module: str, file: ModuleType, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any],
    shape: tuple[int, ...],
) -> bool | None:  # fmt: skip
    """Whether the weight is stored (in, out); None, and a problem, where the parts fit neither way."""
    if len(shape) < 2 or 0 in shape:
        placer.problem(module, f"the base stores {shape}, which is no matrix")
        return None
    declared = families.stored_transposed(placer.model_type, module)
    plain = file.check(shapes, settings, shape)
    turned = file.check(shapes, settings, shape[::-1]) if len(shape) == 2 else "no matrix"
    if declared is not None:
        wrong = turned if declared else plain
        if wrong:
            placer.problem(module, wrong)
        return None if wrong else declared
    if plain is not None and turned is not None:
        placer.problem(module, plain)
        return None
    if plain is None and turned is None and placer.config.fan_in_fan_out:
        what = f"fits {shape} both ways and fan_in_fan_out is set, so its orientation cannot be known; set it to what "
        placer.problem(module, what + "the layer type is (true for Conv1D only) and give config.json its model_type")
        return None
    return plain is not None
