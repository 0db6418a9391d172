"""Merged tensors one by one, without writing a file: for loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from inlay.checkpoints.spans import SpanReader
from inlay.errors import InputError
from inlay.plan.cost import by_kernel
from inlay.plan.memory import DEFAULT_MAX_MEMORY, fit
from inlay.plan.pieces import pieces
from inlay.plan.types import Entry, Plan
from inlay.run.merge import Merger

if TYPE_CHECKING:
    import torch


def merged_tensors(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Key and merged tensor, in the order of the output files; the same bytes that `run_plan` writes.

    One tensor is alive at a time, unless the caller keeps them. Needs `torch` (the extra `inlay[torch]`).
    Raises InputError for a result that is not finite.
    """
    import torch

    with SpanReader(plan.roots) as reader:
        for entry in plan.entries.values():
            stored = _merged_bytes(reader, entry)
            dtype = getattr(torch, entry.dtype.torch)
            yield entry.key, torch.from_numpy(stored).view(dtype).reshape(_torch_shape(entry))


def _torch_shape(entry: Entry) -> tuple[int, ...]:
    """torch packs two 4-bit elements into one of its own."""
    if entry.dtype.bits == 4:
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


def _merged_bytes(reader: SpanReader, entry: Entry) -> np.ndarray:
    """All bytes of one output tensor, uint8."""
    out = np.empty(entry.nbytes, np.uint8)
    if entry.copied:
        reader.into(entry.source, 0, out)
        return out
    tiling, _ = fit(entry, by_kernel(entry), 1, DEFAULT_MAX_MEMORY)
    rows, cols = (entry.count, 1) if entry.elementwise else entry.matrix
    typed = out.view(np.dtype(entry.dtype.raw)).reshape(rows, cols)
    buffer = np.empty(tiling.rows * cols, np.dtype(entry.source.dtype.raw))
    parts = pieces(entry)
    for piece in parts:
        merger = Merger(reader, piece.entry, tiling.rows, by_rows=len(parts) > 1)
        begin, end = (0, rows) if len(parts) == 1 else (piece.first, piece.last)
        for first in range(begin, end, tiling.rows):
            last = min(end, first + tiling.rows)
            raw = merger.read(first - begin, last - begin, buffer)
            if not merger.block(first - begin, raw, typed[first:last]):
                raise InputError(f"{entry.key}: the merged tensor would hold Inf or NaN")
    return out
