"""IA³: every input or every output of a layer is multiplied by a trained number.

W' = W ∘ l        Liu et al. 2022, section 3.3

l is (1, in) on feed-forward modules, where it scales what goes in, and (out, 1) on the others, where it scales
what comes out, the bias included. On Conv2d and Conv3d it is (1, channels, 1, …) both ways (PEFT 0.21,
tuners/ia3/layer.py), so there the list of feed-forward modules says which it is; a convolution in groups, whose weight
is (out, in / groups, …), takes for each group of outputs the numbers of its own inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "IA3"
REQUIRED = ("ia3_l",)
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = False
FIELDS = frozenset({"feedforward_modules"})
IGNORED = frozenset({"init_ia3_weights"})
REFUSED: dict[str, str] = {}
LISTED_IN = "feedforward_modules"  # the planner sets `listed` to whether this names the module


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing of its own: the shape of l, and `listed`, say what it scales."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found = shapes["ia3_l"]
    if len(shape) == 2:
        inputs, outputs = (1, shape[1]), (shape[0], 1)
        return None if found in (inputs, outputs) else f"ia3_l {found} fits neither {inputs} nor {outputs}"
    if len(shape) not in (4, 5):
        return f"IA3 of PEFT is for Linear, Conv2d and Conv3d, the weight is {shape}"
    if settings.get("listed") is None:
        return "ia3_l of a convolution scales inputs or outputs as feedforward_modules says, which is not set"
    if len(found) != len(shape) or found[:1] + found[2:] != (1,) * (len(shape) - 1):
        return f"ia3_l {found} is no row of channels for the convolution {shape}"
    if not settings["listed"]:
        return None if found[1] == shape[0] else f"ia3_l has {found[1]} numbers for {shape[0]} outputs"
    groups, rest = divmod(found[1], shape[1])
    if groups and not rest and shape[0] % groups == 0:
        return None
    return f"ia3_l has {found[1]} numbers for inputs in groups of {shape[1]}, and there are {shape[0]} outputs"


def _scales_inputs(found: tuple[int, ...], settings: Mapping[str, Any]) -> bool:
    """Whether l of this shape belongs to what goes in."""
    return found[0] == 1 and (bool(settings.get("listed")) or (len(found) == 2 and found[1] != 1))


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """l as a matrix, a row for each output, for each group of outputs, or for all of them."""
    scale = parts["ia3_l"]
    if not _scales_inputs(scale.shape, settings):
        return {"ia3_l": scale.reshape(-1, 1)}
    kernel = int(np.prod(shape[2:]))
    return {"ia3_l": np.repeat(scale.reshape(-1, shape[1]), kernel, axis=1)}


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on, each element multiplied once."""
    scale = parts["ia3_l"]
    rows = np.arange(first, first + len(weight)) * len(scale) // shape[0] if len(scale) > 1 else slice(None)
    return np.asarray(weight * scale[rows])


def touches_bias(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> bool:
    """Where outputs are scaled, the bias is one of their terms."""
    return not _scales_inputs(shapes["ia3_l"], settings)


def merge_bias(bias: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any]) -> F64Array:
    """(out,) in and out."""
    return np.asarray(bias * parts["ia3_l"].reshape(-1))
