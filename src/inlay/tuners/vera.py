"""VeRA: one random pair for all layers, and two trained vectors for each.

W' = W + (λ_b ∘ B[:out]) (λ_d ∘ A[:, :in])        Kopiczko et al. 2024

The shared A (r, largest in) and B (largest out, r) are merged from the file. Where they were not saved
(`save_projection` false) they would have to be drawn again as one version of torch draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "VERA"
REQUIRED = ("vera_lambda_b", "vera_lambda_d")
OPTIONAL = ()
SHARED = ("vera_A", "vera_B")
MISSING = "the projections are not in the file; load the adapter with PEFT and save it with save_projection=True"
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"save_projection"})
IGNORED = frozenset({"projection_prng_key", "vera_dropout", "d_initial", "init_weights"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: the strength is in the vectors."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if not set(SHARED) <= shapes.keys():
        return MISSING
    a, b, lambda_b, lambda_d = (shapes[n] for n in ("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"))
    pair = len(shape) == len(a) == len(b) == 2 and a[0] == b[1] and a[1] >= shape[1] and b[0] >= shape[0]
    if pair and lambda_b == shape[:1] and lambda_d == a[:1]:
        return None
    return f"vera_lambda_b {lambda_b} and vera_lambda_d {lambda_d} with A {a} and B {b} do not make {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The pair of this layer."""
    right = parts["vera_lambda_d"][:, None] * parts["vera_A"][:, : shape[1]]
    return {"left": parts["vera_lambda_b"][:, None] * parts["vera_B"][: shape[0]], "right": right}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(parts["left"][first:last] @ parts["right"])
