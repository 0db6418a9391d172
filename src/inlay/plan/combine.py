"""Several adapters on one base: one draft a key, left to right, and everything that cannot be combined.

A sum of LoRAs needs no order. What replaces (a saved module, a bias, a token row) does: two different
replacements of one thing contradict each other, and a replacement after an addition would throw the
addition away. Both are refused, unless `override` says that the later adapter wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.dtypes import F64Array, decode
from inlay.errors import Problem
from inlay.plan.placer import Contribution
from inlay.plan.steps import AnyStep, Delta, Rows, Step
from inlay.tuners.dense import tuner


def additive(step: AnyStep) -> bool:
    """Whether a step adds something that does not depend on the weight."""
    if isinstance(step, Delta):
        return True
    if isinstance(step, Step):
        return step.magnitude is None
    return bool(tuner(step.tuner).ADDITIVE) and not step.bias


@dataclass
class Draft:
    """One key on its way to an entry. `source` is None while it is the base's own tensor."""

    source: TensorRef | None = None
    patches: list[Rows] = field(default_factory=list)
    steps: list[AnyStep] = field(default_factory=list)
    by: set[int] = field(default_factory=set)

    @property
    def changed(self) -> bool:
        return bool(self.source or self.patches or self.steps)

    def copy(self) -> Draft:
        return Draft(self.source, list(self.patches), list(self.steps), set(self.by))


def _weight_problems(found: Contribution) -> list[Problem]:
    """A factor scales a sum; it has no meaning for a DoRA or for a tensor that is replaced."""
    if found.weight == 1.0:
        return []
    other = {step.tuner for steps in found.steps.values() for step in steps if not additive(step)}
    names = " and ".join(sorted("DoRA" if name == "dora" else name for name in other))
    there = ((names, other), ("full copies", found.copies), ("token rows", found.rows))
    kinds = " and ".join(name for name, has in there if has)
    if not kinds:
        return []
    return [Problem(found.adapter.name, f"weight {found.weight:g} has no meaning for {kinds}; use 1.0")]


def combine(
    contributions: Sequence[Contribution],
    base: Checkpoint,
    method: str,
    reader: SpanReader,
    problems: list[Problem],
    notes: list[str],
) -> dict[str, Draft]:
    """Drafts by key, in the order in which keys are first touched."""
    drafts: dict[str, Draft] = {}
    merge = _Combiner([c.adapter.name for c in contributions], method, reader, problems, notes)
    for contribution in contributions:
        if len(contributions) > 1 or contribution.weight != 1.0:
            merge.drop_copies_of_base(contribution, base)
        problems += _weight_problems(contribution)
        for key in sorted(contribution.keys):
            merge.add(key, drafts.setdefault(key, Draft()), contribution)
    return drafts


class _Combiner:
    def __init__(
        self, names: list[str], method: str, reader: SpanReader, problems: list[Problem], notes: list[str]
    ) -> None:
        self.names = names
        self.override = method == "override"
        self.reader = reader
        self.problems = problems
        self.notes = notes

    def drop_copies_of_base(self, contribution: Contribution, base: Checkpoint) -> None:
        """PEFT saves embeddings beside a LoRA on them; a copy that equals the base replaces nothing."""
        for key, ref in list(contribution.copies.items()):
            if key in base.tensors and key not in contribution.saved:
                shard, info = base.tensors[key]
                if self._same(ref, TensorRef.of(BASE, shard.file, info)):
                    del contribution.copies[key]

    def add(self, key: str, draft: Draft, contribution: Contribution) -> None:
        """Let one more adapter act on a key."""
        if key in contribution.copies:
            self._copy(key, draft, contribution)
        if key in contribution.rows:
            self._rows(key, draft, contribution.rows[key])
        draft.steps += contribution.steps.get(key, [])
        draft.by.add(contribution.position)

    def _copy(self, key: str, draft: Draft, contribution: Contribution) -> None:
        ref, later = contribution.copies[key], contribution.adapter.name
        if draft.source is not None and not self._same(draft.source, ref):
            earlier = self.names[int(draft.source.root.removeprefix("adapter"))]
            if not self._overridden(key, earlier, later, "hold different full copies"):
                return
        elif draft.source is None and draft.changed:
            earlier = self.names[min(draft.by)]
            if not self._overridden(key, earlier, later, "change it and replace it, so the change would be lost"):
                return
        elif draft.changed:
            return
        draft.source, draft.patches, draft.steps = ref, [], []

    def _overridden(self, key: str, earlier: str, later: str, what: str) -> bool:
        if self.override:
            self.notes.append(f"{key}: {later} overrides {earlier}")
            return True
        self.problems.append(
            Problem(key, f"{earlier} and {later} {what}; leave one out, or --combine override lets {later} win")
        )
        return False

    def _rows(self, key: str, draft: Draft, rows: Rows) -> None:
        later = self.names[rows.adapter]
        for patch in draft.patches:
            common = sorted(set(patch.rows) & set(rows.rows))
            if common and not self._same_rows(patch, rows, common):
                what = f"hold different values for token rows {', '.join(map(str, common[:5]))}"
                if not self._overridden(key, self.names[patch.adapter], later, what):
                    return
        if draft.steps:
            earlier = self.names[draft.steps[0].adapter]
            self.problems.append(
                Problem(key, f"{later} replaces token rows that {earlier} adds to; give {later} before {earlier}")
            )
            return
        draft.patches.append(rows)

    def _same(self, a: TensorRef, b: TensorRef) -> bool:
        if a.shape != b.shape:
            return False
        step = max(1, (1 << 20) // max(1, a.matrix[1]))
        return all(
            np.array_equal(self._values(a, i, i + step), self._values(b, i, i + step))
            for i in range(0, a.matrix[0], step)
        )

    def _values(self, ref: TensorRef, first: int, last: int) -> F64Array:
        return decode(self.reader.rows(ref, first, min(last, ref.matrix[0])), ref.dtype)

    def _same_rows(self, a: Rows, b: Rows, common: Sequence[int]) -> bool:
        def row(rows: Rows, token: int) -> F64Array:
            at = rows.rows.index(token)
            return self._values(rows.ref, at, at + 1)

        return all(np.array_equal(row(a, token), row(b, token)) for token in common)


def order_matters(drafts: dict[str, Draft]) -> bool:
    """Whether another order of the adapters would give another result: as soon as one that is no sum meets another."""
    return any(
        len({step.adapter for step in draft.steps}) > 1 and not all(additive(step) for step in draft.steps)
        for draft in drafts.values()
    )


def overlaps(drafts: dict[str, Draft]) -> tuple[str, ...]:
    """Keys that more than one adapter acts on."""
    return tuple(key for key, draft in drafts.items() if len(draft.by) > 1)
