"""RoAd: the outputs of a layer are rotated in pairs, the bias included.

y₁' = c₁ y₁ − s₁ y₂,  y₂' = s₂ y₁ + c₂ y₂,  c = α cos θ,  s = α sin θ        Liao and Monz 2024, eq. 4

so W' = R W and b' = R b. Outputs are cut into groups of `group_size`; one of the first half of a group is paired
with the one in the same place of the second half. `road_theta` and `road_alpha` are vectors of one length:

    road_1    out/2    both outputs of a pair share θ and α
    road_2    out      each output has its own
    road_4    2 out    in each group: those of c, then those of s
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "ROAD"
REQUIRED = ("road_theta", "road_alpha")
OPTIONAL = ()
SHARED = ()
WHOLE = True  # a pair lies half a group apart
ADDITIVE = False
FIELDS = frozenset({"variant", "group_size"})
IGNORED = frozenset({"init_weights"})
REFUSED: dict[str, str] = {}

HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}  # numbers for each pair of outputs
GROUP_SIZE = 64  # PEFT's own, for a config without the field


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The variant and the outputs in a group."""
    group = raw.get("group_size")
    return {"variant": str(raw.get("variant") or "road_1"), "group": GROUP_SIZE if group is None else int(group)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    variant, group = settings["variant"], settings["group"]
    if variant not in HALVES:
        return f"variant {variant!r} is none of {', '.join(HALVES)}"
    if len(shape) != 2:
        return f"RoAd is for matrices, the weight is {shape}"
    if group < 2 or group % 2 or shape[0] % group:
        return f"groups of {group} do not divide the {shape[0]} outputs into pairs"
    wanted = (shape[0] // 2 * HALVES[variant],)
    for name in REQUIRED:
        if shapes[name] != wanted:
            return f"{name} is {shapes[name]}, and {wanted} fits a weight {shape}"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """`own` and `other` (groups, 2, group/2): what an output, and what its partner is multiplied with."""
    half = settings["group"] // 2
    theta, alpha = (parts[name].reshape(-1, HALVES[settings["variant"]], half) for name in REQUIRED)
    own, other = alpha * np.cos(theta), alpha * np.sin(theta)
    if settings["variant"] == "road_4":
        own, other = own[:, :2], other[:, 2:]
    pairs = (len(own), 2, half)
    return {"own": np.broadcast_to(own, pairs), "other": np.broadcast_to(other, pairs) * [[-1.0], [1.0]]}


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """The whole weight."""
    assert weight.shape == shape and first == 0, (weight.shape, shape, first)
    outputs = weight.reshape(*parts["own"].shape, -1)
    turned = parts["own"][..., None] * outputs + parts["other"][..., None] * outputs[:, ::-1]
    return np.asarray(turned.reshape(weight.shape))


def touches_bias(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> bool:
    """Always: the bias is a term of the outputs."""
    return True


def merge_bias(bias: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any]) -> F64Array:
    """(out,) in and out."""
    column = (len(bias), 1)
    return merge(bias[:, None], bias[:, None], prepare(parts, settings, column), settings, column, 0).reshape(-1)
