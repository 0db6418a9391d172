"""Make a plan: read headers, decide everything, gather every problem, write nothing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from inlay.adapters.adapter import CONFIG, Adapter, read_adapter
from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.spans import BASE, SpanReader, TensorRef, adapter_root
from inlay.dtypes import BY_TORCH_NAME, DTYPES, DType
from inlay.errors import InputError, PlanError, Problem
from inlay.output.destination import check_destination
from inlay.plan import cost, layout, sidecars
from inlay.plan.check import Findings, check_adapters, check_base, new_head, vocabulary
from inlay.plan.combine import COMBINE, Draft, combine, order_matters, overlaps
from inlay.plan.contribute import contribute
from inlay.plan.memory import DEFAULT_MAX_MEMORY
from inlay.plan.pieces import cuts_norms, pieces
from inlay.plan.placer import Contribution
from inlay.plan.tied import Untied, settle_ties
from inlay.plan.types import (
    AdapterUse,
    Dense,
    Entry,
    Expectation,
    InputFile,
    Inputs,
    Plan,
    Settings,
    ShardPlan,
    Sidecar,
    Step,
)

StrPath = str | os.PathLike[str]
OVERHEAD_BYTES = 1 << 20  # manifest, model card, index


def make_plan(
    model: StrPath | Checkpoint,
    adapters: Sequence[StrPath | Adapter],
    *,
    weights: Sequence[float] | None = None,
    torch_dtype: str | None = None,
    combine_by: str = "sum",
    max_shard_size: int | str | None = None,
    max_memory: int | str = DEFAULT_MAX_MEMORY,
    output_dir: StrPath | None = None,
    exist_ok: bool = False,
) -> Plan:
    """A plan to merge `adapters`, in this order, into `model`.

    `weights` are factors on the adapters (1.0 each); `torch_dtype` is the type of all float weights of
    the result (each tensor's own if not given); sizes are bytes or text such as "512MB". With
    `output_dir` the destination is checked too.

    Raises PlanError with every problem found, or another InputError for input that cannot be read.
    """
    base = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
    factors = _check_request(read, weights, combine_by)
    settings = Settings(_dtype_name(torch_dtype), combine_by, _optional_size(max_shard_size))
    draft = _Planner(base, read, factors, settings)
    plan = draft.plan(parse_size(max_memory))
    problems = draft.problems
    if output_dir is not None:
        needed = plan.cost.written + OVERHEAD_BYTES
        problems = problems + check_destination(Path(output_dir), plan.roots, exist_ok, needed)
    if problems:
        raise PlanError(problems, draft.found.hints)
    return plan


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text such as "512MB", "5GB", "64MiB"."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size.lower())
    if not found:
        raise InputError(f"{size!r} is not a size; write it like 512MB, 5GB or 64MiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))


def _optional_size(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size)


def _dtype_name(name: str | None) -> str | None:
    if name is None or name == "auto":
        return None
    found = BY_TORCH_NAME.get(name.lower().removeprefix("torch."))
    if found is None or found.name == "F64":
        raise InputError(f"torch_dtype {name!r} is not supported; use bfloat16, float16 or float32")
    return found.name


def _check_request(adapters: Sequence[Adapter], weights: Sequence[float] | None, combine_by: str) -> tuple[float, ...]:
    if combine_by not in COMBINE:
        raise InputError(
            f"combine {combine_by!r} is not supported here; use {' or '.join(COMBINE)}, or make one adapter of them "
            "with `inlay combine` first"
        )
    if weights is None:
        return (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise InputError(f"{len(weights)} adapter weights for {len(adapters)} adapters; give one each")
    if not all(math.isfinite(w) for w in weights):
        raise InputError(f"adapter weights must be finite numbers, found {', '.join(map(str, weights))}")
    return tuple(float(w) for w in weights)


def _leading(draft: Draft, shape: tuple[int, ...]) -> int:
    """Axes that make the rows of the matrix: two for a stack of experts of which steps change single ones."""
    ranged = any(isinstance(step, Step) and step.rows is not None for step in draft.steps)
    return 2 if ranged and len(shape) == 3 else 1


def _reach(step: Step | Dense) -> tuple[int, int]:
    """Rows and columns of the stored matrix that a step is for."""
    if isinstance(step, Step):
        return step.left.shape[0] if step.left else 1, step.right.shape[1]
    if step.bias:
        return 1, step.shape[0]
    rows, cols = step.shape[0], math.prod(step.shape[1:])
    return (cols, rows) if step.transposed else (rows, cols)


class _Planner:
    """Gathers what a plan needs; `found` fills while it works."""

    def __init__(
        self, base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], settings: Settings
    ) -> None:
        self.base = base
        self.adapters = adapters
        self.weights = weights
        self.settings = settings
        self.found = Findings()
        self.problems, self.notes = self.found.problems, self.found.notes

    def plan(self, max_memory: int) -> Plan:
        contributions = [
            contribute(adapter, i, weight, self.base)
            for i, (adapter, weight) in enumerate(zip(self.adapters, self.weights, strict=True))
        ]
        check_adapters(self.base, contributions, self.found)
        drafts, untied = self._drafts(contributions)
        shards = self._shards(drafts, untied)
        files, left_out = self._sidecars(shards, untied)
        check_base(self.base, self.adapters, self.settings.dtype is not None, self.found)
        return Plan(
            base=self.base.fingerprint,
            base_name=str(self.base.path),
            adapters=tuple(self._use(c) for c in contributions),
            settings=self.settings,
            shards=shards,
            index=layout.make_index(self.base, shards),
            sidecars=files,
            left_out=left_out,
            expectations=self._expectations(),
            warnings=tuple(self.found.warnings),
            notes=tuple(self.notes),
            overlaps=overlaps(drafts),
            order_matters=order_matters(drafts),
            cost=cost.estimate(shards, max_memory, self.problems),
            inputs=self._inputs(),
        )

    def _drafts(self, contributions: Sequence[Contribution]) -> tuple[dict[str, Draft], Untied | None]:
        roots = {BASE: self.base.path} | {adapter_root(i): a.path for i, a in enumerate(self.adapters)}
        with SpanReader(roots) as reader:
            drafts = combine(contributions, self.base, self.settings.combine, reader, self.problems, self.notes)
        untied = settle_ties(self.base, contributions, drafts, self.problems, self.notes)
        return drafts, untied

    def _out_dtype(self, stored: DType) -> DType:
        return DTYPES[self.settings.dtype] if self.settings.dtype and stored.mergeable else stored

    def _usual_dtype(self) -> DType:
        """The float type that most of the base's bytes have: that of tensors which are new."""
        sizes: dict[DType, int] = {}
        for _, t in self.base.tensors.values():
            if t.dtype.mergeable:
                sizes[t.dtype] = sizes.get(t.dtype, 0) + t.nbytes
        return max(sizes, key=lambda d: sizes[d], default=DTYPES["F32"])

    def _shards(self, drafts: Mapping[str, Draft], untied: Untied | None) -> tuple[ShardPlan, ...]:
        by_shard: list[tuple[str, list[Entry]]] = []
        for shard in self.base.shards:
            refs = (TensorRef.of(BASE, shard.file, t) for t in shard.tensors)
            by_shard.append((shard.file, [self._entry(ref.key, ref, drafts.get(ref.key, Draft())) for ref in refs]))
        for key in [key for key in drafts if key not in self.base.tensors]:
            self._add_new(key, drafts[key], by_shard, untied)
        return layout.lay_out(self.base, by_shard, self.settings.max_shard_bytes)

    def _entry(self, key: str, ref: TensorRef, draft: Draft) -> Entry:
        source = draft.source or ref
        dtype = self._out_dtype(ref.dtype)
        shape = source.shape
        self._check_steps(key, source, draft)
        if draft.patches:
            shape = self._grown(key, shape, draft)
        entry = Entry(key, dtype, shape, source, tuple(draft.patches), tuple(draft.steps), _leading(draft, shape))
        return entry if self._pieces_fit(entry) else replace(entry, steps=())  # its cost cannot be told either

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
            if isinstance(step, Step) and step.rows is not None:
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

    def _add_new(self, key: str, draft: Draft, by_shard: list[tuple[str, list[Entry]]], untied: Untied | None) -> None:
        """A tensor that the base does not have goes beside the one it was tied to, or to the last shard."""
        if untied is not None and key in untied.values:
            shard, info = self.base.tensors[untied.values[key]]
            ref = TensorRef.of(BASE, shard.file, info)
            entries = next(entries for file, entries in by_shard if file == shard.file)
            entries.append(self._entry(key, ref, draft))
            return
        assert draft.source is not None, f"new tensor {key} without a source"
        dtype = self._out_dtype(self._usual_dtype())
        by_shard[-1][1].append(
            Entry(key, dtype, draft.source.shape, draft.source, tuple(draft.patches), tuple(draft.steps))
        )
        self.notes.append(f"{key} is new: the base has no such tensor")

    def _sidecars(
        self, shards: Sequence[ShardPlan], untied: Untied | None
    ) -> tuple[tuple[Sidecar, ...], dict[str, str]]:
        entries = {e.key: e for shard in shards for e in shard.entries}
        edits = sidecars.config_edits(
            self.base,
            self.settings.dtype,
            untied is not None,
            vocabulary(self.base, entries, self.problems),
            new_head(self.base, self.adapters, entries),
        )
        if edits:
            self.notes.append("config.json: " + ", ".join(f"{k} = {v!r:.60}" for k, v in edits.items()))
        files, left_out = sidecars.plan_sidecars(self.base, self.adapters, edits, self.notes)
        if layout.index_file(shards) and layout.make_index(self.base, shards) is None and self.base.index_file:
            files = (*files, Sidecar(self.base.index_file, BASE, self.base.index_file))
        return files, left_out

    def _expectations(self) -> tuple[Expectation, ...]:
        return tuple(
            Expectation(i, key, digest)
            for i, adapter in enumerate(self.adapters)
            for key, digest in sorted(adapter.fingerprint.get("tensors", {}).items())
            if key in self.base.tensors
        )

    def _use(self, found: Contribution) -> AdapterUse:
        adapter = found.adapter
        return AdapterUse(
            name=adapter.name,
            digest=adapter.digest,
            tuner=adapter.config.tuner,
            weight=found.weight,
            rank=tuple(sorted(found.ranks)),
            scaling=tuple(sorted(found.scalings)),
            modules=len(adapter.parts),
            parameters=adapter.parameters,
            base_model=adapter.base_model,
        )

    def _inputs(self) -> Inputs:
        roots = {BASE: self.base.path} | {adapter_root(i): a.path for i, a in enumerate(self.adapters)}
        named = [(BASE, shard.file) for shard in self.base.shards]
        named += [(adapter_root(i), f) for i, a in enumerate(self.adapters) for f in (CONFIG, a.weights_file)]
        files = []
        for root, file in named:
            stat = (roots[root] / file).stat()
            files.append(InputFile(root, file, stat.st_size, stat.st_mtime_ns))
        return Inputs({name: str(path) for name, path in roots.items()}, tuple(files))
