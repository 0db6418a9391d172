"""OSF: the small singular components of the weight are trained, the large ones kept.

W' = W − U₀ S₀ V₀ + U S V        Nayak et al. 2025

U (out, n), S (n,), V (n, in) are in the file; U₀ S₀ V₀ are the n smallest components of the base, which PEFT (0.21,
tuners/osf/layer.py) takes off anew on every load. The sign that a library gives to singular vectors cancels in the
product. Computed in float64; PEFT decomposes in float32 and rounds the factors to the type of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners.decomposition import svd

PEFT_TYPE = "OSF"
REQUIRED = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")
OPTIONAL = ()
SHARED = ()
WHOLE = True
ADDITIVE = False
FIELDS: frozenset[str] = frozenset()
IGNORED = frozenset({"effective_rank", "target_svd_config", "init_weights"})  # the sizes of the parts say the rank
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: the parts say how many components were trained."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    left, size, right = (shapes[name] for name in REQUIRED)
    if len(shape) != 2:
        return f"OSF is for matrices, the weight is {shape}"
    if len(size) == 1 and size[0] <= min(shape) and left == (shape[0], *size) and right == (*size, shape[1]):
        return None
    return f"U_low {left}, S_low {size} and V_low {right} are no components of a weight {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The parts as they are."""
    return parts


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """The whole matrix; the components are those of the base before any adapter."""
    assert weight.shape == shape, f"OSF needs all of {shape}, not {weight.shape}"
    left, size, right = svd(base)
    kept = min(shape) - len(parts[REQUIRED[1]])
    before = (left[:, kept:] * size[kept:]) @ right[kept:]
    u, s, v = (parts[name] for name in REQUIRED)
    return np.asarray(weight + ((u * s) @ v - before))
