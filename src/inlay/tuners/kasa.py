"""KaSA: the base loses its r smallest singular components, and a pair with a diagonal between is added.

W' = Σ_{i < k−r} u_i σ_i v_iᵀ + s B diag(d) A        Wang et al. 2024, k = min(out, in)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners import variants
from inlay.tuners.decomposition import svd

REQUIRED = (*variants.NAMES, "lora_diag")
OPTIONAL = ()
SHARED = ()
WHOLE = True
ADDITIVE = False


settings = variants.settings


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if (why := variants.check_pair(shapes, shape)) is not None:
        return why
    if settings["rank"] >= min(shape):
        return f"rank {settings['rank']} would leave nothing of a weight {shape}"
    found, rank = shapes["lora_diag"], shapes["lora_A"][0]
    return None if found == (rank,) else f"lora_diag is {found}, the pair has rank {rank}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The pair, with the diagonal in A."""
    return {"lora_A": parts["lora_diag"][:, None] * parts["lora_A"], "lora_B": parts["lora_B"]}


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """The whole matrix."""
    left, size, right = svd(base)
    kept = len(size) - settings["rank"]
    smallest = (left[:, kept:] * size[kept:]) @ right[kept:]
    return np.asarray(weight - smallest + variants.product(parts, settings))
