"""GLoRA: a weight and its bias, each scaled element by element and shifted.

W' = W + W₀ ∘ A + B,  b' = b + b ∘ D + E + W₀ C        Chavan et al. 2023

W₀ is the weight before any adapter, also where others came first; D multiplies the bias as it is then. Which form A to
E have is seen in their names:

    Xd, Xu    their product: (out, r) and (r, in); for C (in, r) and (r, 1)
    X         one number for each row (out, 1), for D and E (out,), for C (in, 1); or one number (1,)
    zeros     nothing, at full size

So the bias of a layer with a C takes its whole weight, as the base has it, for one more part; Linear layers only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.errors import InputError

PEFT_TYPE = "GLORA"
REQUIRED = ()
OPTIONAL = (*(f"glora_{term}.{form}" for term in "ABCDE" for form in ("Xd", "Xu", "X", "zeros")),)
SHARED = ()
WHOLE = False
ADDITIVE = False  # A is a share of the base
FIELDS: frozenset[str] = frozenset()
IGNORED = frozenset({"config_A_B", "config_C", "config_D_E", "init_weights"})  # the names of the parts say the forms
REFUSED: dict[str, str] = {}

BASE_WEIGHT = "base_weight"  # a part of the bias that the planner adds: the layer's weight before any adapter
NEEDS_BIAS = True  # the parts that touch the bias are for nothing else


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: GLoRA has no scaling."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if len(shape) != 2:
        return f"GLoRA is for matrices, the weight is {shape}"
    return next((why for term in "ABCDE" if (why := _misfit(term, shapes, shape))), None)


def _misfit(term: str, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> str | None:
    """What does not fit in one of the five."""
    name = f"glora_{term}"
    found = {part.partition(".")[2]: s for part, s in shapes.items() if part.startswith(name + ".")}
    out, inputs = shape
    rank = found["Xu"][0] if found.get("Xu") else 0
    if term in "AB":
        fits: list[dict[str, tuple[int, ...]]] = [{"X": (out, 1)}, {"X": (1,)}, {"zeros": shape}]
        fits.append({"Xd": (out, rank), "Xu": (rank, inputs)})
    elif term == "C":
        fits = [{"X": (inputs, 1)}, {"zeros": (inputs, 1)}, {"Xd": (inputs, rank), "Xu": (rank, 1)}]
    else:
        fits = [{"X": (out,)}, {"X": (1,)}, {"zeros": (out,)}]
    return None if found in fits else f"{name} is {found or 'missing'}, and the weight is {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The parts without the zeros.

    Raises InputError where those are something else.
    """
    for name, part in parts.items():
        if name.endswith(".zeros") and part.any():
            raise InputError(f"{name} has other numbers than zeros, which no version of PEFT writes")
    return {name: part for name, part in parts.items() if not name.endswith(".zeros")}


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on."""
    last = first + len(weight)
    change = base * _rows("glora_A", parts, first, last) + _rows("glora_B", parts, first, last)
    return np.asarray(np.where(change == 0, weight, weight + change))


def _rows(name: str, parts: Mapping[str, F64Array], first: int, last: int) -> F64Array:
    """Rows of A or B, as far as they need not be spread out."""
    if name + ".Xd" in parts:
        return np.asarray(parts[name + ".Xd"][first:last] @ parts[name + ".Xu"])
    column = parts.get(name + ".X")
    if column is None or column.ndim == 1:
        return np.zeros(1) if column is None else column
    return column[first:last]


def reads_weight(parts: Collection[str]) -> bool:
    """Whether the bias takes a share of the weight."""
    return "glora_C.X" in parts or "glora_C.Xd" in parts


def touches_bias(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> bool:
    """Whether the file has a C, a D or an E."""
    return reads_weight(shapes) or not {"glora_D.X", "glora_E.X"}.isdisjoint(shapes)


def merge_bias(bias: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any]) -> F64Array:
    """(out,) in and out; D is a share of the bias before any adapter, as A and C are of the weight."""
    nothing = np.zeros(1)
    change = base * parts.get("glora_D.X", nothing) + parts.get("glora_E.X", nothing)
    if BASE_WEIGHT in parts:
        column = parts["glora_C.X"] if "glora_C.X" in parts else parts["glora_C.Xd"] @ parts["glora_C.Xu"]
        change = change + (parts[BASE_WEIGHT] @ column)[:, 0]
    return np.asarray(np.where(change == 0, bias, bias + change))
