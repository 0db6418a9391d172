"""What a plan will take: bytes by what happens to them, and memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

from inlay.checkpoints.refs import TensorRef
from inlay.errors import Problem
from inlay.plan import memory
from inlay.plan.types import Coded, Cost, Entry, ShardPlan
from inlay.tuners import kernel


def threads() -> int:
    """Threads that a run uses when not told otherwise: the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_kernel(entry: Entry) -> bool:
    """Whether the float32 kernel does this entry, or any piece of it; otherwise it is computed in float64."""
    if entry.patches:
        return False
    steps = entry.low_rank
    additive = len(steps) == len(entry.steps) and all(step.magnitude is None for step in steps)
    parts = [part.ref.dtype for step in steps for part in (step.left, step.right) if part]
    return additive and kernel.fits(entry.source.dtype, entry.dtype, parts)


def estimate(shards: Sequence[ShardPlan], max_memory: int, problems: list[Problem]) -> Cost:
    """Cost of a plan; a tensor that cannot be worked on under the cap is a problem."""
    entries = [entry for shard in shards for entry in shard.entries]
    computed = [e for e in entries if not e.copied]
    weights = list({w.key: w for w in (e.weight if isinstance(e, Coded) else e for e in computed)}.values())
    refs = {ref for e in weights for ref in _adapter_refs(e)}
    cache = memory.factor_cache(shards, max_memory)
    peaks = [0]
    for entry in computed:
        try:
            peaks.append(_peak(entry, max_memory - cache))
        except ValueError as error:
            problems.append(
                Problem(
                    entry.key,
                    f"one row and its factors take {error.args[0]:,} bytes, --max_memory allows {max_memory:,}",
                )
            )
    every = {w.key: w for w in (e.weight if isinstance(e, Coded) else e for e in entries)}.values()
    floats = [e for e in every if e.dtype.kind in ("float", "code")]
    return Cost(
        read=sum(_stored_bytes(e.source) for e in weights) + sum(ref.nbytes for ref in refs),
        computed=sum(e.nbytes for e in computed),
        copied=sum(e.nbytes for e in entries if e.copied),
        written=sum(e.nbytes for e in entries),
        touched_parameters=sum(e.count for e in floats if e.touched),
        parameters=sum(e.count for e in floats),
        memory=cache + max(peaks),
    )


def _peak(entry: Entry | Coded, max_memory: int) -> int:
    if isinstance(entry, Entry):
        return memory.peak(entry, by_kernel(entry), threads(), max_memory)
    tiling, at_once = memory.fit_coded(entry, threads(), max_memory)
    return at_once * (tiling.shared + tiling.per_thread)


def _stored_bytes(ref: TensorRef) -> int:
    return ref.nbytes if ref.made is None else sum(part.nbytes for _, part in ref.made.parts)


def _adapter_refs(entry: Entry) -> set[TensorRef]:
    return {ref for step in entry.steps for ref in step.refs} | {patch.ref for patch in entry.patches}
