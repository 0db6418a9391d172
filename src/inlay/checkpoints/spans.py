"""Bytes by reference: which directory, which file, which span; and a reader for them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from inlay.checkpoints.made import Maker, maker
from inlay.checkpoints.refs import Made, TensorRef
from inlay.codecs.encoding import stored_item
from inlay.dtypes import Array

BASE = "base"
KEPT_BYTES = 1 << 26
KEPT_MAKERS = 8  # makers of tensors that are made: the tensors at hand and a few before them
KEPT_SIMULATED = 2  # of those that keep all codes of a weight
CHUNK_BYTES = 1 << 20  # of interleaved matrices that are not kept: they are read in pieces


def adapter_root(position: int) -> str:
    """Name of the root directory of the adapter at `position` in the list."""
    return f"adapter{position}"


def byte_view(array: Array) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # numpy's stubs deny the buffer


def _part(ref: TensorRef, index: int) -> TensorRef:
    """One of the first axis."""
    shape = ref.shape[1:]
    return replace(ref, shape=shape, start=ref.start + index * ref.dtype.nbytes(math.prod(shape)))


class SpanReader:
    """Reads spans by reference from any thread; files are opened once and closed together.

    Up to `cache_bytes` are kept of what is read in pieces over and over: interleaved factors (LoRA on stacks of
    experts), each expert's apart, and the parts of quantised weights.
    """

    def __init__(self, roots: Mapping[str, Path], cache_bytes: int = KEPT_BYTES) -> None:
        self._roots = dict(roots)
        self._cache_bytes = cache_bytes
        self._cache: dict[tuple[TensorRef, int], Array] = {}
        self._makers: dict[Made, Maker] = {}
        self._making: dict[Made, threading.Lock] = {}
        self._cache_lock = threading.RLock()
        self._open: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SpanReader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def path(self, root: str, file: str) -> Path:
        return self._roots[root] / file

    def fileno(self, root: str, file: str) -> int:
        """A descriptor open for reading, owned by this reader."""
        with self._lock:
            if (root, file) not in self._open:
                self._open[root, file] = os.open(self.path(root, file), os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._open[root, file]

    def into(self, ref: TensorRef, offset: int, out: Array) -> None:
        """Fill the contiguous array `out` from byte `offset` of the tensor."""
        if ref.made is not None:
            self._make(ref, ref.made, offset, out)
            return
        buffer = byte_view(out)
        fd, at, done = self.fileno(ref.root, ref.file), ref.start + offset, 0
        while done < len(buffer):
            n = os.preadv(fd, [buffer[done:]], at + done)
            if n == 0:
                raise AssertionError(f"{ref.file} shrank while it was read: {ref.key} wants byte {at + done}")
            done += n

    def rows(self, ref: TensorRef, first: int, last: int, out: Array | None = None) -> Array:
        """Stored bits of rows `[first, last)` of the tensor's matrix, shape (last - first, cols)."""
        count, cols = ref.matrix
        assert 0 <= first <= last <= count, f"{ref.key} has {count} rows, wanted [{first}, {last})"
        raw = stored_item(ref.dtype)
        block = np.empty((last - first, cols), raw) if out is None else out[: (last - first) * cols].reshape(-1, cols)
        if block.size:
            self.into(ref, first * cols * raw.itemsize, block)
        return block

    def columns(self, ref: TensorRef, first: int, last: int) -> Array:
        """Stored bits of columns `[first, last)` of the tensor's matrix, shape (rows, last - first)."""
        rows, cols = ref.matrix
        assert 0 <= first <= last <= cols, f"{ref.key} has {cols} columns, wanted [{first}, {last})"
        return self.view(ref, first, (rows, last - first), (cols, 1))

    def view(self, ref: TensorRef, start: int, shape: tuple[int, int], strides: tuple[int, int]) -> Array:
        """Stored bits of a strided view: (i, j) is element `start + i · strides[0] + j · strides[1]` of the tensor."""
        rows, cols = shape
        if strides[1] > strides[0] and strides[0] > 0:
            return self.view(ref, start, (cols, rows), (strides[1], strides[0])).T
        raw = np.dtype(ref.dtype.raw)
        if strides[1] != 1:
            return self._interleaved(ref, start, shape, strides)
        block = np.empty(shape, raw)
        if strides[0] == cols:
            self.into(ref, start * raw.itemsize, block)
            return block
        for i in range(rows):
            self.into(ref, (start + i * strides[0]) * raw.itemsize, block[i])
        return block

    def _interleaved(self, ref: TensorRef, start: int, shape: tuple[int, int], strides: tuple[int, int]) -> Array:
        """One of `strides[1]` matrices whose elements take turns: nearly every page has some of each."""
        rows, cols = shape
        count = strides[1]
        if strides[0] == cols * count and ref.count % count == 0 and ref.nbytes <= self._cache_bytes:
            first, which = divmod(start, count)
            return self._apart(ref, count)[which, first : first + rows * cols].reshape(shape)
        raw = np.dtype(ref.dtype.raw)
        block = np.empty(shape, raw)
        step = max(1, CHUNK_BYTES // (strides[0] * raw.itemsize))
        for at in range(0, rows if cols else 0, step):
            few = min(step, rows - at)
            span = np.empty((few - 1) * strides[0] + (cols - 1) * count + 1, raw)
            self.into(ref, (start + at * strides[0]) * raw.itemsize, span)
            steps = [n * raw.itemsize for n in strides]
            block[at : at + few] = np.lib.stride_tricks.as_strided(span, (few, cols), steps)
        return block

    def _apart(self, ref: TensorRef, count: int) -> Array:
        """The interleaved matrices one after the other, (count, elements of one); the last few are kept."""
        with self._cache_lock:
            found = self._cache.pop((ref, count), None)
            if found is None:
                while self._cache and sum(a.nbytes for a in self._cache.values()) + ref.nbytes > self._cache_bytes:
                    del self._cache[next(iter(self._cache))]
                flat = np.empty(ref.count, stored_item(ref.dtype))
                self.into(ref, 0, flat)
                found = np.ascontiguousarray(flat.reshape(-1, count).T)
            self._cache[ref, count] = found
            return found

    def slice(self, ref: TensorRef, span: tuple[int, int, int] | None) -> Array:
        """Stored bits of a range of one axis, (axis, begin, end), or of all of it, with the tensor's own axes."""
        if span is None:
            return self._kept(ref)
        axis, begin, end = span
        if axis == 0 and len(ref.shape) > 2 and end - begin == 1:  # an expert, of which each row needs all
            return self._kept(_part(ref, begin))[None]
        if axis == 0:
            row = math.prod(ref.shape[1:]) * stored_item(ref.dtype).itemsize
            block = np.empty((end - begin, *ref.shape[1:]), stored_item(ref.dtype))
            self.into(ref, begin * row, block)
            return block
        assert axis == 1, f"{ref.key}: a range of axis {axis}"
        if ref.nbytes <= self._cache_bytes or len(ref.shape) > 2:
            return self._kept(ref)[:, begin:end]
        return self.view(ref, begin, (ref.shape[0], end - begin), (ref.shape[1], 1))

    def _kept(self, ref: TensorRef) -> Array:
        """The tensor, kept for the next time where there is room."""
        if ref.nbytes > self._cache_bytes:
            whole = np.empty(ref.shape, stored_item(ref.dtype))
            self.into(ref, 0, whole)
            return whole
        return self._apart(ref, 1).reshape(ref.shape)

    def _make(self, ref: TensorRef, made: Made, offset: int, out: Array) -> None:
        """Values of a tensor that no file holds, from byte `offset` of it."""
        if not out.size:
            return
        if out.itemsize != stored_item(ref.dtype).itemsize:  # bytes, from anywhere
            self._make_bytes(ref, made, offset, byte_view(out))
            return
        start, flat, cols = (ref.start + offset) // out.itemsize, out.reshape(-1), made.cols
        first, last, tensor = start // cols, -(-(start + out.size) // cols), self.maker(made)
        rows = start == first * cols and out.size == (last - first) * cols
        if rows and tensor.into is not None and out.dtype == stored_item(ref.dtype):
            tensor.into(first, last, flat.reshape(-1, cols))
        else:
            flat[:] = tensor.rows(first, last).reshape(-1)[start - first * cols :][: out.size]

    def _make_bytes(self, ref: TensorRef, made: Made, offset: int, out: memoryview) -> None:
        row = made.cols * stored_item(ref.dtype).itemsize
        start = ref.start + offset
        first, last = start // row, -(-(start + len(out)) // row)
        values = byte_view(np.ascontiguousarray(self.maker(made).rows(first, last)))
        out[:] = values[start - first * row :][: len(out)]

    def maker(self, made: Made) -> Maker:
        """The function that makes rows of such a tensor; the last few are kept."""
        with self._lock:
            found = self._makers.pop(made, None)
            if found is not None:
                self._makers[made] = found
                return found
            making = self._making.setdefault(made, threading.Lock())
        with making:  # reads and may take long, so not under the lock of all
            with self._lock:
                found = self._makers.get(made)
            if found is None:
                found = maker(self, made)
                with self._lock:
                    self._keep(made, found)
        return found

    def _keep(self, made: Made, found: Maker) -> None:
        kind = [other for other in self._makers if other.formula == made.formula == "simulated"]
        gone = kind[: max(0, len(kind) + 1 - KEPT_SIMULATED)]
        gone += [other for other in self._makers if other not in gone][
            : len(self._makers) - len(gone) + 1 - KEPT_MAKERS
        ]
        for other in gone:
            del self._makers[other]
            self._making.pop(other, None)
        self._makers[made] = found

    def whole(self, ref: TensorRef) -> Array:
        """Stored bits of the tensor in its own shape."""
        return self.rows(ref, 0, ref.matrix[0]).reshape(ref.shape)
