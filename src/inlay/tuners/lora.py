"""LoRA: a low-rank pair added to the weight.

W' = W + s · B A        Hu et al. 2021, section 4.1; s = alpha/r, or alpha/√r (Kalajdzievski 2023)

In the orientation of the stored weight, `left` (rows, r) and `right` (r, cols) are B and A for a Linear,
Aᵀ and Bᵀ where the weight is stored (in, out) or is an embedding, and B and A with their kernel axes
flattened for a convolution. A bias is one row, with left = [[1]].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners.bounded import SLACK, TINY, Bounded, U, product

PARTS = ("left", "right")
ADDITIVE = True


def merge(weight: Bounded, parts: Mapping[str, F64Array], scaling: float) -> Bounded:
    """Merged rows; a row or column whose factor is zero comes back as it was, the sign of zero included."""
    delta, error = product(parts["left"], parts["right"], scaling)
    neutral = np.logical_or.outer(~parts["left"].any(axis=1), ~parts["right"].any(axis=0)) | (scaling == 0)
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.where(neutral, weight.value, weight.value + delta)
        added = SLACK * (error + U * np.abs(value)) + TINY
    return Bounded(value, weight.error + np.where(neutral, 0.0, added))
