"""The parts of weights that are stored in codes: are they what the merged weight encodes to?

The weight is recomputed by the plain formula, rounded to float32 and encoded again. A sample looks at one block of
rows, with the stored scales where the form takes them from the whole weight.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import SpanReader
from inlay.codecs.encoding import F32Array, encode_whole, row_blocks, settled
from inlay.codecs.table import codec
from inlay.dtypes import Array, F64Array
from inlay.plan.pieces import pieces
from inlay.plan.types import Coded
from inlay.verification import report
from inlay.verification.recompute import Recomputed
from inlay.verification.report import TensorVerdict

BLOCK_ELEMENTS = 1 << 20
# Float64 sums in another order may round to the neighbouring float32, and that to another code.
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

    def verdicts(self) -> list[TensorVerdict]:
        whole = self.full or self.rows * self.cols <= BLOCK_ELEMENTS
        first, last = (0, self.rows) if whole else self._sample()
        local = not (hasattr(self.form, "measure") or hasattr(self.form, "finish"))
        if whole:
            wanted = encode_whole(self.form, self.settings, self._blocks, self._kept)
            found = {part: self.reader.slice(ref, None) for part, ref in self._checked().items()}
        else:
            known = self._kept(first, last) if local else self._scales(first, last)
            values = self._values(first, last).astype(np.float32)
            wanted = self.form.encode(values, self.settings, first, known)
            spans = self.form.spans(self.settings, first, last)
            checked = self._checked() if local else {self.codes: self.stored[self.codes]}
            found = {part: self.reader.slice(ref, spans.get(part)) for part, ref in checked.items()}
        same = {part: np.array_equal(found[part], wanted[part]) for part in found}
        near = all(same.values()) or self._as_near(first, last, wanted)
        return [self._verdict(part, same.get(part.part, True) or near, last - first, found) for part in self.parts]

    def _verdict(self, part: Coded, right: bool, rows: int, found: Mapping[str, Array]) -> TensorVerdict:
        checked = rows * self.cols if part.part == self.codes else 0
        if right:
            return TensorVerdict(part.key, report.ENCODED, checked)
        made = self.first.weight.source.made
        base = dict(made.parts).get(part.part) if made is not None else None
        if base is not None and self.full and np.array_equal(self.reader.slice(base, None), found[part.part]):
            return TensorVerdict(part.key, report.UNMERGED, checked, cause="equals the base")
        return TensorVerdict(part.key, report.WRONG, checked, cause="does not hold what the merged weight encodes to")

    def _sample(self) -> tuple[int, int]:
        step = self.form.align(self.settings)
        block = max(1, BLOCK_ELEMENTS // max(1, self.cols) // step) * step
        ranges = list(row_blocks(self.rows, block))
        return random.Random(self.first.weight.key).choice(ranges)

    def _checked(self) -> dict[str, TensorRef]:
        return {part.part: self.stored[part.part] for part in self.parts}

    def _kept(self, first: int, last: int) -> dict[str, Array]:
        spans = self.form.spans(self.settings, first, last)
        return {part: self.reader.slice(ref, spans.get(part)) for part, ref in self.first.kept.items()}

    def _scales(self, first: int, last: int) -> dict[str, Array]:
        """What decoding these rows takes of the stored parts, beside the codes."""
        spans = self.form.spans(self.settings, first, last)
        return {p: self.reader.slice(self.stored[p], span) for p, span in spans.items() if p != self.codes}

    def _values(self, first: int, last: int) -> F64Array:
        """The merged weight, recomputed."""
        found = []
        for begin, end, recomputed in self._recomputed:
            low, high = max(first, begin), min(last, end)
            if low < high:
                found.append(recomputed.expected(range(low - begin, high - begin)).value)
        return np.concatenate(found)

    def _blocks(self) -> Iterator[tuple[int, F32Array]]:
        step = self.form.align(self.settings)
        block = max(1, BLOCK_ELEMENTS // max(1, self.cols) // step) * step
        for first, last in row_blocks(self.rows, block):
            yield first, self._values(first, last).astype(np.float32)

    def _as_near(self, first: int, last: int, wanted: Mapping[str, Array]) -> bool:
        """Whether what is stored is as near to the merged weight as it can be, but for roundings of that."""
        step = self.form.align(self.settings)
        block = max(1, BLOCK_ELEMENTS // max(1, self.cols) // step) * step
        try:
            settings = settled(self.form, self.settings, {p: self.reader.whole(r) for p, r in self.stored.items()})
        except ValueError:  # parts that contradict each other
            return False
        off = 0
        for at in range(first, last, block):
            end = min(last, at + block)
            values = self._values(at, end)
            spans = self.form.spans(self.settings, at, end)
            scales = self._scales(at, end)
            stored = {**scales, self.codes: self.reader.slice(self.stored[self.codes], spans[self.codes])}
            axis, begin, stop = spans[self.codes]
            shift = 0 if (first, last) == (0, self.rows) else self.form.spans(self.settings, first, last)[self.codes][1]
            cut = (slice(None),) * axis + (slice(begin - shift, stop - shift),)
            best = {**scales, self.codes: wanted[self.codes][cut]}
            error = np.abs(self.form.decode(stored, settings, at, end) - values)
            least = np.abs(self.form.decode(best, settings, at, end) - values)
            off += int((error != least).sum())
            if (error > least + NEAR * np.abs(values).max(initial=0)).any():
                return False
        return off <= FEW * (last - first) * self.cols + 1
