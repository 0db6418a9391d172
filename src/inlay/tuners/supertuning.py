"""Super-Tuning: the largest (or smallest) elements of the weight change, with a low-rank pair if there is one.

W' = W + v at the places in the file + alpha/r · B A        arXiv 2607.09287; the pair is its hybrid, Supra

`supertuning_indices` (n,) count along the rows of the weight, `supertuning_values` (n,) are the changes; places that
are named twice add up. `supertuning_lora_A` (r, in) and `supertuning_lora_B` (out, r) come with a config that sets `r`.
Without the places (`save_precomputed_indices` false) they would be the extremes of the base that was trained on, among
equals those that one version of torch picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.errors import InputError
from inlay.tuners.places import outside, span

PEFT_TYPE = "SUPERTUNING"
REQUIRED = ("supertuning_values",)
OPTIONAL = ("supertuning_indices", "supertuning_lora_A", "supertuning_lora_B")
SHARED = ()
MISSING = (
    "the places are not in the file; load the adapter with PEFT on the base it was trained on, and save it with "
    "save_precomputed_indices=True"
)
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"lora_alpha", "save_precomputed_indices"})
IGNORED = frozenset({"sparsity", "select_top", "lora_dropout", "init_weights"})
REFUSED: dict[str, str] = {}
PLACES = ("supertuning_indices",)

PAIR = OPTIONAL[1:]


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Rank and scaling of the pair, where the config has one."""
    if raw.get("r") is None:
        return {"rank": 0}
    return {"rank": rank, "scaling": (2 * rank if alpha is None else alpha) / rank}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    if "supertuning_indices" not in shapes:
        return MISSING
    values, places = shapes["supertuning_values"], shapes["supertuning_indices"]
    if len(shape) != 2:
        return f"Super-Tuning is for matrices, the weight is {shape}"
    if len(values) != 1 or places != values or values[0] > shape[0] * shape[1]:
        return f"supertuning_values {values} and supertuning_indices {places} do not fit a weight {shape}"
    rank = settings["rank"]
    found = {name: shapes[name] for name in PAIR if name in shapes}
    wanted = dict(zip(PAIR, ((rank, shape[1]), (shape[0], rank)), strict=True)) if rank else {}
    if found == wanted:
        return None
    if not rank:
        return f"has {', '.join(found)}, and the config has no r for a pair"
    return f"has {found or 'no pair'}, and {wanted} fits r = {rank} and a weight {shape}"


def misplaced(
    places: Mapping[str, F64Array], shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> str | None:
    """Places outside of the weight."""
    found = places["supertuning_indices"]
    if outside(found, shape[0] * shape[1]):
        return f"supertuning_indices from {span(found)} point outside a weight {shape}"
    return None


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """Changes with their places in order, and the pair.

    Raises InputError for a place outside of the weight.
    """
    if why := misplaced(parts, {}, shape):
        raise InputError(why)
    places: Any = parts["supertuning_indices"].astype(np.int64)
    order = np.argsort(places, kind="stable")
    pair = {name: parts[name] for name in PAIR if name in parts}
    return {"values": parts["supertuning_values"][order], "places": places[order], **pair}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    changes = np.zeros((last - first, shape[1]))
    if settings["rank"]:
        a, b = (parts[name] for name in PAIR)
        changes += settings["scaling"] * (b[first:last] @ a)
    start, end = np.searchsorted(parts["places"], (first * shape[1], last * shape[1]))
    rows, cols = np.divmod(parts["places"][start:end].astype(np.int64), shape[1])
    np.add.at(changes, (rows - first, cols), parts["values"][start:end])
    return changes
