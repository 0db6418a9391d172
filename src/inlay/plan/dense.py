"""Placing the parts of tuners that are no low-rank pair: which file, which orientation, which settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from inlay.adapters.patterns import PATTERN_SECONDS
from inlay.checkpoints.refs import TensorInfo, TensorRef
from inlay.checkpoints.spans import BASE, SpanReader, adapter_root
from inlay.dtypes import decode
from inlay.keys import families
from inlay.plan.placer import Placer
from inlay.plan.steps import Dense
from inlay.tuners import dense


def place(placer: Placer, module: str, parts: Mapping[str, TensorInfo]) -> None:
    """One module of such an adapter."""
    file = dense.tuner(placer.config.tuner)
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
    if hasattr(file, "NEEDS_CODES") and not _in_codes(placer, key):
        placer.problem(module, file.NEEDS_CODES)
        return
    settings = _settings(placer, module, file, draw)
    shapes = {k: t.shape for k, t in parts.items()}
    shape = placer.shape(key)
    transposed = _transposed(placer, module, file, shapes, settings, shape)
    if transposed is None:
        return
    logical = shape[::-1] if transposed else shape
    refs = {k: placer.ref(t) for k, t in parts.items()}
    if hasattr(file, "PLACES") and (why := file.misplaced(_places(placer, file.PLACES, refs), shapes, logical)):
        placer.problem(module, why)
        return
    step = Dense(placer.found.position, placer.config.tuner, refs, settings, logical, transposed)
    if getattr(file, "CHANGES_WEIGHT", True):
        weighted = replace(step, weight=placer.found.weight if file.ADDITIVE else 1.0)
        placer.found.steps.setdefault(key, []).append(weighted)
    if placer.config.has_rank:
        placer.found.ranks.add(placer.config.rank(module))
    if isinstance(settings.get("scaling"), float):
        placer.found.scalings.add(settings["scaling"])
    if hasattr(file, "touches_bias") and file.touches_bias(shapes, settings):
        _bias(placer, module, key, step, file)


def _in_codes(placer: Placer, key: str) -> bool:
    """Whether the base stores this weight in codes, of which it is decoded."""
    made = placer.base.tensors[key][1].made if key in placer.base.tensors else None
    return made is not None and made.formula == "codec"


def _settings(placer: Placer, module: str, file: ModuleType, draw: bool) -> dict[str, Any]:
    """What the file makes of the config, and what only the planner knows."""
    alpha = placer.config.alpha(module) if placer.config.has_alpha else None
    settings: dict[str, Any] = file.settings(placer.config.raw, placer.config.rank(module), alpha)
    if hasattr(file, "LISTED_IN"):
        settings["listed"] = _listed(placer, file.LISTED_IN, module)
    if draw:
        settings["largest"] = _largest(placer)
    return settings


def _listed(placer: Placer, field: str, module: str) -> bool | None:
    """Whether a field of the config names this module, by the end of its name or as one pattern; None if not set.

    As PEFT 0.21 does in tuners/ia3/model.py, where a name need not begin at a dot.
    """
    names = placer.config.raw.get(field)
    if isinstance(names, list):
        return any(isinstance(name, str) and module.endswith(name) for name in names)
    if not isinstance(names, str):
        return None
    import regex  # has a timeout, which the standard library's engine has not

    try:
        return regex.fullmatch(names, module, timeout=PATTERN_SECONDS) is not None
    except (TimeoutError, regex.error) as error:
        placer.problem(module, f"{field} {names!r:.80} cannot be matched to it: {error or 'it takes too long'}")
        return None


def _places(placer: Placer, names: Sequence[str], refs: Mapping[str, TensorRef]) -> dict[str, Any]:
    """The numbers of these parts, which are small: a wrong one is a problem of the plan, not of the run."""
    with SpanReader({adapter_root(placer.found.position): placer.adapter.path}) as reader:
        stored = {name: reader.whole(refs[name]) for name in names if name in refs}
    return {name: decode(x, refs[name].dtype) if refs[name].dtype.mergeable else x for name, x in stored.items()}


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


def _bias(placer: Placer, module: str, weight_key: str, step: Dense, file: ModuleType) -> None:
    """What the tuner does to the layer's bias, where there is one."""
    parts = dict(step.parts)
    if hasattr(file, "reads_weight") and file.reads_weight(parts.keys()):
        if step.transposed or weight_key not in placer.base.tensors:
            placer.problem(module, "adds a product of the weight to the bias, which is for stored Linear layers")
            return
        shard, info = placer.base.tensors[weight_key]
        parts[file.BASE_WEIGHT] = TensorRef.of(BASE, shard.file, info)
    key = placer.names.key(module + ".bias")
    if key in placer.base.tensors:
        placer.found.steps.setdefault(key, []).append(replace(step, parts=parts, transposed=False, bias=True))
    elif not getattr(file, "CHANGES_WEIGHT", True) or getattr(file, "NEEDS_BIAS", False):
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
