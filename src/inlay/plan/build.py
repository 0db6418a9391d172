"""Make a plan: read headers, decide everything, gather every problem, write nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader, adapter_root
from inlay.errors import PlanError, Problem
from inlay.output.destination import check_destination
from inlay.plan import compensating, cost, layout, sidecars, zero_points
from inlay.plan.check import Findings, check_adapters, check_base, check_pipeline, new_head, vocabulary
from inlay.plan.combination import NO_OPTIONS, SUMS, Options, by_place, combined_adapter
from inlay.plan.combine import Draft, combine, order_matters, overlaps
from inlay.plan.contribute import contribute
from inlay.plan.entries import EntryMaker
from inlay.plan.excluding import less_codes
from inlay.plan.explain import explain_base, explain_memory
from inlay.plan.memory import DEFAULT_MAX_MEMORY
from inlay.plan.mixtures import mix
from inlay.plan.placer import Contribution
from inlay.plan.quant import NO_QUANT, Quant, keep_codes, quantise, simulate, trained_as
from inlay.plan.request import Request, StrPath, parse_size, read_request
from inlay.plan.tied import Untied, settle_ties
from inlay.plan.types import (
    AdapterUse,
    Coded,
    Entry,
    Expectation,
    InputFile,
    Inputs,
    Plan,
    ShardPlan,
    Sidecar,
)
from inlay.tuners import combining, mixing

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
    request = read_request(
        model,
        adapters,
        weights=weights,
        torch_dtype=torch_dtype,
        combine_by=combine_by,
        options=options,
        quant=quant,
        max_shard_size=max_shard_size,
    )
    draft = _Planner(request)
    plan = draft.plan(parse_size(max_memory))
    problems = draft.problems
    if output_dir is not None:
        needed = plan.cost.written + OVERHEAD_BYTES
        problems = problems + check_destination(Path(output_dir), plan.roots, exist_ok, needed)
    if problems:
        raise PlanError(problems, draft.found.hints)
    return plan


class _Planner:
    """Gathers what a plan needs; `found` fills while it works."""

    def __init__(self, request: Request) -> None:
        self.decoded, self.adapters, self.weights = request.decoded, request.adapters, request.weights
        self.settings, self.options, self.quant = request.settings, request.options, request.quant
        self.found = Findings()
        self.problems, self.notes = self.found.problems, self.found.notes
        self.base = self._taken(request.base)

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
        explain_base(self.decoded, self.quant, self.adapters, self.found)
        explain_memory(shards, self.notes)
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
    def entries(self) -> EntryMaker:
        return EntryMaker(self.base, self.decoded is not None, self.adapters, self.settings.dtype, self.problems)

    @property
    def written(self) -> Checkpoint:
        """The base in the form that the result has: its own, if it keeps its codes."""
        return self.base.on_disk if self.quant.keep or self.decoded is None else self.base

    def _taken(self, base: Checkpoint) -> Checkpoint:
        """What the base is taken for: decoded, or as it was while the adapters were trained on a quantised load."""
        if self.decoded:
            return self.decoded.checkpoint
        if self.quant.base_as != "simulated":
            return base
        name = trained_as(self.quant, self.adapters)
        if name is None:
            what = "no adapter says how its base was quantised in training; name it with --trained_quant nf4, int8 …"
            self.problems.append(Problem("base_as", what))
            return base
        return simulate(base, name, self.problems)

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

    def _shards(
        self, drafts: Mapping[str, Draft], untied: Untied | None
    ) -> tuple[tuple[ShardPlan, ...], Mapping[str, Mapping[str, Any]]]:
        """Output files, and what is said anew of codes: by file, then by dotted path."""
        by_shard: list[tuple[str, list[Entry]]] = []
        make = self.entries.make
        for shard in self.base.shards:
            refs = (TensorRef.of(BASE, shard.file, t) for t in shard.tensors)
            by_shard.append((shard.file, [make(ref.key, ref, drafts.get(ref.key, Draft())) for ref in refs]))
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

    def _add_new(self, key: str, draft: Draft, by_shard: list[tuple[str, list[Entry]]], untied: Untied | None) -> None:
        """A tensor that the base does not have goes beside the one it was tied to, or to the last shard."""
        if untied is not None and key in untied.values:
            shard, info = self.base.tensors[untied.values[key]]
            ref = TensorRef.of(BASE, shard.file, info)
            entries = next(entries for file, entries in by_shard if file == shard.file)
            entries.append(self.entries.make(key, ref, draft))
            return
        by_shard[-1][1].append(self.entries.new(key, draft))
        self.notes.append(f"{key} is new: the base has no such tensor")

    def _sidecars(
        self, shards: Sequence[ShardPlan], untied: Untied | None, codes: Mapping[str, Mapping[str, Any]]
    ) -> tuple[tuple[Sidecar, ...], dict[str, str]]:
        every = [e.weight if isinstance(e, Coded) else e for shard in shards for e in shard.entries]
        entries: dict[str, Entry] = {e.key: e for e in every}
        decodes = self.decoded is not None and not self.quant.keep
        edits = sidecars.config_edits(
            self.base,
            self.settings.dtype or (self.entries.decoded_dtype().name if decodes else None),
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
