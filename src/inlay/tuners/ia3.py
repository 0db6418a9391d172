"""IA³: every input or every output of a layer is multiplied by a trained number.

W' = W ∘ l        Liu et al. 2022, section 3.3

l is (1, in) on feed-forward modules, where it scales what goes in, and (out, 1) on the others, where it scales
what comes out, the bias included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "IA3"
REQUIRED = ("ia3_l",)
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = False
FIELDS = frozenset({"feedforward_modules"})
IGNORED = frozenset({"init_ia3_weights"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: the shape of l says what it scales."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found = shapes["ia3_l"]
    if len(shape) != 2:
        return "IA3 on a convolution is not supported: its shape does not tell inputs from outputs"
    inputs, outputs = (1, shape[1]), (shape[0], 1)
    return None if found in (inputs, outputs) else f"ia3_l {found} fits neither {inputs} nor {outputs}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The parts as they are."""
    return parts


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on, each element multiplied once."""
    scale = parts["ia3_l"]
    if scale.shape[0] == math.prod(shape[:1]) and scale.shape[1] == 1:
        scale = scale[first : first + len(weight)]
    return np.asarray(weight * scale)


def touches_bias(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> bool:
    """Where outputs are scaled, the bias is one of their terms."""
    return shapes["ia3_l"][1] == 1


def merge_bias(bias: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any]) -> F64Array:
    """(out,) in and out."""
    return np.asarray(bias * parts["ia3_l"].reshape(-1))
