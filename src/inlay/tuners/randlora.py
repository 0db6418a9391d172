"""RandLoRA: a full-rank change, a sum of random low-rank pairs with trained weights.

W' = W + alpha/r · Σ_f Q[:, f] P[f, :]        Albert et al. 2025, section 4;  transposed if out < in

With small = min(out, in), large = max(out, in) and n = ⌈small / r⌉ bases, P (r n, small) is the shared A with its
weights, λ[i, m] A[i] γ[m] in row i n + m, and Q (large, r n) the shared B[:large, :n] with B[:, m, i] in column
m r + i. That the two count pairs in different orders is PEFT's, in training as in merging, so it is kept.

With `save_projection` false A and B are drawn again from `projection_prng_key`, with the largest sizes among the
layers (PEFT 0.21, tuners/randlora/model.py): uniformly in bfloat16, or, `sparse`, −1, 0 and 1 from uniform numbers in
float32, then divided by their standard deviation in that type. A machine whose accelerator lacks bfloat16 draws the
first kind in float16; no file says so, and those that have it are by far the most, so bfloat16 is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from inlay.dtypes import BF16, F32, DType, F64Array
from inlay.tuners.torch_random import F32Array, in_type, kaiming_bound, uniform

PEFT_TYPE = "RANDLORA"
REQUIRED = ("randlora_lambda", "randlora_gamma")
OPTIONAL = ("randlora_A", "randlora_B")  # PEFT repeats the shared pair in every module
SHARED = ("randlora_A", "randlora_B")
MISSING = "the projections are not in the file; load the adapter with PEFT and save it with save_projection=True"
DRAWN = True  # the shared parts may be drawn again, for the largest sizes among the layers
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"randlora_alpha", "save_projection", "projection_prng_key", "sparse", "very_sparse"})
IGNORED = frozenset({"randlora_dropout", "init_weights"})
REFUSED: dict[str, str] = {}

ALPHA = 640.0  # PEFT's own, for a config without the field


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The scaling, alpha / r, and how the projections are drawn where they are not in the file."""
    key, kind = raw.get("projection_prng_key"), ""
    if raw.get("save_projection") is False:
        kind = "very_sparse" if raw.get("very_sparse") else "sparse" if raw.get("sparse") else "dense"
    scaling = (ALPHA if alpha is None else alpha) / rank
    return {"scaling": scaling, "key": 0 if key is None else int(key), "rank": rank, "drawn": kind}


def remark(raw: Mapping[str, Any]) -> str | None:
    """Where a merge relies on what the file does not say."""
    if raw.get("save_projection") is False and not raw.get("sparse") and not raw.get("very_sparse"):
        return "the projections are drawn again in bfloat16, as on a CPU and on GPUs that have it"
    return None


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if not set(SHARED) <= shapes.keys() and "largest" not in settings:
        return MISSING
    a, b = drawn_shapes(settings) if "largest" in settings else (shapes["randlora_A"], shapes["randlora_B"])
    weights, scales = (shapes[name] for name in REQUIRED)
    if len(shape) != 2 or len(a) != 3 or len(b) != 3 or a[0] < 1:
        return f"randlora_A {a} and randlora_B {b} do not make {shape}"
    rank, small, large = a[0], min(shape), max(shape)
    if rank != settings["rank"]:
        return f"rank {rank} in the file, {settings['rank']} in the config"
    count = -(-small // rank)
    if a[1] != 1 or a[2] < small or b[0] < large or b[1] < count or b[2] != rank:
        return f"randlora_A {a} and randlora_B {b} are too small for {shape}"
    if weights == (rank, count) and scales == (count, small):
        return None
    return f"randlora_lambda {weights} and randlora_gamma {scales} do not make {shape} from {count} bases"


def drawn_shapes(settings: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B, for the largest number of outputs and of inputs."""
    rank, small, large = settings["rank"], min(settings["largest"]), max(settings["largest"])
    return (rank, 1, small), (large, -(-small // rank), rank)


@lru_cache(maxsize=1)
def _drawn(key: int, kind: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[F32Array, F32Array]:
    """A and B. The last draw is kept: all layers share it."""
    generator = np.random.RandomState(key % (1 << 32))
    if kind != "dense":
        sparsity = 3.0 if kind == "sparse" else math.sqrt(a[2])
        left, right = (_signs(uniform(generator, shape, 0.0, 1.0), sparsity) for shape in (a, b))
        return _normalised(left, F32), _normalised(right, F32)
    bounds = [kaiming_bound(columns, math.sqrt(5)) for columns in (a[2], b[2])]
    left = uniform(generator, a, -bounds[0], bounds[0], BF16)
    right = uniform(generator, (b[1], b[0], b[2]), -bounds[1], bounds[1], BF16)  # one base after the other
    return _normalised(left, BF16), _normalised(right, BF16).transpose(1, 0, 2)


def _signs(x: F32Array, sparsity: float) -> F32Array:
    """−1 and 1 for one number in 2 · sparsity each, 0 for the others (Achlioptas 2003; Li et al. 2006)."""
    share = 1 / (2 * sparsity)
    return (x > np.float32(1 - share)).astype(np.float32) - (x < np.float32(share))


def _normalised(x: F32Array, dtype: DType) -> F32Array:
    """`x / x.std()` in `dtype`; not finite where all are the same."""
    flat = x.reshape(-1)
    squares = np.einsum("i,i->", flat, flat, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (squares - flat.size * np.mean(flat, dtype=np.float64) ** 2) / np.float64(flat.size - 1)
        return in_type(x / in_type(np.sqrt(variance).astype(np.float32), dtype), dtype)


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The pair of this layer: left (out, r n), right (r n, in)."""
    weights, scales = (parts[name] for name in REQUIRED)
    count, small = scales.shape
    a, b = parts.get("randlora_A"), parts.get("randlora_B")
    if a is None or b is None:
        pair = _drawn(settings["key"], settings["drawn"], *drawn_shapes(settings))
        a, b = pair[0].astype(np.float64), pair[1][: max(shape), :count].astype(np.float64)
    p = (weights[:, :, None] * a[:, :, :small] * scales).reshape(-1, small)
    q = b[: max(shape), :count].reshape(max(shape), -1)
    return {"left": q, "right": p} if small == shape[1] else {"left": p.T, "right": q.T}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(settings["scaling"] * (parts["left"][first:last] @ parts["right"]))
