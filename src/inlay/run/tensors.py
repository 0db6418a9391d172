"""Merged tensors one by one, without writing a file: for loaders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import Array
from inlay.errors import InputError
from inlay.plan.memory import DEFAULT_MAX_MEMORY, by_kernel, fit, fit_coded
from inlay.plan.types import Coded, Entry, Plan
from inlay.run.blocks import Blocks
from inlay.run.encode import Encoding

if TYPE_CHECKING:
    import torch


def merged_tensors(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Key and merged tensor, in the order of the output files; the same bytes that `run_plan` writes.

    One tensor is alive at a time, unless the caller keeps them. Needs `torch` (the extra `inlay[torch]`).
    Raises InputError for a result that is not finite.
    """
    import torch

    with SpanReader(plan.roots) as reader:
        encoded: dict[str, dict[str, Array]] = {}  # the parts of weights of which some are still to come
        left = Counter(e.weight.key for e in plan.entries.values() if isinstance(e, Coded))
        for entry in plan.entries.values():
            if isinstance(entry, Coded):
                weight = entry.weight.key
                if weight not in encoded:
                    encoded[weight] = _encoded(reader, entry)
                stored = encoded[weight][entry.part].reshape(-1).view(np.uint8)
                left[weight] -= 1
                if not left[weight]:
                    del encoded[weight]
            else:
                stored = _merged_bytes(reader, entry)
            dtype = getattr(torch, entry.dtype.torch)
            yield entry.key, torch.from_numpy(stored).view(dtype).reshape(_torch_shape(entry))


def _torch_shape(entry: Entry | Coded) -> tuple[int, ...]:
    """torch packs two 4-bit elements into one of its own."""
    if entry.dtype.bits == 4:
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


def _encoded(reader: SpanReader, part: Coded) -> dict[str, Array]:
    """All parts of a weight that is stored in codes."""
    tiling, _ = fit_coded(part, 1, DEFAULT_MAX_MEMORY)
    return Encoding([part], {}, reader, tiling).encoded()


def _merged_bytes(reader: SpanReader, entry: Entry) -> np.ndarray:
    """All bytes of one output tensor, uint8."""
    out = np.empty(entry.nbytes, np.uint8)
    if entry.copied:
        reader.into(entry.source, 0, out)
        return out
    tiling, _ = fit(entry, by_kernel(entry), 1, DEFAULT_MAX_MEMORY)
    rows, cols = (entry.count, 1) if entry.elementwise else entry.matrix
    typed = out.view(np.dtype(entry.dtype.raw)).reshape(rows, cols)
    for block in Blocks(entry, reader, tiling).of(0, rows):
        if not block.finite:
            raise InputError(f"{entry.key}: the merged tensor would hold Inf or NaN")
        typed[block.first : block.first + len(block.out)] = block.out
    return out
