"""Expected weights by the plain formula: whole rows, float64, one tensor at a time.

This repeats the definition of each tuner on purpose, in the simplest form, and shares no code with `run`:
a mistake there must not be repeated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import DType, F64Array, decode, round_fraction
from inlay.plan.steps import Delta, Dense, Part, Step
from inlay.plan.types import Entry
from inlay.tuners import dense
from inlay.tuners.exact import ExactStep, element

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Expected:
    """Rows of an entry: the weight before any step, each adapter's delta, and the merged value."""

    base: F64Array
    deltas: Sequence[tuple[Step, F64Array]]
    value: F64Array


class Recomputed:
    """One entry, or piece of one, recomputed for any rows."""

    def __init__(self, reader: SpanReader, entry: Entry) -> None:
        self.reader = reader
        self.entry = entry
        self.steps = entry.low_rank
        self.rows, self.cols = entry.matrix
        self._patched = {row: (patch.ref, at) for patch in entry.patches for at, row in enumerate(patch.rows)}
        self._right = {step: self._matrix(step.right) for step in entry.steps if isinstance(step, Step)}
        self._column_lengths = {step: self._lengths(step) for step in self._right}

    @property
    def decidable(self) -> bool:
        """Whether `exactly` can say what an element has to be."""
        return len(self.steps) == len(self.entry.steps)

    def expected(self, rows: Sequence[int]) -> Expected:
        """Expected values of the rows with these numbers."""
        if any(isinstance(step, Dense) for step in self.entry.steps):
            return self._whole(rows)
        base = np.stack([self._base_row(row) for row in rows])
        if not self.steps and self.entry.steps:
            return Expected(base, [], base + self._mixed(rows))
        value, deltas = base, []
        for step in self.steps:
            delta = step.scaling * (self._left(step, rows) @ self._right[step])
            value = value + delta
            deltas.append((step, delta))
            if step.magnitude is not None:
                value = value * self._factor(step, rows, base + delta)
        return Expected(base, deltas, value)

    def _whole(self, rows: Sequence[int]) -> Expected:
        """With a tuner that is no low-rank pair: the whole tensor at once, whatever blocks it was merged in."""
        base = np.stack([self._base_row(row) for row in range(self.rows)])
        value, every = base, range(self.rows)
        for step in self.entry.steps:
            if isinstance(step, Dense):
                value = self._dense(step, value, base)
                continue
            assert isinstance(step, Step), f"{self.entry.key}: a mixed delta beside other steps"
            delta = step.scaling * (self._left(step, every) @ self._right[step])
            value = value + delta
            if step.magnitude is not None:
                value = value * self._factor(step, every, base + delta)
        picked = list(rows)
        return Expected(base[picked], [], value[picked])

    def _mixed(self, rows: Sequence[int]) -> F64Array:
        deltas = [step.ref for step in self.entry.steps if isinstance(step, Delta)]
        assert len(deltas) == len(self.entry.steps), f"{self.entry.key}: a mixed delta beside other steps"
        rows_of = [[self.reader.rows(ref, row, row + 1)[0] for row in rows] for ref in deltas]
        total: F64Array = np.sum([np.stack(found) for found in rows_of], axis=0)
        return total

    def _dense(self, step: Dense, weight: F64Array, base: F64Array) -> F64Array:
        file = dense.tuner(step.tuner)
        parts: dict[str, Any] = {}
        for name, ref in step.parts.items():
            stored = self.reader.whole(ref)
            parts[name] = decode(stored, ref.dtype) if ref.dtype.mergeable else stored.astype(np.int64)
        prepared = parts if step.bias else file.prepare(parts, step.settings, step.shape)
        return dense.merge(
            step.tuner, weight, base, prepared, step.settings, step.shape, 0,
            transposed=step.transposed, bias=step.bias, factor=step.weight,
        )  # fmt: skip

    def exactly(self, row: int, col: int, dtype: DType) -> float:
        """The correctly rounded value of one element."""
        base = self._base_row(row)
        steps = self.steps
        if all(step.magnitude is None for step in steps):
            x = Fraction(float(base[col]))
            for step in steps:
                right = self._right[step]
                left = self._left(step, [row])[0]
                pairs = zip(left.tolist(), right[:, col].tolist(), strict=True)
                x += Fraction(step.scaling) * sum(Fraction(a) * Fraction(b) for a, b in pairs)
            return round_fraction(x, dtype, negative_zero=base[col] == 0 and bool(np.signbit(base[col])))
        if any(step.axis == 0 for step in steps if step.magnitude is not None):
            line = np.array([self._base_row(i)[col] for i in range(self.rows)])
            every = range(self.rows)
            exact = [
                ExactStep(right[:, col], self._left(step, every).T, step.scaling, self._magnitude(step, row, col))
                for step, right in self._right.items()
            ]
            return element(float(base[col]), row, line, exact, dtype)
        exact = [
            ExactStep(self._left(step, [row])[0], right, step.scaling, self._magnitude(step, row, col))
            for step, right in self._right.items()
        ]
        return element(float(base[col]), col, base, exact, dtype)

    def _base_row(self, row: int) -> F64Array:
        ref, at = self._patched.get(row, (self.entry.source, row))
        values: F64Array = decode(self.reader.rows(ref, at, at + 1), ref.dtype)[0]
        return values

    def _matrix(self, part: Part) -> F64Array:
        return decode(self.reader.view(part.ref, part.start, part.shape, part.strides), part.ref.dtype)

    def _left(self, step: Step, rows: Sequence[int]) -> F64Array:
        if step.left is None:
            return np.ones((len(rows), 1))
        if isinstance(rows, range) and rows.step == 1:
            return self._matrix(step.left.rows(rows.start, rows.stop))
        return np.concatenate([self._matrix(step.left.rows(row, row + 1)) for row in rows])

    def _magnitude(self, step: Step, row: int, col: int) -> float | None:
        if step.magnitude is None:
            return None
        values = decode(self.reader.whole(step.magnitude), step.magnitude.dtype).reshape(-1)
        return float(values[row if step.axis == 1 else col])

    def _factor(self, step: Step, rows: Sequence[int], sum_: F64Array) -> F64Array:
        """m / ‖W₀ + s B A‖ of the outputs in these rows, shaped to multiply them."""
        assert step.magnitude is not None
        magnitude = decode(self.reader.whole(step.magnitude), step.magnitude.dtype).reshape(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if step.axis == 1:
                factor: F64Array = (magnitude[list(rows)] / np.linalg.norm(sum_, axis=1))[:, None]
            else:
                factor = (magnitude / self._column_lengths[step])[None, :]
        return factor

    def _lengths(self, step: Step) -> F64Array:
        """Lengths of the columns of W₀ + s B A, where DoRA needs them."""
        if step.magnitude is None or step.axis == 1:
            return np.empty(0)
        total = np.zeros(self.cols)
        block = max(1, BLOCK_ELEMENTS // self.cols)
        for first in range(0, self.rows, block):
            rows = range(first, min(self.rows, first + block))
            base = np.stack([self._base_row(row) for row in rows])
            total += ((base + step.scaling * (self._left(step, rows) @ self._right[step])) ** 2).sum(axis=0)
        return np.sqrt(total)
