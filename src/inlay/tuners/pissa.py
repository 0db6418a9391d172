"""PiSSA, as trained: LoRA on what is left of the base without its largest singular components.

W' = W₀ − U_r S_r V_rᵀ + s B A        Meng et al. 2024

Training starts from the pair √S_r between U_r and V_r and takes that product off the base; a file that was not
converted belongs to the base without it. The sign that a library gives to singular vectors cancels in the
product. Computed in float64; training had the difference rounded to the type of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners import variants
from inlay.tuners.decomposition import svd

REQUIRED = variants.NAMES
OPTIONAL = ()
SHARED = ()
WHOLE = True
ADDITIVE = False


settings, check, prepare = variants.settings, variants.check, variants.prepare


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """The whole matrix; the components are those of the base before any adapter."""
    left, size, right = svd(base)
    r = settings["rank"]
    return np.asarray(weight - (left[:, :r] * size[:r]) @ right[:r] + variants.product(parts, settings))
