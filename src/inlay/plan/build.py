"""Make a plan: read headers, decide everything, gather every problem, write nothing."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inlay.adapters.adapter import Adapter, read_adapter
from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.decoded import Decoded, decode_checkpoint, quantisation
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader, adapter_root
from inlay.dtypes import BF16, BY_TORCH_NAME, DTYPES, F16, DType
from inlay.errors import InputError, PlanError, Problem
from inlay.output.destination import check_destination
from inlay.plan import compensating, cost, layout, sidecars, zero_points
from inlay.plan.check import Findings, check_adapters, check_base, check_pipeline, new_head, vocabulary
from inlay.plan.combination import SUMS, Options, by_place, combined_adapter, method_problems, weight_problems
from inlay.plan.combine import Draft, combine, order_matters, overlaps
from inlay.plan.contribute import contribute
from inlay.plan.excluding import less_codes
from inlay.plan.memory import DEFAULT_MAX_MEMORY, whole
from inlay.plan.mixtures import mix
from inlay.plan.pieces import cuts_norms, pieces
from inlay.plan.placer import Contribution
from inlay.plan.quant import Quant, keep_codes, quantise, request_problems, simulate, trained_as
from inlay.plan.steps import AnyStep, Delta, Dense, Step
from inlay.plan.tied import Untied, settle_ties
from inlay.plan.types import (
    AdapterUse,
    Coded,
    Entry,
    Expectation,
    InputFile,
    Inputs,
    Plan,
    Settings,
    ShardPlan,
    Sidecar,
)
from inlay.tuners import combining, mixing

StrPath = str | os.PathLike[str]
NO_OPTIONS = Options()
NO_QUANT = Quant()
OVERHEAD_BYTES = 1 << 20  # manifest, model card, index


def make_plan(
    model: StrPath | Checkpoint,
    adapters: Sequence[StrPath | Adapter],
    *,
    weights: Sequence[float] | None = None,
    torch_dtype: str | None = None,
    combine_by: str = "sum",
    options: Options = NO_OPTIONS,
    quant: Quant = NO_QUANT,
    max_shard_size: int | str | None = None,
    max_memory: int | str = DEFAULT_MAX_MEMORY,
    output_dir: StrPath | None = None,
    exist_ok: bool = False,
) -> Plan:
    """A plan to merge `adapters`, in this order, into `model`.

    `weights` are factors on the adapters (1.0 each); `combine_by` is sum, override, a method of PEFT or of mergekit
    (`inlay.plan.combination`), with its `options`; `quant` says what a base in codes is taken for, and whether the
    result is stored in codes (`inlay.plan.quant`); `torch_dtype` is the type of all float weights of
    the result (each tensor's own if not given); sizes are bytes or text such as "512MB". With
    `output_dir` the destination is checked too.

    Raises PlanError with every problem found, or another InputError for input that cannot be read.
    """
    base = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
    factors = _check_request(read, weights, combine_by, options)
    dtype = _dtype_name(torch_dtype)
    quantised = quantisation(base) is not None
    if problems := request_problems(quant, dtype, quantised, bool(adapters)):
        raise PlanError(problems)
    settings = Settings(dtype, combine_by, _optional_size(max_shard_size), options.given(), quant.given())
    decoded = decode_checkpoint(base) if quantised and (adapters or dtype or quant.keep or quant.method) else None
    if decoded and decoded.problems:  # what the adapters lack would only repeat it
        method = (quantisation(base) or {}).get("quant_method", "no method named")
        what = f"is quantised ({method}), and cannot be read so; mend it, or give the 16-bit original with --model"
        raise PlanError([Problem(str(base.path), what), *decoded.problems])
    draft = _Planner(base, decoded, read, factors, settings)
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


def _check_request(
    adapters: Sequence[Adapter], weights: Sequence[float] | None, combine_by: str, options: Options
) -> tuple[float, ...]:
    problems = method_problems(combine_by, options) + weight_problems(combine_by, weights, len(adapters))
    if problems:
        raise PlanError(problems)
    return (1.0,) * len(adapters) if weights is None else tuple(float(w) for w in weights)


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


class _Planner:
    """Gathers what a plan needs; `found` fills while it works."""

    def __init__(
        self,
        base: Checkpoint,
        decoded: Decoded | None,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        settings: Settings,
    ) -> None:
        self.base = decoded.checkpoint if decoded else base
        self.decoded = decoded
        self.adapters = adapters
        self.weights = weights
        self.settings = settings
        self.options = Options(**settings.options)
        self.found = Findings()
        self.problems, self.notes = self.found.problems, self.found.notes
        self.quant = Quant(**settings.quant)
        if decoded is None and self.quant.base_as == "simulated":
            self.base = self._simulated()

    def plan(self, max_memory: int) -> Plan:
        # A mixture applies the weights itself.
        weights = (1.0,) * len(self.adapters) if self.settings.combine not in SUMS else self.weights
        if self.base.components:
            self.settings = check_pipeline(self.base, self.settings, self.found)
        contributions = [
            contribute(adapter, i, weight, self.base)
            for i, (adapter, weight) in enumerate(zip(self.adapters, weights, strict=True))
        ]
        check_adapters(self.base, contributions, self.found)
        touched = Counter(key for found in contributions for key in found.keys)
        shared = tuple(key for key, count in touched.items() if count > 1)
        drafts, untied = self._drafts(self._combined(contributions))
        shards, codes = self._shards(drafts, untied)
        files, left_out = self._sidecars(shards, untied, codes)
        self._explain_base()
        self._explain_memory(shards)
        check_base(self.base, self.adapters, self.found)
        return Plan(
            base=self.base.fingerprint,
            base_name=str(self.base.path),
            adapters=tuple(self._use(c) for c in contributions),
            settings=self.settings,
            shards=shards,
            index=layout.make_index(self.written, shards),
            sidecars=files,
            left_out=left_out,
            expectations=self._expectations(),
            warnings=tuple(self.found.warnings),
            notes=tuple(self.notes),
            overlaps=shared if self.settings.combine not in SUMS else overlaps(drafts),
            order_matters=order_matters(drafts) or (bool(shared) and by_place(self.settings.combine)),
            cost=cost.estimate(shards, max_memory, self.problems),
            inputs=self._inputs(),
        )

    @property
    def written(self) -> Checkpoint:
        """The base in the form that the result has: its own, if it keeps its codes."""
        return self.base.on_disk if self.quant.keep or self.decoded is None else self.base

    def _simulated(self) -> Checkpoint:
        """The base as it was while the adapters were trained on a quantised load of it."""
        name = trained_as(self.quant, self.adapters)
        if name is None:
            what = "no adapter says how its base was quantised in training; name it with --trained_quant nf4, int8 …"
            self.problems.append(Problem("base_as", what))
            return self.base
        return simulate(self.base, name, self.problems)

    def _explain_base(self) -> None:
        """What the base is taken for, and why another choice may be wanted."""
        if self.decoded and self.decoded.encodings:
            forms = Counter(e.codec for e in self.decoded.encodings.values())
            what = ", ".join(f"{n} of {name}" for name, n in forms.items())
            kept = "what no adapter changes keeps its codes" if self.quant.keep else "the result is in floats"
            self.notes.append(
                f"base_as dequantised: {what} decoded, which is what an adapter was trained against; {kept}"
            )
            return
        name = trained_as(self.quant, self.adapters)
        if name is None or self.decoded is not None:
            return
        if self.quant.base_as == "simulated":
            what = f"decode(encode(W)) with {name}, which is what the adapters were trained against"
            self.notes.append(f"base_as simulated: {what}; --base_as original takes the finer weights W themselves")
        else:
            what = f"the adapters were trained on a base quantised to {name} while it was loaded, and go onto W itself"
            why = "closer to training is --base_as simulated, which also bakes the errors of the codes in"
            (self.notes if self.quant.base_as else self.found.warnings).append(f"base_as original: {what}; {why}")

    def _explain_memory(self, shards: Sequence[ShardPlan]) -> None:
        """Tensors that no block of rows is enough for."""
        weights = {w.key: w for w in (e.weight if isinstance(e, Coded) else e for s in shards for e in s.entries)}
        found = [e for e in weights.values() if whole(e)]
        if found:
            methods = ", ".join(sorted({step.tuner for e in found for step in e.steps if isinstance(step, Dense)}))
            largest = max(found, key=lambda e: e.count)
            what = f"{len(found)} tensors are worked on as whole matrices ({methods})"
            self.notes.append(f"{what}, the largest {largest.key} {list(largest.shape)}; --max_memory counts them")

    def _combined(self, contributions: Sequence[Contribution]) -> Sequence[Contribution]:
        """The contributions, or that of the one adapter that PEFT's methods make of them."""
        name = self.settings.combine
        if name not in combining.METHODS:
            return contributions
        combined, problems = combined_adapter(self.adapters, self.weights, name, self.options)
        self.problems += problems
        return contributions if combined is None else [contribute(combined.adapter, 0, 1.0, self.base)]

    def _drafts(self, contributions: Sequence[Contribution]) -> tuple[dict[str, Draft], Untied | None]:
        roots = {BASE: self.base.path} | {adapter_root(i): a.path for i, a in enumerate(self.adapters)}
        with SpanReader(roots) as reader:
            drafts = combine(contributions, self.base, self.settings.combine, reader, self.problems, self.notes)
        untied = settle_ties(self.base, contributions, drafts, self.problems, self.notes)
        if self.settings.combine in mixing.METHODS:
            names = [c.adapter.name for c in contributions]
            mix(drafts, self.settings.combine, self.weights, self.options, names, self.problems)
        return drafts, untied

    def _out_dtype(self, ref: TensorRef) -> DType:
        if self.settings.dtype and ref.dtype.mergeable:
            return DTYPES[self.settings.dtype]
        if ref.made is None:
            return ref.dtype
        return self._decoded_dtype() if self.decoded else self.base.on_disk.tensors[ref.key][1].dtype

    def _decoded_dtype(self) -> DType:
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

    def _shards(
        self, drafts: Mapping[str, Draft], untied: Untied | None
    ) -> tuple[tuple[ShardPlan, ...], Mapping[str, Mapping[str, Any]]]:
        """Output files, and what is said anew of codes: by file, then by dotted path."""
        by_shard: list[tuple[str, list[Entry]]] = []
        for shard in self.base.shards:
            refs = (TensorRef.of(BASE, shard.file, t) for t in shard.tensors)
            by_shard.append((shard.file, [self._entry(ref.key, ref, drafts.get(ref.key, Draft())) for ref in refs]))
        for key in [key for key in drafts if key not in self.base.tensors]:
            self._add_new(key, drafts[key], by_shard, untied)
        stored: Sequence[tuple[str, Sequence[Entry | Coded]]] = by_shard
        codes: Mapping[str, Mapping[str, Any]] = {}
        if self.decoded and self.quant.keep:
            stored = keep_codes(self.decoded, by_shard, self.quant, self.problems)
            every = [entry for _, entries in stored for entry in entries]
            self.notes += zero_points.notes_of(every) + compensating.notes_of(every)
            self.problems += compensating.problems_of(every)
            freed = self._freed(stored)
            codes = less_codes(self.base.on_disk, freed) if freed else {}
        elif self.quant.method:
            made = quantise(self.base, by_shard, self.quant, self.problems)
            stored, codes = made.by_shard, {sidecars.CONFIG: {"quantization_config": dict(made.config)}}
            self.notes.append(f"{made.encoded} linear weights stored in codes ({self.quant.method})")
        largest = max((sum(e.nbytes for e in entries) for _, entries in stored), default=0)
        limit = self.settings.max_shard_bytes
        grows = self.decoded is not None and not self.quant.keep
        if limit is None and grows and largest > layout.USUAL_SHARD_BYTES:
            limit = layout.USUAL_SHARD_BYTES  # the shards of a quantised base grow to four times their size
        return layout.lay_out(self.written, stored, limit), codes

    def _freed(self, stored: Sequence[tuple[str, Sequence[Entry | Coded]]]) -> list[str]:
        """Modules that are no longer in codes."""
        assert self.decoded is not None
        keys = {e.key for _, entries in stored for e in entries if isinstance(e, Entry) and e.touched}
        return [e.stem.removesuffix(".weight") for key, e in self.decoded.encodings.items() if key in keys]

    def _entry(self, key: str, ref: TensorRef, draft: Draft) -> Entry:
        source = draft.source or ref
        dtype = self._out_dtype(ref)
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

    def _add_new(self, key: str, draft: Draft, by_shard: list[tuple[str, list[Entry]]], untied: Untied | None) -> None:
        """A tensor that the base does not have goes beside the one it was tied to, or to the last shard."""
        if untied is not None and key in untied.values:
            shard, info = self.base.tensors[untied.values[key]]
            ref = TensorRef.of(BASE, shard.file, info)
            entries = next(entries for file, entries in by_shard if file == shard.file)
            entries.append(self._entry(key, ref, draft))
            return
        assert draft.source is not None, f"new tensor {key} without a source"
        usual = DTYPES[self.settings.dtype] if self.settings.dtype else self._usual_dtype()
        dtype = self._decoded_dtype() if self.decoded and not self.settings.dtype else usual
        by_shard[-1][1].append(
            Entry(key, dtype, draft.source.shape, draft.source, tuple(draft.patches), tuple(draft.steps))
        )
        self.notes.append(f"{key} is new: the base has no such tensor")

    def _sidecars(
        self, shards: Sequence[ShardPlan], untied: Untied | None, codes: Mapping[str, Mapping[str, Any]]
    ) -> tuple[tuple[Sidecar, ...], dict[str, str]]:
        every = [e.weight if isinstance(e, Coded) else e for shard in shards for e in shard.entries]
        entries: dict[str, Entry] = {e.key: e for e in every}
        decodes = self.decoded is not None and not self.quant.keep
        edits = sidecars.config_edits(
            self.base,
            self.settings.dtype or (self._decoded_dtype().name if decodes else None),
            untied is not None,
            vocabulary(self.base, entries, self.problems),
            new_head(self.base, self.adapters, entries),
        )
        by_file = {file: dict(values) for file, values in codes.items()}
        if edits:
            by_file[sidecars.CONFIG] = {**edits, **by_file.get(sidecars.CONFIG, {})}
        if self.base.components:
            by_file = sidecars.pipeline_edits(self.base, self.settings.dtype, shards)
        for file, values in by_file.items():
            self.notes.append(f"{file}: " + ", ".join(f"{k} = {v!r:.60}" for k, v in values.items()))
        removed = sidecars.of_codes(self.base.on_disk.config) if decodes else ()
        if removed:
            self.notes.append(f"{sidecars.CONFIG}: without {', '.join(removed)}")
        files, left_out = sidecars.plan_sidecars(self.written, self.adapters, by_file, removed, self.notes)
        if decodes and self.decoded:
            left_out |= dict.fromkeys(self.decoded.dropped, "a tensor that serves the codes of the base alone")
        if layout.index_file(shards) and layout.make_index(self.written, shards) is None and self.base.index_file:
            files = (*files, Sidecar(self.base.index_file, BASE, self.base.index_file))
        return files, left_out

    def _expectations(self) -> tuple[Expectation, ...]:
        return tuple(
            Expectation(i, key, digest)
            for i, adapter in enumerate(self.adapters)
            for key, digest in sorted(adapter.fingerprint.get("tensors", {}).items())
            if key in self.base.on_disk.tensors
        )

    def _use(self, found: Contribution) -> AdapterUse:
        adapter = found.adapter
        return AdapterUse(
            name=adapter.name,
            digest=adapter.digest,
            tuner=adapter.config.tuner,
            weight=self.weights[found.position],
            rank=tuple(sorted(found.ranks)),
            scaling=tuple(sorted(found.scalings)),
            modules=len(adapter.parts),
            parameters=adapter.parameters,
            base_model=adapter.base_model,
        )

    def _inputs(self) -> Inputs:
        roots = {BASE: self.base.path} | {adapter_root(i): a.path for i, a in enumerate(self.adapters)}
        named = [(BASE, shard.file) for shard in self.base.on_disk.shards]
        named += [(adapter_root(i), f) for i, a in enumerate(self.adapters) for f in a.files]
        files = []
        for root, file in named:
            stat = (roots[root] / file).stat()
            files.append(InputFile(root, file, stat.st_size, stat.st_mtime_ns))
        return Inputs({name: str(path) for name, path in roots.items()}, tuple(files))
