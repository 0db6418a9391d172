"""BEFT: a trained vector is added to the layer's bias; the weight stays as it is.

b' = b + v        PEFT's BEFT, arXiv 2509.15974

`beft_bias` (1, out) holds v. A layer without a bias has no place for it, so such an adapter does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "BEFT"
REQUIRED = ("beft_bias",)
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = False
CHANGES_WEIGHT = False  # so the layer must have a bias
FIELDS: frozenset[str] = frozenset()
IGNORED = frozenset({"init_weights"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found, wanted = shapes["beft_bias"], (1, shape[0])
    if len(shape) != 2:
        return f"BEFT is for matrices, the weight is {shape}"
    return None if found == wanted else f"beft_bias is {found}, and {wanted} fits a weight {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The part as it is."""
    return parts


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """The rows as they are."""
    return weight


def touches_bias(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> bool:
    """Always."""
    return True


def merge_bias(bias: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any]) -> F64Array:
    """(out,) in and out."""
    return np.asarray(bias + parts["beft_bias"].reshape(-1))
