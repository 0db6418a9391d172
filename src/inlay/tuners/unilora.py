"""Uni-LoRA: low-rank pairs whose elements are all taken from one trained vector.

W' = W + (θ[i_B] ∘ s_B) (θ[i_A] ∘ s_A)        Li et al. 2025

θ is shared; the indices and scales, A's (r, in) and B's (out, r), are in the file where it was saved with
`save_indices` (PEFT 0.21, tuners/unilora). Otherwise it holds θ and nothing else: which layers there are, and which of
the shuffled numbers belongs to which, follows from the order in which the model's code registers its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.errors import InputError
from inlay.tuners.places import outside, span

PEFT_TYPE = "UNILORA"
REQUIRED = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
OPTIONAL = ()
SHARED = ("unilora_theta_d",)
MISSING = (
    "the vector and the indices of each layer must be in the file, since they are dealt out in the order of the "
    "model's layers; load the adapter with PEFT and save it with save_indices=True"
)
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"save_indices"})
IGNORED = frozenset({"proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights"})
REFUSED: dict[str, str] = {}
PLACES = REQUIRED[:2]


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: the strength is in the scales."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if not set(SHARED) <= shapes.keys():
        return MISSING
    theta, a, b = shapes["unilora_theta_d"], *(shapes[name] for name in PLACES)
    if len(shape) != 2 or len(theta) != 1:
        return f"unilora_theta_d {theta} and a weight {shape}: a vector and a matrix are needed"
    if (shapes["unilora_scales_A"], shapes["unilora_scales_B"]) != (a, b):
        return f"indices {a} and {b} with scales {shapes['unilora_scales_A']} and {shapes['unilora_scales_B']}"
    if len(a) == len(b) == 2 and a[0] == b[1] > 0 and (b[0], a[1]) == shape:
        return None
    return f"indices A {a} and B {b} do not make {shape}"


def misplaced(
    places: Mapping[str, F64Array], shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> str | None:
    """Numbers that the vector does not have; a negative one would count from its end."""
    count = shapes["unilora_theta_d"][0]
    for name in PLACES:
        if outside(places[name], count):
            return f"{name} from {span(places[name])} point outside a vector of {count} numbers"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The low-rank pair: left (out, r), right (r, in).

    Raises InputError for an index that the vector does not have.
    """
    if why := misplaced(parts, {name: part.shape for name, part in parts.items()}, shape):
        raise InputError(why)
    theta = parts["unilora_theta_d"]
    right, left = (theta[parts[f"unilora_indices_{x}"].astype(np.int64)] * parts[f"unilora_scales_{x}"] for x in "AB")
    return {"left": left, "right": right}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(parts["left"][first:last] @ parts["right"])
