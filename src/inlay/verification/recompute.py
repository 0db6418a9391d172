"""Expected weights by the plain formula: whole rows, float64, one tensor at a time.

This repeats the definition of each tuner on purpose, in the simplest form, and shares no code with `run`:
a mistake there must not be repeated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import DType, F64Array, decode, round_fraction
from inlay.plan.types import Entry, Part, Step
from inlay.tuners.exact import ExactStep, element

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Expected:
    """Rows of an entry: the weight before any step, each adapter's delta, and the merged value."""

    base: F64Array
    deltas: Sequence[tuple[Step, F64Array]]
    value: F64Array


class Recomputed:
    """One entry, recomputed for any rows."""

    def __init__(self, reader: SpanReader, entry: Entry) -> None:
        self.reader = reader
        self.entry = entry
        self.rows, self.cols = entry.matrix
        self._patched = {row: (patch.ref, at) for patch in entry.patches for at, row in enumerate(patch.rows)}
        self._right = [self._matrix(step.right) for step in entry.steps]
        self._column_lengths = [self._lengths(i) for i in range(len(entry.steps))]

    def expected(self, rows: Sequence[int]) -> Expected:
        """Expected values of the rows with these numbers."""
        base = np.stack([self._base_row(row) for row in rows])
        value, deltas = base, []
        for i, step in enumerate(self.entry.steps):
            delta = step.scaling * (self._left(step, rows) @ self._right[i])
            value = value + delta
            deltas.append((step, delta))
            if step.magnitude is not None:
                value = value * self._factor(i, rows, base + delta)
        return Expected(base, deltas, value)

    def exactly(self, row: int, col: int, dtype: DType) -> float:
        """The correctly rounded value of one element."""
        base = self._base_row(row)
        steps = self.entry.steps
        if all(step.magnitude is None for step in steps):
            x = Fraction(float(base[col]))
            for step, right in zip(steps, self._right, strict=True):
                left = self._left(step, [row])[0]
                pairs = zip(left.tolist(), right[:, col].tolist(), strict=True)
                x += Fraction(step.scaling) * sum(Fraction(a) * Fraction(b) for a, b in pairs)
            return round_fraction(x, dtype, negative_zero=base[col] == 0 and bool(np.signbit(base[col])))
        if any(step.axis == 0 for step in steps if step.magnitude is not None):
            line = np.array([self._base_row(i)[col] for i in range(self.rows)])
            every = range(self.rows)
            exact = [
                ExactStep(right[:, col], self._left(step, every).T, step.scaling, self._magnitude(step, row, col))
                for step, right in zip(steps, self._right, strict=True)
            ]
            return element(float(base[col]), row, line, exact, dtype)
        exact = [
            ExactStep(self._left(step, [row])[0], right, step.scaling, self._magnitude(step, row, col))
            for step, right in zip(steps, self._right, strict=True)
        ]
        return element(float(base[col]), col, base, exact, dtype)

    def _base_row(self, row: int) -> F64Array:
        ref, at = self._patched.get(row, (self.entry.source, row))
        values: F64Array = decode(self.reader.rows(ref, at, at + 1), ref.dtype)[0]
        return values

    def _matrix(self, part: Part) -> F64Array:
        matrix = decode(self.reader.rows(part.ref, 0, part.ref.matrix[0]), part.ref.dtype)
        return np.transpose(matrix) if part.transposed else matrix

    def _left(self, step: Step, rows: Sequence[int]) -> F64Array:
        if step.left is None:
            return np.ones((len(rows), 1))
        ref = step.left.ref
        if not step.left.transposed:
            return np.concatenate([decode(self.reader.rows(ref, i, i + 1), ref.dtype) for i in rows])
        if len(rows) == 1:
            return decode(self.reader.columns(ref, rows[0], rows[0] + 1), ref.dtype).T
        return self._matrix(step.left)[list(rows)]

    def _magnitude(self, step: Step, row: int, col: int) -> float | None:
        if step.magnitude is None:
            return None
        values = decode(self.reader.whole(step.magnitude), step.magnitude.dtype).reshape(-1)
        return float(values[row if step.axis == 1 else col])

    def _factor(self, i: int, rows: Sequence[int], sum_: F64Array) -> F64Array:
        """m / ‖W₀ + s B A‖ of the outputs in these rows, shaped to multiply them."""
        step = self.entry.steps[i]
        assert step.magnitude is not None
        magnitude = decode(self.reader.whole(step.magnitude), step.magnitude.dtype).reshape(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if step.axis == 1:
                factor: F64Array = (magnitude[list(rows)] / np.linalg.norm(sum_, axis=1))[:, None]
            else:
                factor = (magnitude / self._column_lengths[i])[None, :]
        return factor

    def _lengths(self, i: int) -> F64Array:
        """Lengths of the columns of W₀ + s B A, where DoRA needs them."""
        step = self.entry.steps[i]
        if step.magnitude is None or step.axis == 1:
            return np.empty(0)
        total = np.zeros(self.cols)
        block = max(1, BLOCK_ELEMENTS // self.cols)
        for first in range(0, self.rows, block):
            rows = range(first, min(self.rows, first + block))
            base = np.stack([self._base_row(row) for row in rows])
            total += ((base + step.scaling * (self._left(step, rows) @ self._right[i])) ** 2).sum(axis=0)
        return np.sqrt(total)
