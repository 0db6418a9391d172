"""AdaLoRA: a low-rank pair with a weight for each component, of which training keeps the most useful.

W' = W + alpha / (init_r + 1e-5) · B (A ∘ E)        Zhang et al. 2023; PEFT's SVDLinear

PEFT divides by the rank at the start plus 1e-5, not by the rank that is left in the file. For a convolution
A is (r, in·k·k).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "ADALORA"
REQUIRED = ("lora_A", "lora_B", "lora_E")
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"init_r", "lora_alpha"})
IGNORED = frozenset({
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "lora_dropout",
    "init_lora_weights", "use_rslora", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "monteclora_config", "velora_config",
    "merge_weights",
})  # fmt: skip
REFUSED = {
    "use_dora": "PEFT has no DoRA for AdaLoRA",
    "lora_bias": "PEFT has no LoRA bias for AdaLoRA",
    "use_qalora": "PEFT has no QALoRA for AdaLoRA",
    "use_bdlora": "PEFT has no block-diagonal AdaLoRA",
    "kasa_config": "PEFT has no KaSA for AdaLoRA",
    "arrow_config": "Arrow routes between adapters per token, so no merged weight equals it",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so no merged weight equals it",
    "target_parameters": "AdaLoRA on bare parameters is not supported",
}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The scaling; PEFT takes the rank for an alpha that is not positive."""
    start = raw.get("init_r") or 12
    strength = alpha if alpha is not None and alpha > 0 else float(start)
    return {"scaling": strength / (start + 1e-5)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    a, b, e = (shapes[name] for name in REQUIRED)
    pair = len(a) == len(b) == 2 and a[0] == b[1] and (b[0], a[1]) == (shape[0], math.prod(shape[1:]))
    return None if pair and e == (a[0], 1) else f"lora_A {a}, lora_B {b} and lora_E {e} do not make {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """A with its component weights."""
    return {"right": parts["lora_A"] * parts["lora_E"], "left": parts["lora_B"]}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    return np.asarray(settings["scaling"] * (parts["left"][first:last] @ parts["right"]))
