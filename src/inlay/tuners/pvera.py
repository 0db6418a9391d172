"""PVeRA: VeRA whose low-rank middle is a distribution; its mean is merged.

W' = W + (λ_b ∘ B[:out]) (λ_d[:r] ∘ A[:r, :in])        the probabilistic form of VeRA, Kopiczko et al. 2024

The shared A (2 r, largest in) and λ_d (2 r) hold the means in their first half and the logarithms of the variances in
the second; B is (largest out, r). Where the projections were not saved (`save_projection` false) they would have to be
drawn again as one version of torch draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "PVERA"
REQUIRED = ("pvera_lambda_b", "pvera_lambda_d")
OPTIONAL = ()
SHARED = ("pvera_A", "pvera_B")
MISSING = "the projections are not in the file; load the adapter with PEFT and save it with save_projection=True"
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"save_projection"})
IGNORED = frozenset({"projection_prng_key", "pvera_dropout", "d_initial", "init_weights", "generator_seed"})
REFUSED: dict[str, str] = {
    "sample_at_inference": "the layer draws its change anew for every token, so no merged weight equals it; "
    "set it to false to merge the mean"
}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: the strength is in the vectors."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if not set(SHARED) <= shapes.keys():
        return MISSING
    a, b, lambda_b, lambda_d = (shapes[n] for n in (*SHARED, *REQUIRED))
    pair = len(shape) == len(a) == len(b) == 2 and a[0] == 2 * b[1] and a[1] >= shape[1] and b[0] >= shape[0]
    if pair and lambda_b == shape[:1] and lambda_d == a[:1]:
        return None
    return f"pvera_lambda_b {lambda_b} and pvera_lambda_d {lambda_d} with A {a} and B {b} do not make {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The pair of this layer."""
    rank = parts["pvera_B"].shape[1]
    right = parts["pvera_lambda_d"][:rank, None] * parts["pvera_A"][:rank, : shape[1]]
    return {"left": parts["pvera_lambda_b"][:, None] * parts["pvera_B"][: shape[0]], "right": right}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(parts["left"][first:last] @ parts["right"])
