"""The singular value decomposition, for matrices that may hold what has none."""

from __future__ import annotations

import numpy as np

from inlay.dtypes import F64Array


def svd(x: F64Array) -> tuple[F64Array, F64Array, F64Array]:
    """Left vectors (rows, k), sizes (k,) and right vectors (k, cols), k the lesser of both.

    NaN where an element is not finite, since numpy's routine fails on those or never ends: a result that is made of
    them is refused.
    """
    if np.isfinite(x).all():
        left, size, right = np.linalg.svd(x, full_matrices=False)
        return left, size, right
    k = min(x.shape)
    return np.full((x.shape[0], k), np.nan), np.full(k, np.nan), np.full((k, x.shape[1]), np.nan)
