"""QA-LoRA: a low-rank pair on inputs that are summed by groups.

y = W x + s · (P / g) · B A (sums of x over groups of g)        P = in / g groups, A (r, P), B (out, r)

so that each row of the delta is constant within a group of columns:

    W'[n, k] = W[n, k] + s · (P / g) · (B A)[n, k // g]

Xu et al. 2023, section 3.3, whose scaling has no P / g. PEFT 0.21 takes the mean of a group times P
(tuners/lora/variants.py, QALoraLinearVariant.forward), and so is the factor here. It trains it on GPTQ alone,
where PEFT cannot merge it; on a layer in floats PEFT trains a plain LoRA whatever the flag says.
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
NEEDS_CODES = (
    "is QALoRA, which is trained on a layer of GPTQ; the base stores this weight in floats: give the GPTQ checkpoint "
    "that it was trained on with --model (it is decoded, or keeps its codes with --keep_quant)"
)
GROUP_SIZE = 16  # PEFT's own, for a config without the field


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Columns in a group, and the scaling."""
    group = raw.get("qalora_group_size")
    return {"group": GROUP_SIZE if group is None else int(group), "scaling": variants.scaling(raw, rank, alpha)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    a, b, group = shapes["lora_A"], shapes["lora_B"], settings["group"]
    if group < 1 or len(shape) != 2 or shape[1] % group:
        return f"qalora_group_size {group} does not divide the columns of {shape}"
    if len(a) == 2 and variants.check_pair({"lora_A": (a[0], a[1] * group), "lora_B": b}, shape) is None:
        return None
    plain = "; it is a plain pair: set use_qalora to false" if variants.check_pair(shapes, shape) is None else ""
    return f"lora_A {a} and lora_B {b} on groups of {group} columns do not make {shape}{plain}"


prepare = variants.prepare


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    group = settings["group"]
    factor = settings["scaling"] * (shape[1] // group / group)
    return np.repeat(factor * (parts["lora_B"][first:last] @ parts["lora_A"]), group, axis=1)
