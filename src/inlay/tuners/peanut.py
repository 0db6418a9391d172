"""PEANuT: a small network that reads the weight and writes its change, column by column.

W' = W + s B h        Zhong et al. 2024;  PEFT 0.21, tuners/peanut/layer.py

    h₀ = σ(A W₀),  hᵢ = σ(Eᵢ hᵢ₋₁) for the d encoders, then for the d decoders h ← σ(Dᵢ h) + h_{d−1−i}

W₀ is the weight before any adapter. A (r, out), E and D (r, r), B (out, r); σ is one of the activations of
transformers, those that have parameters of their own excepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "PEANUT"
DEEPEST = 64
ENCODERS, DECODERS = ([f"peanut_{side}coders.{i}" for i in range(DEEPEST)] for side in ("en", "de"))
REQUIRED = ("peanut_A", "peanut_B")
OPTIONAL = (*ENCODERS, *DECODERS)
SHARED = ()
WHOLE = True
ADDITIVE = False
FIELDS = frozenset({"depth", "act_fn", "scaling"})
IGNORED = frozenset({"init_weights"})
REFUSED: dict[str, str] = {}

ACTIVATION = "relu"  # PEFT's own, for a config without the field
_erf = np.frompyfunc(math.erf, 1, 1)


def _normal(x: F64Array) -> F64Array:
    """The distribution function of the normal distribution."""
    return np.asarray(0.5 * (1 + np.asarray(_erf(x / math.sqrt(2)), np.float64)))


def _logistic(x: F64Array) -> F64Array:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _gelu_by_tanh(x: F64Array) -> F64Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _softplus(x: F64Array) -> F64Array:
    return np.asarray(np.logaddexp(0.0, x))


# transformers.activations.ACT2FN (5.23) without `prelu` and `xielu`, which have parameters
ACTIVATIONS: dict[str, Callable[[F64Array], F64Array]] = {
    "gelu": lambda x: x * _normal(x),
    "gelu_10": lambda x: np.clip(x * _normal(x), -10, 10),
    "gelu_accurate": _gelu_by_tanh,
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_new": _gelu_by_tanh,
    "gelu_python": lambda x: x * _normal(x),
    "gelu_python_tanh": _gelu_by_tanh,
    "gelu_pytorch_tanh": _gelu_by_tanh,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: _normal((x - 0.707107) / 0.282095),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "quick_gelu": lambda x: x * _logistic(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": _logistic,
    "silu": lambda x: x * _logistic(x),
    "sqrtsoftplus": lambda x: np.sqrt(np.where(x > 20, x, _softplus(x))),  # torch's softplus is straight from there
    "swish": lambda x: x * _logistic(x),
    "tanh": np.tanh,
}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Depth, activation and strength."""
    scaling = raw.get("scaling")
    return {
        "depth": raw.get("depth") or 0,
        "activation": str(raw.get("act_fn") or ACTIVATION),
        "scaling": 1.0 if scaling is None else float(scaling),
    }


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    depth, a, b = settings["depth"], shapes["peanut_A"], shapes["peanut_B"]
    if not isinstance(depth, int) or isinstance(depth, bool):
        return f"depth must be a whole number, found {depth!r:.80}"
    if settings["activation"] not in ACTIVATIONS:
        return f"act_fn {settings['activation']!r} is none of {', '.join(ACTIVATIONS)}"
    if len(shape) != 2 or len(a) != 2 or a[1] != shape[0] or b != a[::-1]:
        return f"peanut_A {a} and peanut_B {b} do not read and write columns of a weight {shape}"
    inner = {name: s for name, s in shapes.items() if name not in REQUIRED}
    if inner.keys() != {*ENCODERS[:depth], *DECODERS[:depth]} or depth > DEEPEST:
        return f"has {', '.join(sorted(inner)) or 'no encoders'}, and depth is {depth}"
    wrong = sorted(f"{name} {s}" for name, s in inner.items() if s != (a[0], a[0]))
    return f"{', '.join(wrong)}: should be ({a[0]}, {a[0]})" if wrong else None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The parts as they are."""
    return parts


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """The whole matrix."""
    assert weight.shape == shape, f"PEANuT needs all of {shape}, not {weight.shape}"
    act, depth = ACTIVATIONS[settings["activation"]], settings["depth"]
    with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are found where the result is
        hidden = act(parts["peanut_A"] @ base)
        passed = []
        for encoder in ENCODERS[:depth]:
            passed.append(hidden)
            hidden = act(parts[encoder] @ hidden)
        for decoder in DECODERS[:depth]:
            hidden = act(parts[decoder] @ hidden) + passed.pop()
        change = settings["scaling"] * (parts["peanut_B"] @ hidden)
        return np.asarray(np.where(change == 0, weight, weight + change))
