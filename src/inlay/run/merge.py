"""One tensor: read its factors, then merge block after block of its rows.

Three ways lead to the same bytes, because each result is the correctly rounded one: the float32 kernel
for sums with a 16-bit result, float64 with a bound for the rest, and exact arithmetic for what they
leave open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import F64, Array, DType, F64Array, decode, decode32, is_finite, round_nearest
from inlay.plan.memory import by_kernel
from inlay.plan.steps import AnyStep, Delta, Dense, Part, Step
from inlay.plan.types import Entry
from inlay.tuners import dense, device, dora, expansion, kernel, lora
from inlay.tuners.bounded import Bounded
from inlay.tuners.exact import ExactStep, element

FEW_OPEN = 32  # elements of a block that are decided one by one
DECIDED_AT_ONCE = 1 << 12  # elements whose sums are exact at once

Device = Any  # torch.device, or None for this processor
Length = tuple[F64Array, F64Array]


@dataclass(frozen=True)
class Loaded:
    """A step with what every block of rows needs: `right` (r, cols), and for DoRA its lengths and magnitude."""

    step: Step
    right: F64Array
    magnitude: F64Array | None
    length: Length | None


@dataclass(frozen=True)
class LoadedDense:
    """A step of another tuner with its prepared parts."""

    step: Dense
    parts: Mapping[str, F64Array]


class Merger:
    """Merges blocks of one entry (or piece of one); safe to use from several threads.

    `by_rows` counts in rows even where each element stands alone.
    """

    def __init__(
        self, reader: SpanReader, entry: Entry, rows: int, on: Device = None, *, by_rows: bool = False
    ) -> None:
        self.reader = reader
        self.entry = entry
        self._elementwise = entry.elementwise and not by_rows
        self._source = entry.source_matrix
        additive = len(entry.low_rank) == len(entry.steps) and all(s.magnitude is None for s in entry.low_rank)
        self._device = on if additive and entry.steps and not entry.patches else None
        self.rows, self.cols = entry.matrix
        self._patched = {row: (p.ref, i) for p in entry.patches for i, row in enumerate(p.rows)}
        self._packed: kernel.Packed | None = None
        self._loaded: tuple[Loaded | LoadedDense | Delta, ...] = ()
        self._kernel = by_kernel(entry) and self._device is None
        if self._kernel and entry.steps:
            self._packed = self._pack()
        elif entry.steps:
            self._loaded = tuple(self._prepare(step, rows) for step in entry.steps)

    def block(self, first: int, raw: Array, out: Array) -> bool:
        """Merge the rows that begin at `first`; `raw` and `out` are (rows, cols) of stored bits.

        True if every result is finite.
        """
        if self._packed is not None:
            return self._by_kernel(first, raw, out, self._packed)
        if self._device is not None:
            out[:] = self._on_device(first, raw)
        elif self.entry.steps:
            out[:] = self._by_float64(first, raw)
        else:
            self._convert(first, raw, out)
        return bool(is_finite(out, self.entry.dtype).all())

    def read(self, first: int, last: int, buffer: Array) -> Array:
        """Stored bits of source rows `[first, last)`; rows beyond the source are zero until they are patched.

        Where each element stands alone, `first` and `last` count elements.
        """
        if self._elementwise:
            flat = replace(self.entry.source, shape=(self.entry.count, 1))
            return self.reader.rows(flat, first, last, buffer)
        there = max(first, min(last, self._source.matrix[0]))
        block = buffer[: (last - first) * self.cols].reshape(last - first, self.cols)
        if there > first:
            self.reader.rows(self._source, first, there, block[: there - first].reshape(-1))
        block[there - first :] = 0
        return block

    def _factor(self, part: Part, first: int, last: int) -> Array:
        """Rows `[first, last)` of a factor in the orientation of the stored weight, as stored bits."""
        part = part.rows(first, last)
        return self.reader.view(part.ref, part.start, part.shape, part.strides)

    def _left64(self, step: Step, first: int, last: int) -> F64Array:
        if step.left is None:
            return np.ones((last - first, 1))
        return np.ascontiguousarray(decode(self._factor(step.left, first, last), step.left.ref.dtype))

    def _right64(self, step: Step) -> F64Array:
        right = self._factor(step.right, 0, step.right.shape[0])
        return np.ascontiguousarray(decode(right, step.right.ref.dtype))

    def _pack(self) -> kernel.Packed:
        steps = self.entry.low_rank
        right = np.empty((sum(s.rank for s in steps), self.cols), np.float32)
        at = 0
        for step in steps:
            stored = self._factor(step.right, 0, step.right.shape[0])
            right[at : at + step.rank] = decode32(stored, step.right.ref.dtype)
            at += step.rank
        scale = np.concatenate([np.full(s.rank, s.scaling) for s in steps] or [np.empty(0)])
        return kernel.Packed.of(right, scale)

    def _left32(self, first: int, last: int) -> npt.NDArray[np.float32]:
        left = np.ones((last - first, sum(s.rank for s in self.entry.low_rank)), np.float32)
        at = 0
        for step in self.entry.low_rank:
            if step.left is not None:
                stored = self._factor(step.left, first, last)
                left[:, at : at + step.rank] = decode32(stored, step.left.ref.dtype)
            at += step.rank
        return left

    def _prepare(self, step: AnyStep, rows: int) -> Loaded | LoadedDense | Delta:
        if isinstance(step, Delta):
            return step
        return self._load(step, rows) if isinstance(step, Step) else self._load_dense(step)

    def _load(self, step: Step, rows: int) -> Loaded:
        right = self._right64(step)
        magnitude = length = None
        if step.magnitude is not None:
            values = decode(self.reader.whole(step.magnitude), step.magnitude.dtype).reshape(-1)
            magnitude = values[:, None] if step.axis == 1 else values[None, :]
            if step.axis == 0:
                length = self._column_lengths(step, right, rows)
        return Loaded(step, right, magnitude, length)

    def _load_dense(self, step: Dense) -> LoadedDense:
        file = dense.tuner(step.tuner)
        parts = {name: self._values(ref) for name, ref in step.parts.items()}
        return LoadedDense(step, parts if step.bias else file.prepare(parts, step.settings, step.shape))

    def _values(self, ref: TensorRef) -> Any:
        """A part in its own shape: floats as float64, indices as int64."""
        stored = self.reader.whole(ref)
        return decode(stored, ref.dtype) if ref.dtype.mergeable else stored.astype(np.int64)

    def _column_lengths(self, step: Step, right: F64Array, rows: int) -> Length:
        """Lengths along the stored rows need all of them: one pass over the tensor before the merge."""
        total, errors = np.zeros(self.cols), np.zeros(self.cols)
        buffer = np.empty(rows * self.cols, np.dtype(self.entry.source.dtype.raw))
        for first in range(0, self.rows, rows):
            last = min(self.rows, first + rows)
            base = self._base(first, self.read(first, last, buffer))
            parts = {"left": self._left64(step, first, last), "right": right}
            block_total, block_errors = dora.squares(base, parts, step.scaling, axis=0)
            total += block_total
            errors += block_errors
        blocks = -(-self.rows // rows)
        length, relative = dora.norm(total, errors, self.rows)
        return length[None, :], relative[None, :] + blocks * 2.0**-52

    def _base(self, first: int, raw: Array) -> Bounded:
        """The weight before any step, token rows in their place."""
        values = decode(raw, self.entry.source.dtype)
        for row in range(first, first + len(raw)) if self._patched else ():
            if row in self._patched:
                ref, i = self._patched[row]
                values[row - first] = decode(self.reader.rows(ref, i, i + 1), ref.dtype)
        return Bounded.exact(values)

    def _by_float64(self, first: int, raw: Array) -> Array:
        base = weight = self._base(first, raw)
        last = first + len(raw)
        if not self.entry.low_rank:
            return self._by_other_tuners(first, base)
        low_rank = [loaded for loaded in self._loaded if isinstance(loaded, Loaded)]
        lefts = [self._left64(loaded.step, first, last) for loaded in low_rank]
        for loaded, left in zip(low_rank, lefts, strict=True):
            parts = {"left": left, "right": loaded.right}
            if loaded.magnitude is None:
                weight = lora.merge(weight, parts, loaded.step.scaling)
            else:
                weight = self._dora(loaded, weight, base, parts, first, last)
        bits, open_ = weight.rounded(self.entry.dtype)
        if all(loaded.magnitude is None for loaded in low_rank):
            open_ |= ~np.isfinite(weight.value) & np.isfinite(base.value)  # a sum that left the range on its way
        return self._settled(first, bits, open_, base.value, lefts)

    def _dora(
        self, loaded: Loaded, weight: Bounded, base: Bounded, parts: Mapping[str, F64Array], first: int, last: int
    ) -> Bounded:
        length, magnitude = loaded.length, loaded.magnitude
        assert magnitude is not None
        if length is None:
            total, errors = dora.squares(base, parts, loaded.step.scaling, axis=1)
            value, relative = dora.norm(total, errors, self.cols)
            length = value[:, None], relative[:, None]
            magnitude = magnitude[first:last]
        return dora.merge(weight, {**parts, "magnitude": magnitude}, loaded.step.scaling, length)

    def _by_other_tuners(self, first: int, base: Bounded) -> Array:
        """Steps of which one at least is no low-rank pair: float64, rounded once."""
        weight = base.value
        for loaded in self._loaded:
            if isinstance(loaded, Delta):
                weight = weight + self.reader.rows(loaded.ref, first, first + len(weight))
            elif isinstance(loaded, LoadedDense):
                step = loaded.step
                weight = dense.merge(
                    step.tuner, weight, base.value, loaded.parts, step.settings, step.shape, first,
                    transposed=step.transposed, bias=step.bias, factor=step.weight,
                )  # fmt: skip
            else:
                weight = self._low_rank_row_block(loaded, weight, base, first)
        return round_nearest(np.ascontiguousarray(weight), self.entry.dtype)

    def _low_rank_row_block(self, loaded: Loaded, weight: F64Array, base: Bounded, first: int) -> F64Array:
        last = first + len(weight)
        parts = {"left": self._left64(loaded.step, first, last), "right": loaded.right}
        if loaded.magnitude is None:
            return lora.merge(Bounded.exact(weight), parts, loaded.step.scaling).value
        return self._dora(loaded, Bounded.exact(weight), base, parts, first, last).value

    def _on_device(self, first: int, raw: Array) -> Array:
        low_rank = [loaded for loaded in self._loaded if isinstance(loaded, Loaded)]
        lefts = [self._left64(loaded.step, first, first + len(raw)) for loaded in low_rank]
        pairs = [(left, x.right, x.step.scaling) for left, x in zip(lefts, low_rank, strict=True)]
        source = self.entry.source.dtype
        assert self._device is not None
        bits, open_ = device.merge(raw, source, pairs, self.entry.dtype, self._device)
        return self._settled(first, bits, open_, decode(raw, source), lefts)

    def _settled(
        self, first: int, bits: Array, open_: npt.NDArray[np.bool_], base: F64Array, lefts: Sequence[F64Array]
    ) -> Array:
        """`bits` with the open elements decided exactly."""
        if not open_.any():
            return bits
        places = np.argwhere(open_)
        low_rank = [loaded for loaded in self._loaded if isinstance(loaded, Loaded)]
        if self.entry.dtype is not F64 and all(loaded.magnitude is None for loaded in low_rank):
            triples = [(left, x.right, x.step.scaling) for left, x in zip(lefts, low_rank, strict=True)]
            places = _decided(bits, places, base, triples, self.entry.dtype)
        for i, j in places:
            bits[i, j] = self._exactly(first, int(i), int(j), base, lefts)
        return bits

    def _exactly(self, first: int, i: int, j: int, base: F64Array, lefts: Sequence[F64Array]) -> Array:
        steps = []
        line, position = base[i], j
        low_rank = [loaded for loaded in self._loaded if isinstance(loaded, Loaded)]
        for loaded, left in zip(low_rank, lefts, strict=True):
            step = loaded.step
            magnitude = None
            if step.axis == 0 and loaded.magnitude is not None:
                magnitude = float(loaded.magnitude[0, j])
            elif loaded.magnitude is not None:
                magnitude = float(loaded.magnitude[first + i, 0])
            if any(x.step.axis == 0 and x.magnitude is not None for x in low_rank):
                whole = self._left64(step, 0, self.rows)
                steps.append(ExactStep(loaded.right[:, j], np.ascontiguousarray(whole.T), step.scaling, magnitude))
                line, position = self._column(j), first + i
            else:
                steps.append(ExactStep(left[i], loaded.right, step.scaling, magnitude))
        value = element(float(base[i, j]), position, line, steps, self.entry.dtype)
        return round_nearest(np.array([value]), self.entry.dtype)[0]  # type: ignore[no-any-return]

    def _column(self, j: int) -> F64Array:
        """One column of the weight before any step."""
        source = self.entry.source
        column = np.zeros(self.rows)
        column[: source.matrix[0]] = decode(self.reader.columns(source, j, j + 1), source.dtype)[:, 0]
        for row, (ref, i) in self._patched.items():
            column[row] = decode(self.reader.rows(ref, i, i + 1), ref.dtype)[0, j]
        return column

    def _by_kernel(self, first: int, raw: Array, out: Array, right: kernel.Packed) -> bool:
        source, dtype = self.entry.source.dtype, self.entry.dtype
        left = self._left32(first, first + len(raw))
        result = kernel.merge(raw, source, left, right, out, dtype)
        places = np.stack(np.divmod(result.open, self.cols), axis=1)
        if len(places) > FEW_OPEN:
            triples, at = [], 0
            for step in self.entry.low_rank:
                ours = left[:, at : at + step.rank].astype(np.float64)
                triples.append((ours, self._right64(step), step.scaling))
                at += step.rank
            places = _decided(out, places, decode(raw, source), triples, dtype)
        for i, j in places.tolist():
            out[i, j] = self._sum_exactly(float(decode(raw[i, j : j + 1], source)[0]), left[i], j)
        if result.open.size == 0:
            return result.finite
        return bool(is_finite(out, dtype).all())  # what was open is decided now, to a finite value or not

    def _sum_exactly(self, base: float, left: npt.NDArray[np.float32], j: int) -> Array:
        steps, at = [], 0
        for step in self.entry.low_rank:
            column = self._right_column(step, j)
            steps.append(ExactStep(left[at : at + step.rank].astype(np.float64), column, step.scaling))
            at += step.rank
        value = element(base, 0, None, steps, self.entry.dtype)
        return round_nearest(np.array([value]), self.entry.dtype)[0]  # type: ignore[no-any-return]

    def _right_column(self, step: Step, j: int) -> F64Array:
        part = step.right.columns(j, j + 1)
        return decode(self.reader.view(part.ref, part.start, part.shape, part.strides), part.ref.dtype)

    def _convert(self, first: int, raw: Array, out: Array) -> None:
        """Rows as they are, or in another type; trained token rows in their place."""
        source, dtype = self.entry.source.dtype, self.entry.dtype
        if source is dtype:
            out[:] = raw
        elif self._kernel:
            kernel.convert(raw, source, out, dtype)
        else:
            out[:] = round_nearest(decode(raw, source), dtype)
        for row in range(first, first + len(raw)) if self._patched else ():
            if row in self._patched:
                ref, i = self._patched[row]
                out[row - first] = round_nearest(decode(self.reader.rows(ref, i, i + 1), ref.dtype), dtype)[0]


def _decided(
    bits: Array, places: npt.NDArray[np.int64], base: F64Array, triples: Sequence[expansion.Triple], dtype: DType
) -> npt.NDArray[np.int64]:
    """Decide the elements at `places` by exact sums of many at once; those that are left to single ones."""
    open_ = []
    for at in range(0, len(places), DECIDED_AT_ONCE):
        i, j = places[at : at + DECIDED_AT_ONCE].T
        pairs = [(left[i], right[:, j].T, scaling) for left, right, scaling in triples]
        values, right_ = expansion.sums(base[i, j], pairs)
        bits[i[right_], j[right_]] = round_nearest(values[right_], dtype)
        open_.append(places[at : at + DECIDED_AT_ONCE][~right_])
    return np.concatenate(open_)
