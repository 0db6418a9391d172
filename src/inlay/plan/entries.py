"""From the drafts of a plan to its entries: type, shape and steps of each tensor that is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE
from inlay.dtypes import BF16, BY_TORCH_NAME, DTYPES, F16, DType
from inlay.errors import Problem
from inlay.plan.combine import Draft
from inlay.plan.pieces import cuts_norms, pieces
from inlay.plan.steps import AnyStep, Delta, Dense, Step
from inlay.plan.types import Entry


@dataclass(frozen=True)
class EntryMaker:
    """Makes entries of drafts. `base` is in floats, `decoded` says that they come from codes.

    `dtype` is the type that was asked for; what does not fit goes to `problems`.
    """

    base: Checkpoint
    decoded: bool
    adapters: Sequence[Adapter]
    dtype: str | None
    problems: list[Problem]

    def make(self, key: str, ref: TensorRef, draft: Draft) -> Entry:
        """The entry `key` for a tensor of the base, or one like it, with what a draft changes."""
        source = draft.source or ref
        dtype = self._dtype_of(ref)
        shape = source.shape
        self._check_steps(key, source, draft)
        if draft.patches:
            shape = self._grown(key, shape, draft)
        entry = Entry(key, dtype, shape, source, tuple(draft.patches), tuple(draft.steps), _leading(draft, shape))
        return entry if self._pieces_fit(entry) else replace(entry, steps=())  # its cost cannot be told either

    def new(self, key: str, draft: Draft) -> Entry:
        """The entry of a tensor that the base does not have."""
        assert draft.source is not None, f"new tensor {key} without a source"
        unasked = self.decoded_dtype() if self.decoded else self._usual_dtype()
        dtype = DTYPES[self.dtype] if self.dtype else unasked
        return Entry(key, dtype, draft.source.shape, draft.source, tuple(draft.patches), tuple(draft.steps))

    def _dtype_of(self, ref: TensorRef) -> DType:
        if self.dtype and ref.dtype.mergeable:
            return DTYPES[self.dtype]
        if ref.made is None:
            return ref.dtype
        return self.decoded_dtype() if self.decoded else self.base.on_disk.tensors[ref.key][1].dtype

    def decoded_dtype(self) -> DType:
        """The type of decoded weights where none is asked for: the config's or the other tensors', if of 16 bits."""
        named = BY_TORCH_NAME.get(str(self.base.config.get("dtype") or self.base.config.get("torch_dtype")))
        for dtype in (named, self._usual_dtype()):
            if dtype in (BF16, F16):
                return dtype
        return BF16

    def _usual_dtype(self) -> DType:
        """The float type that most of the base's bytes have: that of tensors which are new."""
        sizes: dict[DType, int] = {}
        for _, t in self.base.tensors.values():
            if t.dtype.mergeable and t.made is None:
                sizes[t.dtype] = sizes.get(t.dtype, 0) + t.nbytes
        return max(sizes, key=lambda d: sizes[d], default=DTYPES["F32"])

    def _pieces_fit(self, entry: Entry) -> bool:
        """What changes single modules of a fused tensor does not go together with what needs all of it."""
        if cuts_norms(entry) or (entry.patches and len(pieces(entry)) > 1):
            names = ", ".join(sorted({self.adapters[step.adapter].name for step in entry.steps}))
            what = f"{names} change it as a whole and in part, which cannot be done in one go; merge them in turn"
            self.problems.append(Problem(entry.key, what))
            return False
        return True

    def _check_steps(self, key: str, source: TensorRef, draft: Draft) -> None:
        """A step was fitted to the base, or to its adapter's own copy; another adapter's copy may be longer."""
        for step in draft.steps:
            rows, cols = _reach(step)
            if not isinstance(step, Dense) and step.rows is not None:
                continue  # was fitted to its rows of the base, of which no adapter has a copy of its own
            if (rows, cols) != source.matrix:
                names = self.adapters[step.adapter].name, source.root if source.root == BASE else self._owner(source)
                what = (
                    f"{names[0]} is for {rows} rows, {names[1]} gives it {source.matrix[0]}; they do not fit together"
                )
                self.problems.append(Problem(key, what))

    def _owner(self, ref: TensorRef) -> str:
        return self.adapters[int(ref.root.removeprefix("adapter"))].name

    def _grown(self, key: str, shape: tuple[int, ...], draft: Draft) -> tuple[int, ...]:
        """Rows that trained tokens add beyond the vocabulary must leave no gap."""
        tokens = {i for patch in draft.patches for i in patch.rows}
        rows = max(shape[0], max(tokens) + 1)
        gap = next(
            (shape[0] + i for i, t in enumerate(sorted(t for t in tokens if t >= shape[0])) if t != shape[0] + i), None
        )
        if gap is not None:
            what = f"has {shape[0]} rows; token {max(tokens)} is beyond them, and nothing gives row {gap}"
            self.problems.append(Problem(key, what))
            return shape
        if rows != shape[0] and draft.steps:
            self.problems.append(
                Problem(key, "has rows added by one adapter and a LoRA by another; merge them in turn")
            )
        return (rows, *shape[1:])


def _leading(draft: Draft, shape: tuple[int, ...]) -> int:
    """Axes that make the rows of the matrix: two for a stack of experts of which steps change single ones."""
    ranged = any(not isinstance(step, Dense) and step.rows is not None for step in draft.steps)
    return 2 if ranged and len(shape) == 3 else 1


def _reach(step: AnyStep) -> tuple[int, int]:
    """Rows and columns of the stored matrix that a step is for."""
    if isinstance(step, Delta):
        return step.ref.matrix
    if isinstance(step, Step):
        return step.left.shape[0] if step.left else 1, step.right.shape[1]
    if step.bias:
        return 1, step.shape[0]
    rows, cols = step.shape[0], math.prod(step.shape[1:])
    return (cols, rows) if step.transposed else (rows, cols)
