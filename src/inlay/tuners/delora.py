"""DeLoRA: a low-rank pair of fixed length, whose length alone is trained beside its direction.

W' = W + B diag(λ / (r ‖aᵢ‖ ‖bᵢ‖)) A diag(‖w‖)        Bini et al. 2025, section 3.2

aᵢ is row i of A, bᵢ column i of B; PEFT takes no length below 1e-4, so that B = 0 changes nothing. ‖w‖ (in,) are
the lengths of the columns of the weight that was trained on. They are in the file, so a later change of the base
does not move the delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "DELORA"
REQUIRED = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS: frozenset[str] = frozenset()
IGNORED = frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"})  # λ starts there
REFUSED: dict[str, str] = {}

SHORTEST = 1e-4


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: λ is in the file, and r is the number of rows of A."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    a, b, strength, lengths = (shapes[name] for name in REQUIRED)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != shape:
        return f"delora_A {a} and delora_B {b} do not make {shape}"
    if strength != (1,) or lengths != shape[1:]:
        return f"delora_lambda {strength} and delora_w_norm {lengths} do not fit {shape}"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """B with the strength of each component, and A with the lengths of the columns."""
    a, b = parts["delora_A"], parts["delora_B"]
    lengths = np.maximum(np.linalg.norm(a, axis=1), SHORTEST) * np.maximum(np.linalg.norm(b, axis=0), SHORTEST)
    return {"left": b * (parts["delora_lambda"] / len(a) / lengths), "right": a * parts["delora_w_norm"]}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(parts["left"][first:last] @ parts["right"])
