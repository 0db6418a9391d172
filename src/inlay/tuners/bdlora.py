"""BD-LoRA: LoRA with one factor that is block-diagonal, stored block above block.

W' = W + s · B A        PEFT's BdLoraConfig; the blocks of A (r, in/n) or of B (out, r/n) lie on the diagonal

Which factor it is follows from its shape; the patterns of the config say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners import variants

REQUIRED = variants.NAMES
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = True


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Number of blocks and scaling."""
    blocks = raw["use_bdlora"].get("nblocks") if isinstance(raw["use_bdlora"], dict) else None
    return {"blocks": int(blocks or 1), "scaling": variants.scaling(raw, rank, alpha)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    a, b, n = shapes["lora_A"], shapes["lora_B"], settings["blocks"]
    if len(shape) == len(a) == len(b) == 2:
        for wide_a, wide_b in ((1, 1), (n, 1), (1, n)):
            full = {"lora_A": (a[0], a[1] * wide_a), "lora_B": (b[0], b[1] * wide_b)}
            divides = (wide_a == 1 or a[0] % n == 0) and (wide_b == 1 or b[0] % n == 0)
            if divides and variants.check_pair(full, shape) is None:
                return None
    return f"lora_A {a} and lora_B {b} in {n} blocks do not make {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The factors with their blocks on the diagonal."""
    a, b, n = parts["lora_A"], parts["lora_B"], settings["blocks"]
    if a.shape[1] != shape[1]:
        a = _on_diagonal(a, n)
    if b.shape[1] != a.shape[0]:
        b = _on_diagonal(b, n)
    return {"lora_A": a, "lora_B": b}


def _on_diagonal(stacked: F64Array, count: int) -> F64Array:
    """(rows, cols) of `count` blocks, one above the other -> (rows, count · cols)."""
    rows, cols = stacked.shape[0] // count, stacked.shape[1]
    full = np.zeros((stacked.shape[0], count * cols))
    for i in range(count):
        full[i * rows : (i + 1) * rows, i * cols : (i + 1) * cols] = stacked[i * rows : (i + 1) * rows]
    return full


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(settings["scaling"] * (parts["lora_B"][first:last] @ parts["lora_A"]))
