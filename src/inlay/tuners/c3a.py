"""C3A: a grid of circulant blocks, each a circular convolution with one trained kernel.

W'[m b + t, n b + s] = W[m b + t, n b + s] + w[m, n, (s − t) mod b] / in        Chen et al. 2025

The kernels w are (out / b, in / b, b). PEFT finds the same numbers by a Fourier transform in float32; they are
only copies of the kernel, and are copied here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "C3A"
REQUIRED = ("c3a_kernel",)
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS: frozenset[str] = frozenset()
IGNORED = frozenset({"block_size", "block_size_pattern", "init_weights"})  # the kernel shows the size of its block
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: the strength is in the kernel."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found = shapes["c3a_kernel"]
    if len(found) == 3 and (found[0] * found[2], found[1] * found[2]) == shape:
        return None
    return f"the circulant blocks {found} do not make {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The parts as they are."""
    return parts


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`: row t of a block is its kernel, moved t to the right."""
    kernel = parts["c3a_kernel"]
    size = kernel.shape[2]
    block, row = np.divmod(np.arange(first, last), size)
    turned = (np.arange(size) - row[:, None]) % size
    rows = np.take_along_axis(kernel[block], turned[:, None, :], axis=2)
    return np.asarray(rows.reshape(last - first, shape[1]) / shape[1])
