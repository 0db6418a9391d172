"""BOFT: the inputs of a layer are rotated by a butterfly of block rotations, and every output is scaled.

W' = s ∘ W (M_N … M₂ M₁)ᵀ,  Mᵢ = Pᵢ block_diag(Rᵢ₁ …) Pᵢᵀ        Liu et al. 2024
Rᵢⱼ = (I − Q)(I + Q)⁻¹,  Q = (X − Xᵀ) / 2

`boft_R` (N, blocks, b, b) holds the X, `boft_s` (out, 1) the scale, (1, out) on a convolution, which is the matrix
(out, in · kernel). The i-th permutation sorts halves of blocks within every 2ⁱ blocks, those at even places first:

    b/2 b/2 | b/2 b/2 | b/2 b/2 | b/2 b/2
     0   1     2   3     4   5     6   7         i = 0
     0   2     1   3     4   6     5   7         i = 1
     0   2     4   6     1   3     5   7         i = 2

The config's `boft_n_butterfly_factor` is not N: PEFT trains one factor where its CUDA extension is missing, and
saves the number that was asked for. The shapes tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import F64Array

PEFT_TYPE = "BOFT"
REQUIRED = ("boft_R", "boft_s")
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = False
FIELDS = frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor"})
IGNORED = frozenset({"boft_dropout", "init_weights"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: the shape of R says all."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found, scale, inputs = shapes["boft_R"], shapes["boft_s"], math.prod(shape[1:])
    wanted = (shape[0], 1) if len(shape) == 2 else (1, shape[0])
    if scale != wanted:
        return f"boft_s is {scale}, and {wanted} fits a weight {shape}"
    if len(found) != 4 or found[2] != found[3] or found[1] * found[2] != inputs:
        return f"boft_R {found} does not fit the {inputs} inputs of a weight {shape}"
    factors, blocks, size = found[:3]
    if factors < 1 or (factors > 1 and (size % 2 or blocks % 2 ** (factors - 1))):
        return f"boft_R {found} is no butterfly: {factors} factors need an even size and 2^{factors - 1} blocks"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """`turns` (N, blocks, b, b): what each block of a row is multiplied with from the right; `scale` (out, 1)."""
    free = parts["boft_R"]
    skew = (free - np.swapaxes(free, -1, -2)) / 2
    one = np.eye(free.shape[-1])
    # (I + Q)ᵀ = I − Q, and the factors commute: the transposed rotation solves (I − Q) X = I + Q.
    return {
        "turns": np.asarray(np.linalg.solve(one - skew, one + skew), np.float64),
        "scale": parts["boft_s"].reshape(-1, 1),
    }


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on, each rotated and scaled on its own."""
    rows, scale = weight, parts["scale"][first : first + len(weight)]
    for number, turn in enumerate(parts["turns"]):
        order = _order(rows.shape[1], number, turn.shape[-1])
        sorted_ = np.empty_like(rows)
        sorted_[:, order] = rows
        blocks = sorted_.reshape(len(rows), -1, turn.shape[-1]).transpose(1, 0, 2)
        rows = (blocks @ turn).transpose(1, 0, 2).reshape(rows.shape)[:, order]
    return np.asarray(scale * rows)


def _order(inputs: int, number: int, size: int) -> npt.NDArray[np.int64]:
    """Where the permutation of a factor takes each input from; none for the first."""
    places = np.arange(inputs)
    return places.reshape(-1, 2**number, 2, size // 2).swapaxes(1, 2).reshape(-1) if number else places
