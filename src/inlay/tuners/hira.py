"""HiRA: a low-rank pair says by which share every element of the weight changes.

W' = W + W₀ ∘ (B A)        Huang et al. 2025

W₀ is the weight before any adapter, also where others came first. `hira_A` (r, in) and `hira_B` (out, r), on a
convolution (r, in, kernel) and (out, r, 1 …). An embedding (vocabulary, dim) has `hira_embedding_A` (r, vocabulary)
and `hira_embedding_B` (dim, r), and the share is (B A)ᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "HIRA"
REQUIRED = ()
OPTIONAL = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
SHARED = ()
WHOLE = False
ADDITIVE = False  # the change is a share of the base
FIELDS: frozenset[str] = frozenset()
IGNORED = frozenset({"hira_dropout", "init_weights"})
REFUSED: dict[str, str] = {}

LAYER, EMBEDDING = OPTIONAL[:2], OPTIONAL[2:]


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: HiRA has no scaling."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if shapes.keys() not in (set(LAYER), set(EMBEDDING)):
        return f"has {', '.join(sorted(shapes))}; {' and '.join(LAYER)} or {' and '.join(EMBEDDING)} are needed"
    embedding = "hira_embedding_A" in shapes
    if embedding and len(shape) != 2:
        return f"an embedding is a matrix, the weight is {shape}"
    a, b = (shapes[name] for name in (EMBEDDING if embedding else LAYER))
    rank = a[0] if a else 0
    if embedding:
        wanted: tuple[tuple[int, ...], ...] = (rank, shape[0]), (shape[1], rank)
    else:
        wanted = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    return None if (a, b) == wanted else f"A {a} and B {b}, and {wanted[0]} and {wanted[1]} fit a weight {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """`left` (rows, r) and `right` (r, columns): the shares are their product."""
    if "hira_embedding_A" in parts:
        return {"left": parts["hira_embedding_A"].T, "right": parts["hira_embedding_B"].T}
    a, b = parts["hira_A"], parts["hira_B"]
    return {"left": b.reshape(b.shape[:2]), "right": a.reshape(len(a), -1)}


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on."""
    share = parts["left"][first : first + len(weight)] @ parts["right"]
    return np.asarray(np.where(share == 0, weight, weight + base * share))
