"""A whole weight encoded, block after block of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import DTYPES, Array, DType

F32Array = npt.NDArray[np.float32]
Blocks = Callable[[], Iterable[tuple[int, F32Array]]]  # a pass over the rows: first row, values
Known = Callable[[int, int], dict[str, Array]]  # the parts of rows [first, last) that are kept, as stored bits


def nothing_known(first: int, last: int) -> dict[str, Array]:
    """For a weight of which no part is kept."""
    return {}


def measured(form: ModuleType, settings: Mapping[str, Any], blocks: Blocks) -> dict[str, Array]:
    """What the codec needs of the whole weight before it chooses codes, as `encode` takes it."""
    if not hasattr(form, "measure"):
        return {}
    found: Array | None = None
    for _, values in blocks():
        of_block = form.measure(values, settings)
        if of_block.size == 0:
            return {"measured": of_block}
        found = of_block if found is None else np.maximum(found, of_block)
    return {} if found is None else {"measured": found}


def encode_whole(
    form: ModuleType, settings: Mapping[str, Any], blocks: Blocks, known: Known = nothing_known
) -> dict[str, Array]:
    """All parts that are not kept. Blocks begin at multiples of `align`, in order.

    Raises ValueError for a weight that the form cannot hold (NaN, Inf).
    """
    fixed = measured(form, settings, blocks)
    layout, unfinished = form.layout(settings), getattr(form, "UNFINISHED", ())
    whole: dict[str, Array] = {}
    pieces: dict[str, list[Array]] = {}
    for first, values in blocks():
        if not np.isfinite(values).all():
            raise ValueError("the merged weight has NaN or Inf, which codes cannot hold")
        last = first + len(values)
        kept = known(first, last)
        spans = form.spans(settings, first, last)
        for part, piece in form.encode(values, settings, first, {**kept, **fixed}).items():
            if part in kept:
                continue
            span, stored = spans.get(part), layout.get(part)
            if part in unfinished:
                pieces.setdefault(part, []).append(piece)
            elif span is None:
                whole[part] = piece
            elif stored and _fits(piece, span, *stored):
                if part not in whole:
                    whole[part] = np.zeros(stored[1], stored_item(DTYPES[stored[0]]))
                axis, begin, end = span
                whole[part][(slice(None),) * axis + (slice(begin, end),)] = piece
            else:  # in a form that `finish` turns into the stored one
                pieces.setdefault(part, []).append(piece)
    raw = {**whole, **{part: np.concatenate(found) for part, found in pieces.items()}}
    return {**raw, **form.finish(raw, settings)} if hasattr(form, "finish") else raw


def settled(form: ModuleType, settings: Mapping[str, Any], parts: Mapping[str, Array]) -> Mapping[str, Any]:
    """Settings as they are read back from parts that are new: `finish` may have put numbers into them."""
    if not hasattr(form, "finish") or not set(form.layout(settings)) <= set(parts):
        return settings
    found = {part: (dtype, parts[part].shape) for part, (dtype, _) in form.layout(settings).items()}
    again: Mapping[str, Any] = form.settings({}, "the weight", found, lambda part: parts[part])
    return again


def _fits(piece: Array, span: tuple[int, int, int], dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a slice is of the stored type and shape."""
    axis, begin, end = span
    wanted = (*shape[:axis], end - begin, *shape[axis + 1 :])
    return piece.dtype == stored_item(DTYPES[dtype]) and piece.shape == wanted


def stored_item(dtype: DType) -> np.dtype[Any]:
    """numpy type of the stored bits of any type of whole bytes; codes are bytes."""
    return np.dtype(dtype.raw or "u1")


def row_blocks(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that begin at multiples of `step`."""
    return ((at, min(rows, at + step)) for at in range(0, rows, step))
