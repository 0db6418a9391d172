"""How much of an adapter is in what is stored: the exact delta against what rounding, or coding, leaves of it.

For a merged weight W₀ + Δ that is stored as S

    changed   share of the elements that are stored otherwise than those of W₀ alone would be
    error     ‖S − W₀ − Δ‖ / ‖Δ‖
    kept      ⟨S − W₀, Δ⟩ / ‖Δ‖², the projection: 1 if all of the delta is there, beside whatever else

with W₀ + Δ rounded to float32. On a sample of rows of some tensors, the same for the same plan, or on everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from inlay.checkpoints.spans import SpanReader
from inlay.codecs.compensation import compensated
from inlay.codecs.encoding import F32Array, encode_whole, row_blocks, settled
from inlay.codecs.table import codec
from inlay.dtypes import F32, Array, F64Array, decode, round_nearest
from inlay.errors import InputError
from inlay.plan.memory import Tiling, whole
from inlay.plan.types import Coded, Entry, Plan
from inlay.run.blocks import Blocks

# Tensors of a sample, and elements of each: few where the result is in floats, in which nearly all survives.
SAMPLE_IN_FLOATS = (12, 1 << 14)
SAMPLE_IN_CODES = (48, 1 << 16)
SAMPLE_WHOLE = 8  # tensors of those that can only be looked at whole
BLOCK_ELEMENTS = 1 << 19
LEAST_KEPT = 0.5
DIGITS = 3  # that are recorded: the same on every machine


@dataclass(frozen=True)
class Survival:
    """What survives on one tensor (`key`), or on all that were looked at (None). `elements` were looked at."""

    key: str | None
    elements: int
    changed: float
    error: float
    kept: float

    def to_json(self) -> dict[str, Any]:
        numbers = {n: _short(getattr(self, n)) for n in ("changed", "error", "kept")}
        return {"key": self.key, "elements": self.elements, **numbers}


@dataclass(frozen=True)
class Survived:
    """The tensors that were looked at, and all of them together; `coded`: some of the result is in codes."""

    tensors: tuple[Survival, ...]
    overall: Survival
    sampled: bool
    coded: bool

    def to_json(self) -> dict[str, Any]:
        """What the manifest records."""
        return {**self.overall.to_json(), "tensors": len(self.tensors), "sampled": self.sampled}

    @property
    def lost(self) -> bool:
        """Whether less than half of the adapter is left of it in codes."""
        return self.coded and self.overall.kept < LEAST_KEPT


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


@dataclass
class _Sums:
    """What the blocks of a tensor add up to."""

    elements: int = 0
    changed: int = 0
    error: float = 0.0
    product: float = 0.0
    delta: float = 0.0

    def add(self, base: F64Array, merged: F64Array, stored: F64Array, alone: F64Array) -> None:
        self.elements += base.size
        self.changed += int((stored != alone).sum())
        with np.errstate(all="ignore"):  # what is not finite is refused when it is written
            wanted, applied = merged - base, stored - base
            self.error += float(np.square(applied - wanted).sum())
            self.product += float((applied * wanted).sum())
            self.delta += float(np.square(wanted).sum())

    def scaled(self, factor: float) -> _Sums:
        return _Sums(self.elements, self.changed, self.error * factor, self.product * factor, self.delta * factor)

    def result(self, key: str | None) -> Survival:
        kept = self.product / self.delta if self.delta else 1.0
        error = math.sqrt(self.error / self.delta) if self.delta else 0.0
        return Survival(key, self.elements, self.changed / max(1, self.elements), error, kept)


def survival(plan: Plan, *, full: bool = False) -> Survived | None:
    """What would survive of the adapters of a plan; None where none of them adds to a tensor.

    Reads base and adapters; writes nothing. Raises InputError for a weight that its codes cannot hold.
    """
    coded: dict[str, Coded] = {}
    for entry in plan.entries.values():
        if isinstance(entry, Coded):
            coded.setdefault(entry.weight.key, entry)
    touched = [e for e in plan.weights.values() if e.steps]
    if not touched:
        return None
    picked = touched if full else _sample(touched, coded)
    found, total = [], _Sums()
    with SpanReader(plan.roots) as reader:
        for entry in picked:
            sums = _of(reader, entry, coded.get(entry.key), full)
            found.append(sums.result(entry.key))
            part = sums.scaled(entry.count / max(1, sums.elements))
            total.elements += part.elements
            total.changed += part.changed
            total.error += part.error
            total.product += part.product
            total.delta += part.delta
    some_rows = any(s.elements < e.count for s, e in zip(found, picked, strict=True))
    sampled = some_rows or len(picked) < len(touched)
    return Survived(tuple(found), total.result(None), sampled, any(e.key in coded for e in touched))


def require_survival(survived: Survived | None) -> None:
    """Raises InputError where the result would hold less than half of what the adapters add."""
    if survived is None or not survived.lost:
        return
    o = survived.overall
    raise InputError(
        f"only {o.kept:.0%} of what the adapters add would be in the codes (error {o.error:.2f} of its size): "
        "the steps of the codes are coarser than the delta. Give --accept_loss true to do it all the same, or store "
        "the result in 16 bits (without --keep_quant), choose codes that hold the delta (--compensate adapter) or new "
        "scales (--scales fresh), leave the worst modules in 16 bits (--keep_16bit auto), or quantise the merged "
        "weights with calibration (--quant_method gptq or awq)"
    )


def worst_modules(survived: Survived) -> list[str]:
    """Modules of which less than half survives."""
    return [s.key.removesuffix(".weight") for s in survived.tensors if s.key and s.kept < LEAST_KEPT]


def _sample(touched: Sequence[Entry], coded: Mapping[str, Coded]) -> list[Entry]:
    """Tensors at even distances."""
    expensive = any(whole(e) for e in touched) or any(not _local(c) for c in coded.values())
    count = SAMPLE_WHOLE if expensive else (SAMPLE_IN_CODES if coded else SAMPLE_IN_FLOATS)[0]
    if len(touched) <= count:
        return list(touched)
    return [touched[i * len(touched) // count] for i in range(count)]


def _local(coded: Coded) -> bool:
    """Whether rows can be encoded without the rest of the weight."""
    form = codec(coded.codec)
    measures = hasattr(form, "measure") and form.measure(np.zeros((0, 1), np.float32), coded.settings).size > 0
    return not measures and not hasattr(form, "finish")


def _of(reader: SpanReader, entry: Entry, coded: Coded | None, full: bool) -> _Sums:
    rows, cols = entry.matrix
    step = 1 if coded is None else codec(coded.codec).align(coded.settings)
    block = max(1, BLOCK_ELEMENTS // max(1, cols) // step) * step
    if whole(entry):
        block = max(rows, step)
    exact = Blocks(replace(entry, dtype=F32), reader, Tiling(block, 0, 0), by_rows=True)
    if full or whole(entry) or (coded is not None and not _local(coded)):
        ranges = list(row_blocks(rows, block))
    else:
        elements = (SAMPLE_IN_FLOATS if coded is None else SAMPLE_IN_CODES)[1]
        few = max(1, elements // max(1, cols) // step) * step
        choices = list(row_blocks(rows, few))
        ranges = [choices[len(choices) // 3]]
    sums = _Sums()
    if coded is None:
        for first, last in ranges:
            for base, merged in _values(exact, entry, first, last):
                stored = decode(round_nearest(merged, entry.dtype), entry.dtype)
                sums.add(base, merged, stored, decode(round_nearest(base, entry.dtype), entry.dtype))
        return sums
    _add_coded(sums, reader, exact, coded, ranges)
    return sums


def _values(exact: Blocks, entry: Entry, first: int, last: int) -> Iterator[tuple[F64Array, F64Array]]:
    for part in exact.of(first, last):
        base = decode(part.raw, entry.source.dtype).reshape(part.out.shape)
        yield base, part.out.astype(np.float64)


def _add_coded(sums: _Sums, reader: SpanReader, exact: Blocks, coded: Coded, ranges: Sequence[tuple[int, int]]) -> None:
    form, settings, entry = codec(coded.codec), coded.settings, coded.weight

    def known(first: int, last: int) -> dict[str, Array]:
        spans = form.spans(settings, first, last)
        return {part: reader.slice(ref, spans.get(part)) for part, ref in coded.kept.items()}

    def joined(first: int, last: int) -> tuple[F64Array, F64Array]:
        pairs = list(_values(exact, entry, first, last))
        return np.concatenate([b for b, _ in pairs]), np.concatenate([m for _, m in pairs])

    def chosen(first: int, last: int, which: int) -> F32Array:
        base, merged = (w.astype(np.float32) for w in joined(first, last))
        if coded.compensate and which:
            return compensated(form, coded.codec, settings, first, merged, base, known(first, last))
        return merged if which else base

    def blocks(which: int) -> Iterator[tuple[int, F32Array]]:
        for first, last in ranges:
            yield first, chosen(first, last, which)

    if _local(coded):
        for first, last in ranges:
            base, merged = joined(first, last)
            kept = known(first, last)
            decoded = [
                form.decode({**kept, **form.encode(w, settings, first, kept)}, settings, first, last)
                for w in (chosen(first, last, 1), chosen(first, last, 0))
            ]
            sums.add(base, merged, decoded[0].astype(np.float64), decoded[1].astype(np.float64))
        return
    try:
        wholes = [encode_whole(form, settings, lambda w=w: blocks(w), known) for w in (1, 0)]  # type: ignore[misc]
    except ValueError as error:
        raise InputError(f"{entry.key}: {error}. Nothing was written") from error
    read_back = [settled(form, settings, parts) for parts in wholes]
    for first, last in ranges:
        base, merged = joined(first, last)
        spans = form.spans(settings, first, last)
        decoded = []
        for parts, own in zip(wholes, read_back, strict=True):
            cut = {p: _cut(a, spans[p]) for p, a in parts.items() if p in spans}
            decoded.append(form.decode({**known(first, last), **cut}, own, first, last).astype(np.float64))
        sums.add(base, merged, decoded[0], decoded[1])


def _cut(part: Array, span: tuple[int, int, int] | None) -> Array:
    return part if span is None else part[(slice(None),) * span[0] + (slice(span[1], span[2]),)]
