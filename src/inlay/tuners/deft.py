"""DEFT: what a weight does within some directions of its outputs is removed, and something else put there.

W' = W + Q (s R − Uᵀ W₀)        PEFT 0.21, tuners/deft;  s = alpha / r, or 1 without alpha

relu:  Q = P, U = relu(P)        qr:  Q = U = the orthonormal factor of P        para:  no R

`deft_P` (out, r) holds the directions, `deft_R` (r, in) what is put there. W₀ is the weight before any adapter,
also where others came first. With qr and R the result depends on the signs of the columns of Q; they are those of
LAPACK's Householder reflections, which numpy and torch on a CPU both call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "DEFT"
REQUIRED = ("deft_P",)
OPTIONAL = ("deft_R",)
SHARED = ()
WHOLE = True  # Uᵀ W₀ sums over all outputs
ADDITIVE = False
FIELDS = frozenset({"decomposition_method", "alpha", "para"})
IGNORED = frozenset({"deft_dropout", "init_weights", "init_scale"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """How Q and U come from P, alpha or None, whether there is no R. The rank is P's: PEFT caps it at the outputs."""
    method = str(raw.get("decomposition_method") or "relu")
    return {"method": method, "alpha": alpha or None, "removes_only": bool(raw.get("para"))}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found = shapes["deft_P"]
    if settings["method"] not in ("relu", "qr"):
        return f"decomposition_method {settings['method']!r} is neither relu nor qr"
    if len(shape) != 2 or len(found) != 2 or found[0] != shape[0] or not 0 < found[1] <= shape[0]:
        return f"deft_P {found} does not fit a weight {shape}"
    wanted = None if settings["removes_only"] else (found[1], shape[1])
    if shapes.get("deft_R") != wanted:
        return f"deft_R is {shapes.get('deft_R', 'missing')}, and {wanted or 'none (para)'} fits a weight {shape}"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """`into` Q (out, r), `from` U (out, r), and `put` s R (r, in), zero for para."""
    into = np.linalg.qr(parts["deft_P"])[0] if settings["method"] == "qr" else parts["deft_P"]
    rank = into.shape[1]
    scaling = 1.0 if settings["alpha"] is None else settings["alpha"] / rank
    put = np.zeros((rank, shape[1])) if settings["removes_only"] else scaling * parts["deft_R"]
    return {"into": into, "from": into if settings["method"] == "qr" else np.maximum(into, 0.0), "put": put}


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """The whole weight."""
    assert base.shape == shape and first == 0, (base.shape, shape, first)
    return np.asarray(weight + parts["into"] @ (parts["put"] - parts["from"].T @ base))
