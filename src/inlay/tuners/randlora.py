"""RandLoRA: a full-rank change, a sum of random low-rank pairs with trained weights.

W' = W + alpha/r · Σ_f Q[:, f] P[f, :]        Albert et al. 2025, section 4;  transposed if out < in

With small = min(out, in), large = max(out, in) and n = ⌈small / r⌉ bases, P (r n, small) is the shared A with its
weights, λ[i, m] A[i] γ[m] in row i n + m, and Q (large, r n) the shared B[:large, :n] with B[:, m, i] in column
m r + i. That the two count pairs in different orders is PEFT's, in training as in merging, so it is kept.
Projections that were not saved would have to be drawn again as one version of torch draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "RANDLORA"
REQUIRED = ("randlora_lambda", "randlora_gamma")
OPTIONAL = ("randlora_A", "randlora_B")  # PEFT repeats the shared pair in every module
SHARED = ("randlora_A", "randlora_B")
MISSING = "the projections are not in the file; load the adapter with PEFT and save it with save_projection=True"
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"randlora_alpha", "save_projection"})
IGNORED = frozenset({"projection_prng_key", "sparse", "very_sparse", "randlora_dropout", "init_weights"})
REFUSED: dict[str, str] = {}

ALPHA = 640.0  # PEFT's own, for a config without the field


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The scaling, alpha / r."""
    return {"scaling": (ALPHA if alpha is None else alpha) / rank}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if not set(SHARED) <= shapes.keys():
        return MISSING
    a, b, weights, scales = (shapes[n] for n in (*SHARED, *REQUIRED))
    if len(shape) != 2 or len(a) != 3 or len(b) != 3 or a[0] < 1:
        return f"randlora_A {a} and randlora_B {b} do not make {shape}"
    rank, small, large = a[0], min(shape), max(shape)
    count = -(-small // rank)
    if a[1] != 1 or a[2] < small or b[0] < large or b[1] < count or b[2] != rank:
        return f"randlora_A {a} and randlora_B {b} are too small for {shape}"
    if weights == (rank, count) and scales == (count, small):
        return None
    return f"randlora_lambda {weights} and randlora_gamma {scales} do not make {shape} from {count} bases"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The pair of this layer: left (out, r n), right (r n, in)."""
    weights, scales = (parts[name] for name in REQUIRED)
    count, small = scales.shape
    p = (weights[:, :, None] * parts["randlora_A"][:, :, :small] * scales).reshape(-1, small)
    q = parts["randlora_B"][: max(shape), :count].reshape(max(shape), -1)
    return {"left": q, "right": p} if small == shape[1] else {"left": p.T, "right": q.T}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(settings["scaling"] * (parts["left"][first:last] @ parts["right"]))
