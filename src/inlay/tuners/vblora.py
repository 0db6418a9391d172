"""VB-LoRA: a low-rank pair whose pieces are mixed from one bank of vectors that all layers share.

W' = W + B A        Li et al. 2024, section 3.2

A row of A, and a column of B, is a chain of pieces of `vector_length`; each is Σ w_j · bank[i_j] over the k vectors
of the largest logits, w = softmax of these k logits. A file has the logits, or with `save_only_topk_weights`
the indices i and the first k − 1 weights: the last is what they lack to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import F64Array
from inlay.errors import InputError
from inlay.tuners.places import outside, span

PEFT_TYPE = "VBLORA"
REQUIRED = ()
OPTIONAL = (
    "vblora_logits_A", "vblora_logits_A_topk_indices", "vblora_logits_A_topk_weights",
    "vblora_logits_B", "vblora_logits_B_topk_indices", "vblora_logits_B_topk_weights",
)  # fmt: skip
SHARED = ("vblora_vector_bank",)
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"topk"})
IGNORED = frozenset({  # the first three are seen from the file
    "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound",
    "init_logits_std",
})  # fmt: skip
REFUSED: dict[str, str] = {}
PLACES = ("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices")

IntArray = npt.NDArray[np.int64]

TOPK = 2  # PEFT's own, for a config without the field


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """How many vectors make a piece."""
    return {"topk": int(raw.get("topk") or TOPK)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    bank = shapes["vblora_vector_bank"]
    if len(shape) != 2 or len(bank) != 2:
        return f"vblora_vector_bank {bank} and a weight {shape}: both should be matrices"
    if not 0 < settings["topk"] <= bank[0]:
        return f"topk {settings['topk']} of a bank of {bank[0]} vectors"
    a, b = (_pieces(shapes, which, settings["topk"], bank[0]) for which in "AB")
    if a is None or b is None:
        return (
            f"has {', '.join(f'{k} {v}' for k, v in sorted(shapes.items()))}: no pieces of {settings['topk']} vectors"
        )
    if a[0] == b[1] and (b[0] * bank[1], a[1] * bank[1]) == shape:
        return None
    return f"pieces A {a} and B {b} of {bank[1]} elements do not make {shape}"


def _pieces(shapes: Mapping[str, tuple[int, ...]], which: str, topk: int, vectors: int) -> tuple[int, ...] | None:
    """How the pieces of A (r, in tiles) or B (out tiles, r) are laid out."""
    part = f"vblora_logits_{which}"
    logits, indices, weights = (shapes.get(part + end) for end in ("", "_topk_indices", "_topk_weights"))
    if logits is not None:
        return logits[:2] if len(logits) == 3 and logits[2] == vectors and indices is weights is None else None
    if indices is None or weights is None or len(indices) != 3 or indices[2] != topk:
        return None
    return indices[:2] if weights == (*indices[:2], topk - 1) else None


def misplaced(
    places: Mapping[str, F64Array], shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> str | None:
    """Vectors that the bank does not have; a negative number would count from its end."""
    vectors = shapes["vblora_vector_bank"][0]
    for name in PLACES:
        if name in places and outside(places[name], vectors):
            return f"{name} from {span(places[name])} point outside a bank of {vectors} vectors"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The low-rank pair: left (out, r), right (r, in).

    Raises InputError for a vector that the bank does not have.
    """
    if why := misplaced(parts, {name: part.shape for name, part in parts.items()}, shape):
        raise InputError(why)
    a, b = (_mixed(parts, f"vblora_logits_{which}", settings["topk"]) for which in "AB")
    return {"left": b.transpose(0, 2, 1).reshape(-1, b.shape[1]), "right": a.reshape(len(a), -1)}


def _mixed(parts: Mapping[str, F64Array], part: str, topk: int) -> F64Array:
    """Pieces (…, vector_length), one vector of the mixture at a time."""
    weights, indices = _largest(parts[part], topk) if part in parts else _stored(parts, part)
    bank = parts["vblora_vector_bank"]
    mixed = np.zeros((*indices.shape[:-1], bank.shape[1]))
    for j in range(topk):
        mixed += weights[..., j, None] * bank[indices[..., j]]
    return mixed


def _largest(logits: F64Array, topk: int) -> tuple[F64Array, IntArray]:
    """Softmax over the k largest logits, and their indices."""
    indices = np.argsort(-logits, axis=-1, kind="stable")[..., :topk]
    kept = np.take_along_axis(logits, indices, axis=-1)
    weights = np.exp(kept - kept[..., :1])
    return weights / weights.sum(axis=-1, keepdims=True), indices


def _stored(parts: Mapping[str, F64Array], part: str) -> tuple[F64Array, IntArray]:
    weights = parts[part + "_topk_weights"]
    indices = parts[part + "_topk_indices"].astype(np.int64)
    rest = 1 - weights.sum(axis=-1, keepdims=True)
    return np.concatenate([weights, rest], axis=-1), indices


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(parts["left"][first:last] @ parts["right"])
