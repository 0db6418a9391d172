"""The parts of weights that are stored in codes: are they what the merged weight encodes to?

The weight is recomputed by the plain formula, rounded to float32 as exact arithmetic would, and encoded again: every
bit of every part has to agree. Where the exact value cannot be told (a tuner that is no sum), the float32 on either
side is as right as the other. A sample looks at one block of rows, with the stored scales where the form takes them
from the whole weight.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import SpanReader
from inlay.codecs.compensation import compensated
from inlay.codecs.encoding import F32Array, encode_whole, row_blocks, settled
from inlay.codecs.table import codec
from inlay.dtypes import F32, Array, F64Array
from inlay.plan.pieces import pieces
from inlay.plan.types import Coded
from inlay.verification import report
from inlay.verification.recompute import Recomputed
from inlay.verification.report import TensorVerdict

BLOCK_ELEMENTS = 1 << 20
UNDECIDED = 2.0**-44  # relative; float64 of a long sum or a matrix factorisation is off by less
MOST_EXACT = 256  # elements of a block that are decided exactly; the others are taken either way
# Codes of another tool: its sums may round to the neighbouring float32, and that to another code.
NEAR = 2.0**-20
FEW = 1e-4  # the largest share of elements that may owe their code to that


def check_coded(
    reader: SpanReader, parts: Sequence[Coded], stored: Mapping[str, TensorRef], full: bool
) -> list[TensorVerdict]:
    """Verdicts on all parts of one weight. `stored` are the parts of the directory that is checked, by name."""
    bad = [v for part in parts if (v := _form(part, stored.get(part.part)))]
    if bad:
        return bad
    return _Weight(reader, parts, stored, full).verdicts()


def _form(part: Coded, ref: TensorRef | None) -> TensorVerdict | None:
    if ref is None:
        return TensorVerdict(part.key, report.MISSING)
    if (ref.dtype, ref.shape) != (part.dtype, part.shape):
        what = f"{ref.dtype.name} {ref.shape}, expected {part.dtype.name} {part.shape}"
        return TensorVerdict(part.key, report.WRONG, cause=what)
    return None


class _Weight:
    def __init__(self, reader: SpanReader, parts: Sequence[Coded], stored: Mapping[str, TensorRef], full: bool) -> None:
        self.reader, self.parts, self.stored, self.full = reader, parts, stored, full
        self.first = parts[0]
        self.form, self.settings = codec(self.first.codec), self.first.settings
        self.codes = next(iter(self.form.layout(self.settings)))
        self.rows, self.cols = self.first.weight.matrix
        self._recomputed = [(p.first, p.last, Recomputed(reader, p.entry)) for p in pieces(self.first.weight)]
        self._open = False  # whether a value was met that can be rounded either way

    def verdicts(self) -> list[TensorVerdict]:
        unfinished = self.codes in getattr(self.form, "UNFINISHED", ())  # which only all blocks together make
        whole = self.full or unfinished or self.rows * self.cols <= BLOCK_ELEMENTS
        first, last = (0, self.rows) if whole else self._sample()
        found = self._found(first, last, whole)
        wanted = self._encoded(first, last, whole, up=False)
        same = {part: _either(found[part], wanted[part], wanted[part]) for part in found if part in wanted}
        if not all(same.values()) and self._open:
            other = self._encoded(first, last, whole, up=True)
            same = {part: _either(found[part], wanted[part], other[part]) for part in same}
        rounded = not all(same.values()) and self._as_near(first, last, same, wanted)
        return [self._verdict(part, same, rounded, last - first, found) for part in self.parts]

    def _found(self, first: int, last: int, whole: bool) -> dict[str, Array]:
        """What is stored of these rows."""
        if whole:
            return {part.part: self.reader.slice(self.stored[part.part], None) for part in self.parts}
        spans = self.form.spans(self.settings, first, last)
        checked = [self.codes] if self._of_all() else [p.part for p in self.parts if spans.get(p.part) is not None]
        return {part: self.reader.slice(self.stored[part], spans[part]) for part in checked}

    def _encoded(self, first: int, last: int, whole: bool, up: bool) -> Mapping[str, Array]:
        """What the merged weight encodes to; `up`: open values are rounded up."""

        def blocks() -> Iterator[tuple[int, F32Array]]:
            for begin, end in self._ranges(0, self.rows):
                yield begin, self._chosen(begin, end, up)

        if whole:
            return encode_whole(self.form, self.settings, blocks, self._kept)
        known = self._scales(first, last) if self._measures() else self._kept(first, last)
        encoded: Mapping[str, Array] = self.form.encode(self._chosen(first, last, up), self.settings, first, known)
        return encoded

    def _measures(self) -> bool:
        """Whether codes depend on the whole weight."""
        nothing = np.zeros((0, 1), np.float32)
        return hasattr(self.form, "measure") and self.form.measure(nothing, self.settings).size > 0

    def _of_all(self) -> bool:
        """Whether scales depend on the whole weight."""
        return self.codes not in self.first.kept and (self._measures() or hasattr(self.form, "finish"))

    def _verdict(
        self, part: Coded, same: Mapping[str, bool], rounded: bool, rows: int, found: Mapping[str, Array]
    ) -> TensorVerdict:
        checked = rows * self.cols if part.part == self.codes or self.codes in self.first.kept else 0
        if same.get(part.part, True):
            return TensorVerdict(part.key, report.ENCODED, checked)
        made = self.first.weight.source.made
        base = dict(made.parts).get(part.part) if made is not None else None
        own = None if base is None or not self.full else self.reader.slice(base, None)
        if own is not None and _either(found[part.part], own, own):
            return TensorVerdict(part.key, report.UNMERGED, checked, cause="equals the base")
        if rounded:
            return TensorVerdict(part.key, report.ROUNDED, checked, cause="some codes are the next nearest")
        return TensorVerdict(part.key, report.WRONG, checked, cause="does not hold what the merged weight encodes to")

    def _ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Blocks of rows that are worked on at once, which begin where the form allows it."""
        step = self.form.align(self.settings)
        block = max(1, BLOCK_ELEMENTS // max(1, self.cols) // step) * step
        return ((first + begin, first + end) for begin, end in row_blocks(last - first, block))

    def _sample(self) -> tuple[int, int]:
        return random.Random(self.first.weight.key).choice(list(self._ranges(0, self.rows)))

    def _kept(self, first: int, last: int) -> dict[str, Array]:
        spans = self.form.spans(self.settings, first, last)
        return {part: self.reader.slice(ref, spans.get(part)) for part, ref in self.first.kept.items()}

    def _scales(self, first: int, last: int) -> dict[str, Array]:
        """What decoding these rows takes of the stored parts, beside the codes."""
        spans = self.form.spans(self.settings, first, last)
        return {p: self.reader.slice(self.stored[p], span) for p, span in spans.items() if p != self.codes}

    def _values(self, first: int, last: int) -> F64Array:
        """The merged weight, recomputed."""
        return np.concatenate([recomputed.expected(rows).value for recomputed, rows in self._cut(first, last)])

    def _cut(self, first: int, last: int) -> Iterator[tuple[Recomputed, range]]:
        """These rows, piece by piece of a fused weight."""
        for begin, end, recomputed in self._recomputed:
            low, high = max(first, begin), min(last, end)
            if low < high:
                yield recomputed, range(low - begin, high - begin)

    def _rounded(self, first: int, last: int, up: bool) -> F32Array:
        """The merged weight, rounded once to float32."""
        return np.concatenate([self._round(recomputed, rows, up) for recomputed, rows in self._cut(first, last)])

    def _chosen(self, first: int, last: int, up: bool) -> F32Array:
        """Values whose nearest codes are wanted: the merged weight, or what stands for it with `compensate`."""
        merged = self._rounded(first, last, up)
        if not self.first.compensate:
            return merged
        base = np.concatenate([x.expected(rows).base for x, rows in self._cut(first, last)]).astype(np.float32)
        known = self._kept(first, last)
        return compensated(self.form, self.first.codec, self.settings, first, merged, base, known)

    def _round(self, recomputed: Recomputed, rows: range, up: bool) -> F32Array:
        expected = recomputed.expected(rows)
        largest = np.maximum(np.abs(expected.base), np.abs(expected.value))
        for _, delta in expected.deltas:
            largest = np.maximum(largest, np.abs(delta))
        with np.errstate(over="ignore", invalid="ignore"):
            low = (expected.value - UNDECIDED * largest).astype(np.float32)
            high = (expected.value + UNDECIDED * largest).astype(np.float32)
            nearest = expected.value.astype(np.float32)
        open_ = np.argwhere((low != high) & np.isfinite(nearest))
        decided = MOST_EXACT if recomputed.decidable else 0
        for i, j in open_[:decided]:
            nearest[i, j] = recomputed.exactly(rows[int(i)], int(j), F32)
        for i, j in open_[decided:]:
            self._open = True
            nearest[i, j] = (high if up else low)[i, j]
        return nearest

    def _as_near(self, first: int, last: int, same: Mapping[str, bool], wanted: Mapping[str, Array]) -> bool:
        """Whether only a few codes differ, each as near to the merged weight as it can be but for its rounding."""
        if not all(right for part, right in same.items() if part != self.codes):
            return False
        try:
            settings = settled(self.form, self.settings, {p: self.reader.whole(r) for p, r in self.stored.items()})
        except ValueError:  # parts that contradict each other
            return False
        axis, start, _ = self.form.spans(self.settings, first, last)[self.codes] or (0, 0, 0)
        off = 0
        for at, end in self._ranges(first, last):
            values, scales = self._values(at, end), self._scales(at, end)
            span = self.form.spans(self.settings, at, end)[self.codes]
            stored = {**scales, self.codes: self.reader.slice(self.stored[self.codes], span)}
            cut = slice(None) if span is None else slice(span[1] - start, span[2] - start)
            best = {**scales, self.codes: wanted[self.codes][(slice(None),) * axis + (cut,)]}
            decoded = self.form.decode(stored, settings, at, end)
            error = np.abs(decoded - values)
            least = np.abs(self.form.decode(best, settings, at, end) - values)
            if not (error <= least + NEAR * np.abs(values).max(initial=0)).all():
                return False
            off += int((error != least).sum())
        return 0 < off <= FEW * (last - first) * self.cols + 1


def _either(found: Array, one: Array, other: Array) -> bool:
    """Whether each byte is that of one of the two; of floats too, so that -0.0 and 0.0 differ."""
    a, b, c = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (found, one, other))
    return len(a) == len(b) and bool(((a == b) | (a == c)).all())
