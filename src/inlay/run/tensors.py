"""Merged tensors one by one, without writing a file: for loaders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import Array
from inlay.errors import InputError
from inlay.plan.memory import DEFAULT_MAX_MEMORY, by_kernel, fit, fit_coded, threads
from inlay.plan.types import Coded, Entry, Plan
from inlay.run.blocks import Blocks
from inlay.run.encode import Encoding

if TYPE_CHECKING:
    import torch


def merged_tensors(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Key and merged tensor, in the order of the output files; the same bytes that `run_plan` writes.

    One tensor is alive at a time, unless the caller keeps them; all processors work on it. Needs `torch` (the extra
    `inlay[torch]`). Raises InputError for a result that is not finite.
    """
    with SpanReader(plan.roots) as reader, ThreadPoolExecutor(threads()) as pool:
        encoded: dict[str, dict[str, Array]] = {}  # the parts of weights of which some are still to come
        left = Counter(e.weight.key for e in plan.entries.values() if isinstance(e, Coded))
        for entry in plan.entries.values():
            if isinstance(entry, Entry):
                yield entry.key, merged_tensor(entry, reader, pool)
                continue
            weight = entry.weight.key
            if weight not in encoded:
                encoded[weight] = _encoded(reader, entry)
            stored = encoded[weight][entry.part].reshape(-1).view(np.uint8)
            left[weight] -= 1
            if not left[weight]:
                del encoded[weight]
            yield entry.key, _as_torch(entry, stored)


def merged_tensor(entry: Entry, reader: SpanReader, pool: ThreadPoolExecutor | None = None) -> torch.Tensor:
    """One merged tensor, on this thread or on all of a pool. Raises InputError if it is not finite."""
    out = np.empty(entry.nbytes, np.uint8)
    if entry.copied:
        reader.into(entry.source, 0, out)
    else:
        _merge_into(out, entry, reader, pool)
    return _as_torch(entry, out)


def _merge_into(out: Array, entry: Entry, reader: SpanReader, pool: ThreadPoolExecutor | None) -> None:
    """Fill the bytes of a tensor, rows by rows: each is the same whoever makes it."""
    tiling, at_once = fit(entry, by_kernel(entry), threads() if pool else 1, DEFAULT_MAX_MEMORY)
    rows, cols = (entry.count, 1) if entry.elementwise else entry.matrix
    typed = out.view(np.dtype(entry.dtype.raw)).reshape(rows, cols)
    blocks = Blocks(entry, reader, tiling)

    def merge(first: int, last: int) -> bool:
        return all(block.finite for block in blocks.of(first, last, typed))

    if pool is None or at_once == 1 or rows <= tiling.rows:
        finite = merge(0, rows)
    else:
        share = -(-rows // at_once)
        firsts = range(0, rows, share)
        finite = all(list(pool.map(merge, firsts, (min(rows, first + share) for first in firsts))))
    if not finite:
        raise InputError(f"{entry.key}: the merged tensor would hold Inf or NaN")


def _as_torch(entry: Entry | Coded, stored: Array) -> torch.Tensor:
    """The tensor of stored bytes, which it shares."""
    import torch

    return torch.from_numpy(stored).view(getattr(torch, entry.dtype.torch)).reshape(_torch_shape(entry))


def _torch_shape(entry: Entry | Coded) -> tuple[int, ...]:
    """torch packs two 4-bit elements into one of its own."""
    if entry.dtype.bits == 4:
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


def _encoded(reader: SpanReader, part: Coded) -> dict[str, Array]:
    """All parts of a weight that is stored in codes."""
    tiling, _ = fit_coded(part, 1, DEFAULT_MAX_MEMORY)
    return Encoding([part], {}, reader, tiling).encoded()
