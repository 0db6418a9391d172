"""LoKr: a Kronecker product of two small matrices, added.

W' = W + alpha/r · w1 ⊗ w2        Yeh et al. 2024 (LyCORIS)

Either factor may itself be a low-rank pair, and w2 of a convolution a core t2 between its pair. Row
a·rows(w2) + b of the product is row a of w1 times row b of w2.

Where w2 of a Conv1d is one tensor (c, d, k), PEFT multiplies w1 with its last two axes, (d, k), and reads the
(c, rows(w1)·d, cols(w1)·k) that come out as (out, in, k), in training as in merging; so it is done here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "LOKR"
REQUIRED = ()
OPTIONAL = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"alpha", "use_effective_conv2d", "decompose_both", "decompose_factor"})
IGNORED = frozenset({"rank_dropout", "module_dropout", "init_weights", "rank_dropout_scale"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The scaling, alpha / r."""
    return {"scaling": (8.0 if alpha is None else alpha) / rank}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    one, two = _first(shapes), _second(shapes, shape)
    if one is None or two is None:
        return f"has {', '.join(sorted(shapes))}: not two factors"
    if (one[0] * two[0], one[1] * two[1]) == (shape[0], math.prod(shape[1:])):
        return None
    return f"the factors {one} and {two} do not make {shape}"


def _first(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    if "lokr_w1" in shapes:
        found = shapes["lokr_w1"]
        return (found[0], found[1]) if len(found) == 2 else None
    a, b = shapes.get("lokr_w1_a", ()), shapes.get("lokr_w1_b", ())
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else None


def _second(shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows, and columns with the kernel flattened."""
    if "lokr_w2" in shapes:
        found = shapes["lokr_w2"]
        return (found[0], math.prod(found[1:])) if len(found) > 1 and found[2:] == shape[2:] else None
    a, b, core = shapes.get("lokr_w2_a", ()), shapes.get("lokr_w2_b", ()), shapes.get("lokr_t2")
    if len(a) != 2 or len(b) != 2:
        return None
    if core is not None:
        kernel = (shape[2], 1) if len(shape) == 3 else shape[2:]  # PEFT's core has always two kernel axes
        return (a[1], b[1] * math.prod(kernel)) if core == (a[0], b[0], *kernel) else None
    return (a[0], b[1]) if a[1] == b[0] else None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The two factors as matrices, or the whole product where it is not one of rows."""
    one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        two = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        two = np.einsum("ij...,ip,jr->pr...", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        two = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    if two.ndim == 3:
        return {"whole": np.asarray(np.kron(one[None], two).reshape(shape[0], -1), np.float64)}
    return {"w1": one, "w2": np.ascontiguousarray(two).reshape(two.shape[0], -1)}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    if "whole" in parts:
        return np.asarray(settings["scaling"] * parts["whole"][first:last])
    one, two = parts["w1"], parts["w2"]
    a, b = np.divmod(np.arange(first, last), len(two))
    product = one[a][:, :, None] * two[b][:, None, :]
    return np.asarray(settings["scaling"] * product.reshape(last - first, -1))
