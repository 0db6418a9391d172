"""One output file: its header, and the tasks that fill it.

A task is a copy of a span, or a band of rows of one tensor: the leaf of that tensor's digest. Tasks touch
disjoint bytes, so they run on any thread in any order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from inlay.checkpoints.header import layout
from inlay.checkpoints.refs import TensorInfo
from inlay.checkpoints.spans import BASE, SpanReader, byte_view
from inlay.digests import digest_bytes, hasher, join, name
from inlay.output.copying import copy_span, write_at
from inlay.plan.layout import stored_key
from inlay.plan.memory import Tiling, whole
from inlay.plan.types import Entry, ShardPlan
from inlay.records.fingerprint import leaf_rows
from inlay.run.blocks import Blocks
from inlay.run.merge import Device

COPY_BYTES = 1 << 24  # one copy task

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Copy:
    """A span to move as it is: `nbytes` from `start` of a file under `root`."""

    root: str
    file: str
    start: int
    at: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Header bytes of an output file, and where each tensor goes."""

    header: bytes
    places: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return max((t.end for t in self.places.values()), default=len(self.header))


def lay_out_file(shard: ShardPlan, base_header: bytes | None) -> Layout:
    """Layout of an output file; the header of the base shard is kept to the byte where the plan says so."""
    keys = {stored_key(shard.file, e.key): e.key for e in shard.entries}
    header, infos = layout([(stored_key(shard.file, e.key), e.dtype, e.shape) for e in shard.entries], shard.metadata)
    if base_header is not None:
        shift = len(base_header) - len(header)
        infos = tuple(TensorInfo(t.key, t.dtype, t.shape, t.start + shift, t.end + shift) for t in infos)
        header = base_header
    return Layout(header, {keys[t.key]: t for t in infos})


def copies(shard: ShardPlan, places: Mapping[str, TensorInfo]) -> Iterator[Copy]:
    """Spans to copy, neighbours joined, none longer than COPY_BYTES."""
    joined: Copy | None = None
    copied = [e for e in shard.entries if isinstance(e, Entry) and e.copied]
    for entry in sorted(copied, key=lambda e: places[e.key].start):
        source, at = entry.source, places[entry.key].start
        if (
            joined is not None
            and (joined.root, joined.file, joined.start + joined.nbytes) == (source.root, source.file, source.start)
            and joined.at + joined.nbytes == at
        ):
            joined = Copy(joined.root, joined.file, joined.start, joined.at, joined.nbytes + entry.nbytes)
            continue
        if joined is not None:
            yield from _pieces(joined)
        joined = Copy(source.root, source.file, source.start, at, entry.nbytes)
    if joined is not None:
        yield from _pieces(joined)


def _pieces(copy: Copy) -> Iterator[Copy]:
    for done in range(0, copy.nbytes, COPY_BYTES):
        piece = min(COPY_BYTES, copy.nbytes - done)
        yield Copy(copy.root, copy.file, copy.start + done, copy.at + done, piece)


def run_copy(copy: Copy, reader: SpanReader, target: Target, progress: Progress) -> None:
    target.copy(reader.fileno(copy.root, copy.file), copy.start, copy.at, copy.nbytes)
    progress(copy.nbytes)


class Target:
    """An output file, and the lock that its writers take.

    The kernel lets one thread at a time write to a file and makes the others spin; waiting here leaves
    the processor to those that compute.
    """

    def __init__(self, path: os.PathLike[str], nbytes: int, header: bytes) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        os.ftruncate(self.fd, nbytes)
        self.write(header, 0)

    def write(self, data: bytes | memoryview, at: int) -> None:
        with self._lock:
            write_at(self.fd, data, at)

    def copy(self, source: int, start: int, at: int, nbytes: int) -> None:
        with self._lock:
            copy_span(source, start, self.fd, at, nbytes)

    def close(self) -> None:
        os.close(self.fd)


class Bands:
    """The bands of one computed tensor, and its digests once all of them are done.

    A band is a leaf of the digest: whole rows of the stored tensor. Where all rows are needed together there
    is one task for all bands. `source_digest` is that of the base's tensor, taken on the way where its rows
    have the same size; otherwise None.
    """

    def __init__(
        self, entry: Entry, place: TensorInfo, reader: SpanReader, tiling: Tiling, device: Device = None
    ) -> None:
        self.entry = entry
        self.place = place
        self.tiling = tiling
        self._blocks = Blocks(entry, reader, tiling, device)
        self._rows, self._cols = self._blocks.rows, self._blocks.cols
        self.step, self.count = self._bands()
        self.tasks = 1 if whole(entry) else self.count
        self.finite = True
        self._follows_source = entry.source.root == BASE and entry.source.dtype.bits == entry.dtype.bits
        self._leaves: list[str] = [""] * self.count
        self._source_leaves: list[str] = [""] * self.count

    def _bands(self) -> tuple[int, int]:
        """Rows a band, of those that are worked on, and the number of bands."""
        stored_rows, stored_cols = replace(self.entry.source, shape=self.entry.shape).matrix
        step = leaf_rows(self.entry.dtype.nbytes(stored_cols))
        return step * (self._rows // max(1, stored_rows)), -(-stored_rows // step)

    @property
    def digest(self) -> str:
        return join(self._leaves)

    @property
    def source_digest(self) -> str | None:
        return join(self._source_leaves) if self._follows_source and not self.entry.grown else None

    def run(self, task: int, target: Target, digest_source: bool, progress: Progress) -> None:
        """Do one task: merge one band into the file `target`, or all of them."""
        if self.tasks < self.count:
            self._run_whole(target, digest_source, progress)
        else:
            self._run_band(task, target, digest_source, progress)

    def _run_band(self, band: int, target: Target, digest_source: bool, progress: Progress) -> None:
        written, source = hasher(), hasher()
        for block in self._blocks.of(band * self.step, min(self._rows, (band + 1) * self.step)):
            data = byte_view(block.out)
            written.update(data)
            if digest_source:
                source.update(byte_view(block.raw))
            self.finite = self.finite and block.finite
            target.write(data, self.place.start + block.first * block.out.itemsize * self._cols)
            progress(len(data))
        self._leaves[band], self._source_leaves[band] = name(written), name(source)

    def _run_whole(self, target: Target, digest_source: bool, progress: Progress) -> None:
        ((_, raw, out, self.finite),) = self._blocks.of(0, self._rows)
        for band in range(self.count):
            rows = slice(band * self.step, (band + 1) * self.step)
            self._leaves[band] = digest_bytes(byte_view(out[rows]))
            if digest_source:
                self._source_leaves[band] = digest_bytes(byte_view(raw[rows]))
        target.write(byte_view(out), self.place.start)
        progress(out.nbytes)
