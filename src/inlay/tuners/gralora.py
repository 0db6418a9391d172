"""GraLoRA: the weight is cut into k × k blocks, and each has a low-rank pair of its own.

W'[block j, n] = W[block j, n] + s · B[j, n]ᵀ A[n, j]ᵀ        Jung et al. 2025, section 3;  s = alpha / (r + hybrid_r)

`gralora_A` (k, in/k, r) and `gralora_B` (k, r, out/k): the r columns of A[n] are k groups, one for each block of
outputs, and the r rows of B[j] k groups, one for each block of inputs. With `hybrid_r` a common pair is added:
`gralora_A_general` (hybrid_r, in) and `gralora_B_general` (out, hybrid_r), under the same s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "GRALORA"
REQUIRED = ("gralora_A", "gralora_B")
OPTIONAL = ("gralora_A_general", "gralora_B_general")
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"alpha", "hybrid_r", "gralora_k"})
IGNORED = frozenset({"gralora_dropout", "init_weights"})
REFUSED: dict[str, str] = {}

ALPHA, BLOCKS = 64.0, 2  # PEFT's own, for a config without the fields


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The scaling, ranks of the blocks and of the common pair, and the blocks along each side."""
    common, blocks = int(raw.get("hybrid_r") or 0), raw.get("gralora_k")
    scaling = (ALPHA if alpha is None else alpha) / (rank + common)
    return {"scaling": scaling, "rank": rank, "common": common, "blocks": int(BLOCKS if blocks is None else blocks)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    k, rank = settings["blocks"], settings["rank"]
    if len(shape) != 2 or k < 1 or shape[0] % k or shape[1] % k or rank % k:
        return f"gralora_k {k} does not divide rank {rank} and weight {shape}"
    wanted: dict[str, tuple[int, ...]] = {"gralora_A": (k, shape[1] // k, rank), "gralora_B": (k, rank, shape[0] // k)}
    if settings["common"]:
        wanted["gralora_A_general"] = (settings["common"], shape[1])
        wanted["gralora_B_general"] = (shape[0], settings["common"])
    for name in sorted(wanted.keys() | shapes.keys()):
        if shapes.get(name) != wanted.get(name):
            return f"{name} is {shapes.get(name, 'missing')}, and {wanted.get(name, 'nothing')} fits {shape}"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """Pairs by block: left (k out, k in, out/k, r/k), right (k out, k in, r/k, in/k)."""
    a, b = parts["gralora_A"], parts["gralora_B"]
    k, inputs, rank = a.shape
    left = b.reshape(k, k, rank // k, -1).transpose(0, 1, 3, 2)
    right = a.reshape(k, inputs, k, rank // k).transpose(2, 0, 3, 1)
    return {**parts, "left": left, "right": right}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    left, right = parts["left"], parts["right"]
    rows, total = left.shape[2], np.empty((last - first, shape[1]))
    for j in range(first // rows, -(-last // rows)):
        start, end = max(first, j * rows), min(last, (j + 1) * rows)
        blocks = left[j][:, start - j * rows : end - j * rows] @ right[j]  # (k in, rows, in/k)
        total[start - first : end - first] = blocks.transpose(1, 0, 2).reshape(end - start, -1)
    if settings["common"]:
        total += parts["gralora_B_general"][first:last] @ parts["gralora_A_general"]
    return np.asarray(settings["scaling"] * total)
