"""PVeRA: VeRA whose low-rank middle is a distribution; its mean is merged.

W' = W + (λ_b ∘ B[:out]) (λ_d[:r] ∘ A[:r, :in])        the probabilistic form of VeRA, Kopiczko et al. 2024

The shared A (2 r, largest in) and λ_d (2 r) hold the means in their first half and the logarithms of the variances in
the second; B is (largest out, r). With `save_projection` false they are drawn again from `projection_prng_key` as
VeRA's are: A, then B, with the largest sizes among the layers of the adapter (PEFT 0.21, tuners/pvera/model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners.torch_random import kaiming_uniform

PEFT_TYPE = "PVERA"
REQUIRED = ("pvera_lambda_b", "pvera_lambda_d")
OPTIONAL = ()
SHARED = ("pvera_A", "pvera_B")
MISSING = "the projections are not in the file; load the adapter with PEFT and save it with save_projection=True"
DRAWN = True  # the shared parts may be drawn again, for the largest sizes among the layers
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"save_projection", "projection_prng_key"})
IGNORED = frozenset({"pvera_dropout", "d_initial", "init_weights", "generator_seed"})
REFUSED: dict[str, str] = {
    "sample_at_inference": "the layer draws its change anew for every token, so no merged weight equals it; "
    "set it to false to merge the mean"
}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The key of the projections and their rank; the strength is in the vectors."""
    key = raw.get("projection_prng_key")
    return {"key": 0 if key is None else int(key), "rank": rank}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if not set(SHARED) <= shapes.keys() and "largest" not in settings:
        return MISSING
    a, b = drawn_shapes(settings) if "largest" in settings else (shapes["pvera_A"], shapes["pvera_B"])
    lambda_b, lambda_d = (shapes[name] for name in REQUIRED)
    pair = len(shape) == len(a) == len(b) == 2 and a[0] == 2 * b[1] > 0 and a[1] >= shape[1] and b[0] >= shape[0]
    if pair and lambda_b == shape[:1] and lambda_d == a[:1]:
        return None
    return f"pvera_lambda_b {lambda_b} and pvera_lambda_d {lambda_d} with A {a} and B {b} do not make {shape}"


def drawn_shapes(settings: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B, for the largest number of outputs and of inputs."""
    outputs, inputs = settings["largest"]
    return (2 * settings["rank"], inputs), (outputs, settings["rank"])


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The pair of this layer."""
    a, b = parts.get("pvera_A"), parts.get("pvera_B")
    if a is None or b is None:
        a, b = (x.astype(np.float64) for x in kaiming_uniform(settings["key"], drawn_shapes(settings)))
    rank = b.shape[1]
    right = parts["pvera_lambda_d"][:rank, None] * a[:rank, : shape[1]]
    return {"left": parts["pvera_lambda_b"][:, None] * b[: shape[0]], "right": right}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(parts["left"][first:last] @ parts["right"])
