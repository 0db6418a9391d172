"""OFT: the inputs of a layer are rotated, block by block.

W' = W Rᵀ,  R = block_diag(R₁ …),  Rᵢ = (I − Qᵢ)(I + Qᵢ)⁻¹        Qiu et al. 2023; Liu et al. 2024

Qᵢ is skew-symmetric, stored as its upper triangle row by row. With `use_cayley_neumann` the inverse is a series
cut after n terms: R = I + 2Q + 2Q² + … + Qⁿ⁻¹. PEFT 0.16 and 0.17 trained with 2Qⁿ⁻¹ for the last term; so did a file
without `peft_version`, which 0.18 brought together with the new term (tuners/oft/layer.py and config.py of 0.16.0,
0.17.1 and 0.18.0). With `coft` each Q is first brought within eps/√blocks.
An embedding (vocabulary, dim) becomes W R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "OFT"
REQUIRED = ()
OPTIONAL = ("oft_R", "oft_embedding_R")
SHARED = ()
WHOLE = False
ADDITIVE = False
FIELDS = frozenset({"oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"})
IGNORED = frozenset({"module_dropout", "init_weights"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Terms of the series (0 for the inverse itself: files from before the field), eps of coft or None."""
    neumann = bool(raw.get("use_cayley_neumann", False))
    return {
        "terms": int(raw.get("num_cayley_neumann_terms") or 5) if neumann else 0,
        "doubled": neumann and _before_18(raw),
        "eps": float(raw.get("eps") or 6e-5) if raw.get("coft") else None,
        "dated": "oft_block_size" not in raw,
    }


def _before_18(raw: Mapping[str, Any]) -> bool:
    numbers = [int(n) for n in str(raw.get("peft_version") or "").split(".")[:2] if n.isdigit()]
    return numbers < [0, 18]  # none at all is less


def remark(raw: Mapping[str, Any]) -> str | None:
    """Where PEFT of today gives another weight than the one that was trained."""
    if not raw.get("use_cayley_neumann") or not _before_18(raw):
        return None
    trained = raw.get("peft_version") or "before 0.18, since the config does not say which"
    return f"merged with the series of the PEFT that trained it ({trained}); later versions halve its last term"


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if settings["dated"]:
        return "the config has no oft_block_size: files of PEFT 0.13 and older have another form of OFT"
    if len(shapes) != 1:
        return f"has {', '.join(sorted(shapes))}; one of {', '.join(OPTIONAL)} is needed"
    if math.prod(shape[2:]) > 1:
        return "OFT on a kernel larger than 1 is refused: PEFT's own merge of it differs from its forward"
    (found,) = shapes.values()
    size = _block_size(found)
    if size is None or shape[1] % size or found[0] not in (1, shape[1] // size):
        return f"the rotations {found} do not fit {shape[1]} inputs"
    return None


def _block_size(shape: tuple[int, ...]) -> int | None:
    """b from the b (b − 1) / 2 elements of an upper triangle."""
    if len(shape) != 2:
        return None
    size = round((1 + math.sqrt(1 + 8 * shape[1])) / 2)
    return size if size * (size - 1) // 2 == shape[1] else None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """`turn` (blocks or 1, b, b): what each block of a row is multiplied with from the right."""
    ((name, vectors),) = parts.items()
    size = _block_size(vectors.shape)
    assert size is not None
    skew = np.zeros((len(vectors), size, size))
    rows, cols = np.triu_indices(size, 1)
    skew[:, rows, cols] = vectors
    skew -= skew.transpose(0, 2, 1)
    if settings["eps"] is not None:
        skew = _within(skew, settings["eps"] / math.sqrt(len(skew)))
    rotation = _neumann(skew, settings["terms"], settings["doubled"]) if settings["terms"] else _cayley(skew)
    return {"turn": rotation if name == "oft_embedding_R" else rotation.transpose(0, 2, 1)}


def _within(skew: F64Array, eps: float) -> F64Array:
    length = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
    return np.asarray(np.where(length <= eps, skew, eps * skew / np.where(length == 0, 1, length)))


def _cayley(skew: F64Array) -> F64Array:
    """(I − Q)(I + Q)⁻¹; both factors commute, so this is the solution X of (I + Q) X = I − Q."""
    one = np.eye(skew.shape[-1])
    return np.asarray(np.linalg.solve(one + skew, one - skew))


def _neumann(skew: F64Array, terms: int, doubled: bool) -> F64Array:
    """I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹, or with the last one doubled.

    As PEFT cuts it off: three terms are I + 2Q + 2Q² + Q³ where the last is not doubled.
    """
    total = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    power = skew
    for _ in range(1, terms if doubled else min(terms, max(3, terms - 1))):
        total += 2 * power
        power = power @ skew
    return total if doubled or terms < 3 else total + power


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on, each turned on its own."""
    turn = parts["turn"]
    blocks = weight.reshape(len(weight), -1, turn.shape[-1])
    turned = np.einsum("nkj,kji->nki", blocks, np.broadcast_to(turn, (blocks.shape[1], *turn.shape[1:])))
    return np.asarray(turned.reshape(weight.shape))
