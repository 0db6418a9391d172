"""HRA: the inputs of a layer are reflected, once for each trained direction.

W' = W H₁ H₂ … Hᵣ,  Hᵢ = I − 2 ûᵢ ûᵢᵀ        Yuan, Liu and Xu 2024

`hra_u` (in, r) holds the directions as columns. With `apply_GS` they are made orthogonal first (Gram-Schmidt), so
the reflections commute. A convolution is the matrix (out, in · kernel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "HRA"
REQUIRED = ("hra_u",)
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = False
FIELDS = frozenset({"apply_GS"})
IGNORED = frozenset({"init_weights"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Whether the directions are made orthogonal."""
    return {"orthogonal": bool(raw.get("apply_GS"))}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found, inputs = shapes["hra_u"], math.prod(shape[1:])
    if len(found) == 2 and found[0] == inputs:
        return None
    return f"hra_u {found} does not fit the {inputs} inputs of a weight {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """`units` (r, in): the directions, each of length 1."""
    units: list[F64Array] = []
    for direction in parts["hra_u"].T:
        for other in units if settings["orthogonal"] else ():
            direction = direction - (other @ direction) * other
        # A zero has no direction: its reflection is NaN, which the caller reports.
        with np.errstate(divide="ignore", invalid="ignore"):
            units.append(direction / np.linalg.norm(direction))
    return {"units": np.array(units)}


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on, each reflected on its own; H itself, (in, in), is never made."""
    for unit in parts["units"]:
        weight = weight - np.outer(2 * (weight @ unit), unit)
    return weight
