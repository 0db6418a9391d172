"""LoHa: the elementwise product of two low-rank matrices, added.

W' = W + alpha/r · (w1_a w1_b) ∘ (w2_a w2_b)        Hyeon-Woo et al. 2022 (FedPara), LyCORIS

On convolutions with `use_effective_conv2d` each factor is a core t (r, r, k…) between w_a (r, out) and w_b (r, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "LOHA"
REQUIRED = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
OPTIONAL = ("hada_t1", "hada_t2")
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"alpha", "use_effective_conv2d"})
IGNORED = frozenset({"rank_dropout", "module_dropout", "init_weights", "rank_dropout_scale"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The scaling, alpha / r."""
    return {"scaling": (8.0 if alpha is None else alpha) / rank}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if ("hada_t1" in shapes) != ("hada_t2" in shapes):
        return "one of hada_t1, hada_t2 is missing"
    for i in "12":
        a, b, core = shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"], shapes.get(f"hada_t{i}")
        if len(a) != 2 or len(b) != 2:
            fits = False
        elif core is None:
            fits = a[1] == b[0] and (a[0], b[1]) == (shape[0], math.prod(shape[1:]))
        else:
            kernel = (shape[2], 1) if len(shape) == 3 else shape[2:]  # PEFT's core has always two kernel axes
            fits = len(shape) > 2 and core == (a[0], b[0], *kernel) and (a[1], b[1]) == shape[:2]
        if not fits:
            with_core = f" with core {core}" if core else ""
            return f"hada_w{i}_a {a} and hada_w{i}_b {b}{with_core} do not make {shape}"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """With a core, w_b and the core contracted to (r, in·k…) once, and w_a turned to (out, r)."""
    if "hada_t1" not in parts:
        return parts
    made = {}
    for i in "12":
        core, b = parts[f"hada_t{i}"], parts[f"hada_w{i}_b"]
        made[f"hada_w{i}_a"] = parts[f"hada_w{i}_a"].T
        made[f"hada_w{i}_b"] = np.einsum("ij...,jr->ir...", core, b).reshape(core.shape[0], -1)
    return made


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    one, two = (parts[f"hada_w{i}_a"][first:last] @ parts[f"hada_w{i}_b"] for i in "12")
    return np.asarray(settings["scaling"] * one * two)
