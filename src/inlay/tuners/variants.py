"""What the variants of LoRA share: names, scaling, the pair, and the frame of those that decompose the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

NAMES = ("lora_A", "lora_B")


def scaling(raw: Mapping[str, Any], rank: int, alpha: float | None) -> float:
    """alpha / r, or alpha / √r with rsLoRA."""
    strength = 8.0 if alpha is None else alpha
    return strength / math.sqrt(rank) if raw.get("use_rslora") else strength / rank


def check_pair(shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> str | None:
    """What is wrong with A (r, in) and B (out, r)."""
    a, b = shapes["lora_A"], shapes["lora_B"]
    if len(shape) == len(a) == len(b) == 2 and a[0] == b[1] and (b[0], a[1]) == shape:
        return None
    return f"lora_A {a} and lora_B {b} do not make {shape}"


def product(parts: Mapping[str, F64Array], settings: Mapping[str, Any]) -> F64Array:
    """s B A (out, in)."""
    return np.asarray(settings["scaling"] * (parts["lora_B"] @ parts["lora_A"]))


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Rank and scaling."""
    return {"rank": rank, "scaling": scaling(raw, rank, alpha)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    return check_pair(shapes, shape)


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The parts as they are."""
    return parts
