"""Each tensor of a merged directory: what is it?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import F64, Array, DType, decode, round_nearest
from inlay.plan.pieces import Piece, pieces
from inlay.plan.types import Coded, Entry, Plan
from inlay.verification import report
from inlay.verification.causes import find_cause
from inlay.verification.codes import check_coded
from inlay.verification.recompute import Expected, Recomputed
from inlay.verification.report import TensorVerdict

MERGED = "merged"
SAMPLE_ROWS = 4
SAMPLE_PIECES = 4
SAMPLE_ELEMENTS = 1 << 16
BLOCK_ELEMENTS = 1 << 20
CAUSE_ROWS = 32
UNDECIDED = 2.0**-44  # relative; float64 of a long sum or a matrix factorisation is off by less
MOST_EXACT = 256  # elements of a block that are decided exactly before it is taken as simply different


def check_tensors(plan: Plan, merged: Checkpoint, full: bool) -> Iterator[TensorVerdict]:
    """A verdict on every tensor of the plan, and on those that the directory has beside them."""
    with SpanReader({**plan.roots, MERGED: merged.path}) as reader:
        coded: dict[str, list[Coded]] = {}
        for entry in plan.entries.values():
            if isinstance(entry, Entry):
                yield _check(reader, plan, entry, merged, full)
            else:
                coded.setdefault(entry.weight.key, []).append(entry)
        for parts in coded.values():
            yield from check_coded(reader, parts, _stored_parts(parts[0], parts, merged), full)
    for key in sorted(merged.tensors.keys() - plan.entries.keys()):
        yield TensorVerdict(key, report.EXTRA)


def _stored_parts(one: Coded, parts: Sequence[Coded], merged: Checkpoint) -> dict[str, TensorRef]:
    """Where the directory has the parts of a weight: those that are encoded, and those that are kept."""
    keys = {part.part: part.key for part in parts} | {part: ref.key for part, ref in one.kept.items()}
    places = {part: merged.tensors[key] for part, key in keys.items() if key in merged.tensors}
    return {part: TensorRef.of(MERGED, shard.file, info) for part, (shard, info) in places.items()}


def _check(reader: SpanReader, plan: Plan, entry: Entry, merged: Checkpoint, full: bool) -> TensorVerdict:
    if entry.key not in merged.tensors:
        return TensorVerdict(entry.key, report.MISSING)
    shard, info = merged.tensors[entry.key]
    ref = TensorRef.of(MERGED, shard.file, info)
    if ref.shape != entry.shape:
        return TensorVerdict(entry.key, report.WRONG, cause=f"shape {ref.shape}, expected {entry.shape}")
    if entry.elementwise and ref.dtype is entry.source.dtype:
        return _check_bytes(reader, entry, ref, full)
    if not (ref.dtype.mergeable and entry.source.dtype.mergeable):
        return TensorVerdict(entry.key, report.WRONG, cause=f"{ref.dtype.name}, expected {entry.dtype.name}")
    if entry.elementwise:
        return _check_converted(reader, entry, ref, full)
    parts = pieces(entry)
    if len(parts) == 1:
        return _Comparison(reader, plan, entry, ref, full).verdict()
    return _joined(entry.key, [_check_piece(reader, plan, entry, piece, ref, full) for piece in _some(parts, full)])


def _some(parts: Sequence[Piece], full: bool) -> Sequence[Piece]:
    """All pieces, or a few that an adapter touches, the same for the same key."""
    touched = [piece for piece in parts if piece.entry.touched]
    if full or len(touched) <= SAMPLE_PIECES:
        return parts
    return random.Random(touched[0].entry.key).sample(touched, SAMPLE_PIECES)


def _check_piece(
    reader: SpanReader, plan: Plan, entry: Entry, piece: Piece, ref: TensorRef, full: bool
) -> TensorVerdict:
    cols = entry.matrix[1]
    start = ref.start + ref.dtype.nbytes(piece.first * cols)
    found = replace(ref, shape=(piece.last - piece.first, cols), start=start)
    if piece.entry.steps:
        return _Comparison(reader, plan, piece.entry, found, full).verdict()
    if ref.dtype is entry.source.dtype:
        return _check_bytes(reader, piece.entry, found, full)
    return _check_converted(reader, piece.entry, found, full)


def _joined(key: str, verdicts: Sequence[TensorVerdict]) -> TensorVerdict:
    """One verdict on a tensor from those on its pieces: the common one of those that are not right."""
    bad = [v for v in verdicts if v.verdict not in (report.EXACT, report.BASE)]
    names = {v.verdict for v in bad}
    changed = [v for v in verdicts if v.verdict != report.BASE]
    name = report.EXACT if not bad else names.pop() if len(names) == 1 else report.WRONG
    if name == report.UNMERGED and len(bad) < len(changed):
        name = report.WRONG
    cause = next((v.cause for v in bad if v.cause), "")
    if bad and len(bad) < len(changed):
        cause = f"{len(bad)} of {len(changed)} of its modules: {cause or 'differ'}"
    checked, off = sum(v.checked for v in verdicts), sum(v.off for v in verdicts)
    return TensorVerdict(key, name, checked, off, max(v.max_ulps for v in verdicts), cause)


def _check_converted(reader: SpanReader, entry: Entry, ref: TensorRef, full: bool) -> TensorVerdict:
    """A tensor that must be its source, rounded to another type: in pieces, whatever its shape."""
    bad, good = (report.WRONG, report.EXACT) if entry.touched else (report.CHANGED, report.BASE)
    source, found = (replace(r, shape=(entry.count, 1)) for r in (entry.source, ref))
    checked = off = ulps = 0
    for first, last in _pieces(entry, full):
        stored = reader.rows(found, first, last)
        wanted = round_nearest(decode(reader.rows(source, first, last), source.dtype), found.dtype)
        differ = stored.view(_bits(stored)) != wanted.view(_bits(wanted))
        checked += stored.size
        if differ.any():
            off += int(differ.sum())
            ulps = max(ulps, int(_ulps(stored, wanted).max()))
    return TensorVerdict(entry.key, bad if off else good, checked, off, ulps)


def _pieces(entry: Entry, full: bool) -> Iterator[tuple[int, int]]:
    """Ranges of elements to look at: all, or those of a few rows, long rows cut short."""
    if full:
        yield from ((at, min(entry.count, at + SAMPLE_ELEMENTS)) for at in range(0, entry.count, SAMPLE_ELEMENTS))
        return
    rows, cols = entry.matrix
    for row in _sample_rows(entry.key, rows, cols):
        yield row * cols, row * cols + min(cols, SAMPLE_ELEMENTS)


def _check_bytes(reader: SpanReader, entry: Entry, ref: TensorRef, full: bool) -> TensorVerdict:
    """A tensor that must be the bytes of its source."""
    verdict = report.EXACT if entry.touched else report.BASE
    checked = 0
    for start, end in _spans(entry.key, ref.nbytes, full):
        wanted, found = np.empty(end - start, np.uint8), np.empty(end - start, np.uint8)
        reader.into(entry.source, start, wanted)
        reader.into(ref, start, found)
        checked += (end - start) * 8 // ref.dtype.bits
        if off := int(np.count_nonzero(wanted != found)):
            bad = report.WRONG if entry.touched else report.CHANGED
            return TensorVerdict(entry.key, bad, checked, off, cause=f"{off} bytes differ from byte {start} on")
    return TensorVerdict(entry.key, verdict, checked)


def _spans(key: str, nbytes: int, full: bool) -> Iterator[tuple[int, int]]:
    """Byte ranges to look at: all, or the ends and a few in between, the same for the same key."""
    size = SAMPLE_ELEMENTS
    if full or nbytes <= 4 * size:
        step = BLOCK_ELEMENTS * 8
        yield from ((at, min(nbytes, at + step)) for at in range(0, nbytes, step))
        return
    pick = random.Random(key)
    inner = [pick.randrange(size, nbytes - 2 * size) for _ in range(2)]
    yield from ((at, at + size) for at in (0, *sorted(inner), nbytes - size))


def _sample_rows(key: str, rows: int, cols: int) -> list[int]:
    count = max(1, min(rows, SAMPLE_ROWS, 4 * SAMPLE_ELEMENTS // max(1, cols)))
    return sorted(random.Random(key).sample(range(rows), count))


@dataclass
class _Tally:
    """What the comparison of blocks adds up to."""

    checked: int = 0
    off: int = 0
    max_ulps: int = 0
    equals_base: bool = True
    within_rounding: bool = True


class _Comparison:
    """One tensor against its recomputed self."""

    def __init__(self, reader: SpanReader, plan: Plan, entry: Entry, ref: TensorRef, full: bool) -> None:
        self.reader = reader
        self.plan = plan
        self.entry = entry
        self.ref = ref
        self.full = full
        self.recomputed = Recomputed(reader, entry)
        self.rows, self.cols = entry.matrix

    def verdict(self) -> TensorVerdict:
        tally = _Tally()
        worst: tuple[Expected, Array] | None = None
        for rows in self._blocks():
            stored = self._stored(rows)
            expected = self.recomputed.expected(rows)
            if self._compare(rows, stored, expected, tally) and worst is None:
                worst = (expected, stored)
        name, cause = self._name(tally, worst)
        return TensorVerdict(self.entry.key, name, tally.checked, tally.off, tally.max_ulps, cause)

    def _name(self, tally: _Tally, worst: tuple[Expected, Array] | None) -> tuple[str, str]:
        if worst is None:
            return (report.EXACT if self.entry.touched else report.BASE), ""
        if not self.entry.touched:
            return report.CHANGED, ""
        if tally.equals_base:
            return report.UNMERGED, "equals the base"
        expected, stored = worst
        few = slice(0, CAUSE_ROWS)
        some = Expected(expected.base[few], [(s, d[few]) for s, d in expected.deltas], expected.value[few])
        cause = find_cause(some, np.ascontiguousarray(stored[few]), self.ref.dtype, self.plan.adapters)
        return (report.ROUNDED if tally.within_rounding else report.WRONG), cause

    def _blocks(self) -> Iterator[Sequence[int]]:
        if not self.full:
            yield _sample_rows(self.entry.key, self.rows, self.cols)
            return
        step = max(1, BLOCK_ELEMENTS // max(1, self.cols))
        yield from (range(at, min(self.rows, at + step)) for at in range(0, self.rows, step))

    def _stored(self, rows: Sequence[int]) -> Array:
        if isinstance(rows, range):
            return self.reader.rows(self.ref, rows.start, rows.stop)
        return np.concatenate([self.reader.rows(self.ref, row, row + 1) for row in rows])

    def _compare(self, rows: Sequence[int], stored: Array, expected: Expected, tally: _Tally) -> bool:
        """Whether the block differs from the exact result."""
        dtype = self.ref.dtype
        wanted = round_nearest(expected.value, dtype)
        self._decide_exactly(rows, stored, wanted, expected)
        differ = stored.view(_bits(stored)) != wanted.view(_bits(wanted))
        tally.checked += stored.size
        base = round_nearest(expected.base, dtype)
        tally.equals_base = tally.equals_base and bool((base.view(_bits(base)) == stored.view(_bits(stored))).all())
        if not differ.any():
            return False
        tally.off += int(differ.sum())
        tally.max_ulps = max(tally.max_ulps, int(_ulps(stored, wanted).max()))
        tally.within_rounding = tally.within_rounding and self._within_rounding(stored, expected)
        return True

    def _decide_exactly(self, rows: Sequence[int], stored: Array, wanted: Array, expected: Expected) -> None:
        """Where float64 and the file differ by one unit, or by what float64 is off, the exact value decides.

        A float64 result is as wide as its recomputation: where more of it is open than can be decided, the
        rest is taken as it is.
        """
        apart, largest = _ulps(stored, wanted), _largest(expected)
        differ = stored.view(_bits(stored)) != wanted.view(_bits(wanted))
        with np.errstate(invalid="ignore"):
            near = np.abs(decode(stored, self.ref.dtype) - expected.value) <= UNDECIDED * largest
        close = np.argwhere((apart == 1) | (differ & near))
        zeros = np.argwhere(differ & (apart == 0) & ~near)
        if len(close) + len(zeros) > MOST_EXACT and self.ref.dtype is not F64:
            return
        if not self.recomputed.decidable:
            _accept_ties(stored, wanted, expected.value, largest, close, self.ref.dtype)
            return
        open_ = np.concatenate([close, zeros])
        for i, j in open_[MOST_EXACT:]:
            wanted[i, j] = stored[i, j] if near[i, j] else wanted[i, j]
        for i, j in open_[:MOST_EXACT]:
            value = self.recomputed.exactly(int(rows[i]), int(j), self.ref.dtype)
            wanted[i, j] = round_nearest(np.array([value]), self.ref.dtype)[0]

    def _within_rounding(self, stored: Array, expected: Expected) -> bool:
        """Whether every element is as near as one rounding of each term and of each partial sum leaves it."""
        unit = _unit(_largest(expected), self.ref.dtype)
        distance = np.abs(decode(stored, self.ref.dtype) - expected.value)
        return bool((distance <= (len(expected.deltas) + 1) * unit).all())


def _largest(expected: Expected) -> np.ndarray:
    """The largest of the terms of each element, and their sum: float64 is off by a share of it."""
    largest: np.ndarray = np.maximum(np.abs(expected.base), np.abs(expected.value))
    for _, delta in expected.deltas:
        largest = np.maximum(largest, np.abs(delta))
    return largest


def _accept_ties(
    stored: Array, wanted: Array, value: np.ndarray, largest: np.ndarray, close: np.ndarray, dtype: DType
) -> None:
    """Where float64 cannot tell which of two neighbours is nearer, the stored one is as right as the other."""
    a, b = decode(stored, dtype), decode(wanted, dtype)
    for i, j in close:
        distance = abs(value[i, j] - (a[i, j] + b[i, j]) / 2)
        if distance <= UNDECIDED * largest[i, j]:
            wanted[i, j] = stored[i, j]


def _bits(stored: Array) -> str:
    return f"u{stored.itemsize}"


def _ordered(stored: Array) -> np.ndarray:
    """Bits of floats as integers in the order of their values; both zeros are 0."""
    bits = stored.view(f"i{stored.itemsize}").astype(np.int64)
    lowest = -(1 << (8 * stored.itemsize - 1))
    return np.where(bits < 0, lowest - bits, bits)


def _ulps(a: Array, b: Array) -> np.ndarray:
    """Distance in units of the last place."""
    difference: np.ndarray = np.abs(_ordered(a) - _ordered(b))
    return difference


def _unit(x: np.ndarray, dtype: DType) -> np.ndarray:
    """The spacing of `dtype` at `x`."""
    _, exponent = np.frexp(np.maximum(x, 2.0**dtype.min_exponent))
    unit: np.ndarray = np.ldexp(1.0, exponent - 1 - dtype.fraction_bits)
    return unit
