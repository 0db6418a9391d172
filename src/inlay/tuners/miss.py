"""MiSS: a block of r columns is added to every r columns of the weight.

W'[o, j] = W[o, j] + B[j mod r, o]        Kang and Yin 2024 (first named Bone)
mini:     … B[j mod r, o mod mini_r]
bat:      … (V M[o div r] + M[o div r])[o mod r, j mod r],  V the r × r block of W in which [o, j] lies

`init_weights` names the form. `miss_block` is B (r, out), for mini (r, mini_r), for bat M (out/r, r, r). The last
columns take the head of the block where r does not divide the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array

PEFT_TYPE = "MISS"
REQUIRED = ("miss_block",)
ALIASES = {"bone_block": "miss_block"}  # PEFT up to 0.17 called the method Bone; the formulas are the same
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = False  # bat reads the weight
FIELDS = frozenset({"init_weights", "mini_r"})
IGNORED = frozenset({"miss_dropout"})
REFUSED: dict[str, str] = {}


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """The form, "" for the plain one, and the columns of a mini block."""
    form, mini = raw.get("init_weights"), raw.get("mini_r")
    return {"form": form if isinstance(form, str) else "", "mini": 1 if mini is None else int(mini)}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found, form = shapes["miss_block"], settings["form"]
    if form not in ("", "bat", "mini"):
        return f"init_weights {form!r} is no known form of MiSS"
    if len(shape) != 2 or not found or 0 in found:
        return f"miss_block {found} on a weight {shape}: MiSS adds blocks to matrices"
    rank = found[-1] if form == "bat" else found[0]
    if form == "bat" and (shape[0] % rank or shape[1] % rank):
        return f"blocks of {rank} × {rank} do not tile a weight {shape}"
    if form == "mini" and (settings["mini"] < 1 or shape[0] % settings["mini"]):
        return f"mini_r {settings['mini']} does not divide the {shape[0]} outputs"
    wanted = {
        "": (rank, shape[0]),
        "mini": (rank, settings["mini"]),
        "bat": (shape[0] // rank, rank, rank),
    }[form]
    if found != wanted:
        return f"miss_block is {found}, and {wanted} fits a weight {shape}"
    return None if rank <= shape[1] else f"miss_block {found} has more columns to add than the {shape[1]} inputs"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """The part as it is."""
    return parts


def merge(
    weight: F64Array, base: F64Array, parts: Mapping[str, F64Array], settings: Mapping[str, Any],
    shape: tuple[int, ...], first: int,
) -> F64Array:  # fmt: skip
    """Rows from `first` on; each needs itself and its own block."""
    block = parts["miss_block"]
    outputs = np.arange(first, first + len(weight))
    if settings["form"] == "bat":
        return _bat(weight, block, outputs)
    columns = np.arange(weight.shape[1]) % block.shape[0]
    return np.asarray(weight + block.T[outputs % block.shape[1]][:, columns])


def _bat(weight: F64Array, block: F64Array, outputs: Any) -> F64Array:
    rank = block.shape[-1]
    change = np.empty_like(weight)
    for number in np.unique(outputs // rank):
        rows = outputs // rank == number
        pieces = weight[rows].reshape(rows.sum(), -1, rank)
        change[rows] = (pieces @ block[number] + block[number][outputs[rows] % rank, None]).reshape(rows.sum(), -1)
    return np.asarray(weight + change)
