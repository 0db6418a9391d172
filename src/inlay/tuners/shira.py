"""SHiRA: a few elements of the weight, each with its own change.

W'[i, j] = W[i, j] + v        Bhardwaj et al. 2024, section 4

`shira_indices` (2, n) are the rows i and the columns j, `shira_weight` (n,) the changes v; places that are named
twice add up. PEFT on Windows saves the indices as float32, which is exact below 2²⁴.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inlay.dtypes import F64Array
from inlay.errors import InputError
from inlay.tuners.places import outside, span

PEFT_TYPE = "SHIRA"
REQUIRED = ("shira_weight", "shira_indices")
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS: frozenset[str] = frozenset()
IGNORED = frozenset({"mask_type", "random_seed", "init_weights"})  # how the indices in the file were chosen
REFUSED: dict[str, str] = {}
PLACES = ("shira_indices",)


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Nothing: PEFT saves no scale, and loads with 1."""
    return {}


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    weight, indices = (shapes[name] for name in REQUIRED)
    if len(shape) != 2:
        return f"SHiRA is for matrices, the weight is {shape}"
    if len(weight) == 1 and indices == (2, weight[0]):
        return None
    return f"shira_weight {weight} and shira_indices {indices} do not belong together"


def misplaced(
    places: Mapping[str, F64Array], shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> str | None:
    """Places outside of the weight."""
    rows, cols = places["shira_indices"]
    if not outside(rows, shape[0]) and not outside(cols, shape[1]):
        return None
    return f"shira_indices, rows {span(rows)} and columns {span(cols)}, point outside a weight {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """Changes with their places, ordered by row.

    Raises InputError for a place outside of the weight.
    """
    if why := misplaced(parts, {}, shape):
        raise InputError(why)
    places = parts["shira_indices"].astype(np.int64)
    order = np.argsort(places[0], kind="stable")
    return {"changes": parts["shira_weight"][order], "rows": places[0][order], "cols": places[1][order]}


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`."""
    start, end = np.searchsorted(parts["rows"], (first, last))
    changes = np.zeros((last - first, shape[1]))
    rows, cols = (parts[name][start:end].astype(np.int64) for name in ("rows", "cols"))
    np.add.at(changes, (rows - first, cols), parts["changes"][start:end])
    return changes
