"""Entries whose steps act on some of their rows: each stretch of rows with the same steps is an entry of its own.

A fused tensor holds several modules, a stack of experts one matrix for each; what changes one of them says
nothing of the others. Law: the pieces tile the rows of the entry, in order.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from inlay.plan.steps import Delta, Dense, Step
from inlay.plan.types import Entry


class Piece(NamedTuple):
    """Rows `[first, last)` of an entry's matrix, as an entry."""

    first: int
    last: int
    entry: Entry


def pieces(entry: Entry) -> tuple[Piece, ...]:
    """The pieces of an entry; one, the entry itself, where every step acts on all rows."""
    rows, cols = entry.matrix
    ranges = [step.rows for step in entry.steps if not isinstance(step, Dense) and step.rows is not None]
    if not ranges:
        return (Piece(0, rows, entry),)
    cuts = sorted({0, rows, *(end for range_ in ranges for end in range_)})
    return tuple(Piece(a, b, _piece(entry, a, b, cols)) for a, b in pairwise(cuts))


def _piece(entry: Entry, first: int, last: int, cols: int) -> Entry:
    source = entry.source
    start = source.start + source.dtype.nbytes(first * cols)
    part = replace(source, shape=(last - first, cols), start=start)
    steps: list[Step | Delta] = []
    for step in entry.steps:
        whole = f"{entry.key}: {step.tuner} needs the whole tensor, which is cut into modules"
        assert not isinstance(step, Dense), whole
        begin, end = step.rows or (0, entry.matrix[0])
        if (begin, end) == (first, last) and isinstance(step, Delta):
            steps.append(replace(step, rows=None))
        elif begin <= first and last <= end:
            assert isinstance(step, Step), whole
            steps.append(_cut(step, first - begin, last - begin, end - begin))
    return Entry(entry.key, entry.dtype, part.shape, part, (), tuple(steps))


def _cut(step: Step, first: int, last: int, count: int) -> Step:
    """The step on rows `[first, last)` of the `count` that it acts on."""
    if (first, last) == (0, count):
        return replace(step, rows=None)
    assert step.left is not None and (step.magnitude is None or step.axis == 1), "norms along the rows need all of them"
    magnitude = step.magnitude
    if magnitude is not None:
        start = magnitude.start + magnitude.dtype.nbytes(first)
        magnitude = replace(magnitude, shape=(last - first,), start=start)
    return replace(step, left=step.left.rows(first, last), magnitude=magnitude, rows=None)


def cuts_norms(entry: Entry) -> bool:
    """Whether a step that needs all its rows at once (a DoRA along them, a dense tuner) would be cut."""
    ranges = {step.rows for step in entry.steps if isinstance(step, Step)}
    whole = any(
        isinstance(step, Dense) or (isinstance(step, Step) and step.magnitude is not None and step.axis == 0)
        for step in entry.steps
    )
    return whole and ranges - {None} != set() and len(ranges) + any(isinstance(s, Dense) for s in entry.steps) > 1
