"""Tuners beyond low-rank pairs: the table of their files, and how one acts on a stored tensor.

They work in float64 on the weight as the layer sees it, (out, in); the result is rounded once with
everything else. What the last bit of float64 leaves open between two stored values, about one element in
10^11, may differ between machines; sums of low-rank pairs have no such elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

# peft_type -> file in this folder
FILES = {
    "ADALORA": "adalora", "BEFT": "beft", "BOFT": "boft", "BONE": "miss", "C3A": "c3a", "DEFT": "deft",
    "DELORA": "delora", "FOURIERFT": "fourierft", "GLORA": "glora", "GRALORA": "gralora", "HIRA": "hira", "HRA": "hra",
    "IA3": "ia3", "LOHA": "loha", "LOKR": "lokr", "MISS": "miss", "OFT": "oft", "OSF": "osf", "PEANUT": "peanut",
    "PVERA": "pvera", "RANDLORA": "randlora", "ROAD": "road", "SHIRA": "shira", "SUPERTUNING": "supertuning",
    "UNILORA": "unilora", "VBLORA": "vblora", "VERA": "vera", "WAVEFT": "waveft",
}  # fmt: skip
# Variants of LoRA that are no plain pair, by the name of their file.
VARIANTS = frozenset({"bdlora", "kasa", "olora", "pissa", "qalora"})


def tuner(name: str) -> ModuleType:
    """The file of a tuner, by its name in `FILES` or `VARIANTS`."""
    assert name in FILES.values() or name in VARIANTS, name
    return import_module(f"inlay.tuners.{name}")


def needs_whole(name: str, transposed: bool, bias: bool) -> bool:
    """Whether a block of stored rows cannot be merged without the others."""
    return transposed or bias or bool(tuner(name).WHOLE)


def drawn_elements(name: str, settings: Mapping[str, Any]) -> int:
    """How many numbers are drawn again because the file leaves them out."""
    return sum(math.prod(shape) for shape in tuner(name).drawn_shapes(settings)) if "largest" in settings else 0


def merge(
    name: str, weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int, *, transposed: bool = False, bias: bool = False, factor: float = 1.0,
) -> F64Array:  # fmt: skip
    """Merged rows `[first, first + len(weight))` of a stored matrix; a zero change keeps the sign of a zero.

    `base` holds the same rows before any adapter; `parts` have gone through the tuner's `prepare`.
    """
    file = tuner(name)
    if bias:
        changed: F64Array = file.merge_bias(weight.reshape(-1), base.reshape(-1), parts, settings)
        return changed.reshape(weight.shape)
    logical, before = (weight.T, base.T) if transposed else (weight, base)
    if file.ADDITIVE:
        delta = factor * file.delta(parts, settings, shape, first, first + len(logical))
        merged = np.where(delta == 0, logical, logical + delta)
    else:
        merged = file.merge(logical, before, parts, settings, shape, first)
    return merged.T if transposed else merged
