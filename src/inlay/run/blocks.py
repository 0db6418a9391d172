"""The rows of one merged tensor, block after block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import Array
from inlay.plan.memory import Tiling
from inlay.plan.pieces import Piece, pieces
from inlay.plan.types import Entry
from inlay.run.merge import Device, Merger


class Block(NamedTuple):
    """Rows of a tensor from `first` on: stored bits of the source, merged bits, whether all of these are finite.

    The arrays are the thread's own and are overwritten by its next block, unless the caller gave one for the result.
    """

    first: int
    raw: Array
    out: Array
    finite: bool


class Blocks:
    """Makes the blocks of any rows, on any thread. Where each element stands alone, a row is one element."""

    def __init__(
        self, entry: Entry, reader: SpanReader, tiling: Tiling, device: Device = None, *, by_rows: bool = False
    ) -> None:
        self.entry = entry
        self.rows, self.cols = (entry.count, 1) if entry.elementwise and not by_rows else entry.matrix
        self._reader, self._tiling, self._device, self._by_rows = reader, tiling, device, by_rows
        self._step = tiling.rows
        made = entry.source.made
        if made is not None and self.cols == 1 and self._step > made.cols:
            self._step -= self._step % made.cols  # whole rows are made where they are wanted
        self._pieces = pieces(entry)
        self._merger = self._make_merger(self._pieces[0]) if len(self._pieces) == 1 else None

    def _make_merger(self, piece: Piece) -> Merger:
        by_rows = self._by_rows or piece.entry is not self.entry
        return Merger(self._reader, piece.entry, self._tiling.rows, self._device, by_rows=by_rows)

    def of(self, first: int, last: int, into: Array | None = None) -> Iterator[Block]:
        """Block after block of rows [first, last), none longer than the tiling has them.

        With `into`, an array of all rows in the type of the output, the merged bits are there and stay there.
        """
        entry = self.entry
        itemsize = max(entry.source.dtype.bits, entry.dtype.bits) // 8
        raw_buffer, out_buffer = _buffers(self._tiling.rows * self.cols * itemsize)
        for piece in self._pieces:
            begin, end = (0, self.rows) if self._merger else (piece.first, piece.last)
            if end <= first or last <= begin:
                continue
            merger = self._merger or self._make_merger(piece)
            for at in range(max(first, begin), min(last, end), self._step):
                stop = min(last, end, at + self._step)
                raw = merger.read(at - begin, stop - begin, raw_buffer.view(np.dtype(entry.source.dtype.raw)))
                if into is None:
                    out = out_buffer.view(np.dtype(entry.dtype.raw))[: raw.size].reshape(raw.shape)
                else:
                    out = into[at:stop]
                yield Block(at, raw, out, merger.block(at - begin, raw, out))


_local = threading.local()


def _buffers(nbytes: int) -> tuple[Array, Array]:
    """Two buffers of this thread, of at least `nbytes`, reused from block to block."""
    size = -(-nbytes // 8) * 8
    held = getattr(_local, "buffers", None)
    if held is None or held[0].nbytes < size or held[0].nbytes > 4 * size:
        held = (np.empty(size, np.uint8), np.empty(size, np.uint8))
        _local.buffers = held
    return held
