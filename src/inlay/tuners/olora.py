"""OLoRA, as trained: LoRA on what is left of the base without the first columns of its QR factorisation.

W' = W₀ − s Q_r R_r + s B A        Büyükakyüz 2024

Training starts from the pair (R_r, Q_r) and takes its product off the base; a file that was not converted belongs to
the base without it. The sign of a column of Q cancels in the product. Computed in float64; training had the
difference rounded to the type of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners import variants

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
    """The whole matrix; the factorisation is that of the base before any adapter."""
    q, r = np.linalg.qr(base)
    rank = settings["rank"]
    start = settings["scaling"] * (q[:, :rank] @ r[:rank])
    return np.asarray(weight - start + variants.product(parts, settings))
