"""Scales of a matrix, one for each cell of a grid.

A matrix (out, in) is cut from its first element into cells of (rows, columns); the last ones may be smaller. One scale
for the whole tensor is a cell of (out, in), one a channel (1, in), one a group (1, group), one a block (rows, columns).
In rows [first, last) of the matrix, a grid is given as the rows of cells that these touch: float32 (bands, columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32Array = npt.NDArray[np.float32]

# Groups up to this size are reduced pair by pair; numpy takes up to four times as long for many short rows.
HALVED = 128


def extent(shape: Sequence[int], cell: Sequence[int]) -> tuple[int, int]:
    """How many cells a matrix of this shape has along each axis."""
    return -(-shape[0] // cell[0]), -(-shape[1] // cell[1])


def band(cell: Sequence[int], first: int, last: int) -> tuple[int, int]:
    """The rows of cells [begin, end) that rows [first, last) touch."""
    return first // cell[0], -(-last // cell[0])


def apply(
    operation: np.ufunc,
    values: npt.NDArray[Any],
    grid: npt.NDArray[Any],
    cell: Sequence[int],
    first: int,
    columns: npt.NDArray[Any] | None = None,
) -> None:
    """`values` = `operation`(`values`, what their cell holds), in place, for rows that begin at `first`.

    `columns` says for each column which column of the grid it belongs to, where that is not a matter of its place.
    """
    count, width = values.shape
    if len(grid) > 1 and cell[0] > 1:
        grid = grid[np.arange(first, first + count) // cell[0] - first // cell[0]]
    if columns is not None:
        grid = np.take(grid, columns, axis=1)
    if columns is not None or grid.shape[1] == 1:
        operation(values, grid, out=values)
        return
    whole = width // cell[1] * cell[1]
    inner = values[:, :whole].reshape(count, -1, cell[1])  # splitting the last axis makes a view
    operation(inner, grid[:, : whole // cell[1], None], out=inner)
    if whole < width:
        operation(values[:, whole:], grid[:, -1:], out=values[:, whole:])


def extremes(weight: F32Array, cell: Sequence[int]) -> tuple[F32Array, F32Array]:
    """The least and the greatest value of each cell, with 0 among the values: two grids.

    `weight` is rows that begin a cell.
    """
    return _reduce(np.minimum, weight, cell), _reduce(np.maximum, weight, cell)


def _reduce(operation: np.ufunc, weight: F32Array, cell: Sequence[int]) -> F32Array:
    count, width = weight.shape
    reduced, size = np.ascontiguousarray(weight), cell[1]
    if width % size == 0:
        while size % 2 == 0 and size <= HALVED:
            flat = reduced.reshape(-1)
            reduced, size = operation(flat[::2], flat[1::2]), size // 2
        reduced = operation.reduce(reduced.reshape(count, -1, size), axis=2)
    else:
        reduced = operation.reduceat(weight, np.arange(0, width, size), axis=1)
    if cell[0] > 1:
        reduced = operation.reduceat(reduced, np.arange(0, count, cell[0]), axis=0)
    least: F32Array = operation(reduced, np.float32(0))
    return least


def require_finite(weight: F32Array, first: int) -> None:
    """Refused unless all values, of rows that begin at `first`, have a code."""
    if not np.isfinite(weight).all():
        raise ValueError(f"rows from {first} have values that are NaN or infinite, which have no code")
