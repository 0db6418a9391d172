"""What a plan will take: bytes by what happens to them, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.checkpoints.refs import TensorRef
from inlay.errors import Problem
from inlay.plan import memory
from inlay.plan.memory import by_kernel, threads
from inlay.plan.types import Coded, Cost, Entry, ShardPlan


def estimate(shards: Sequence[ShardPlan], max_memory: int, problems: list[Problem]) -> Cost:
    """Cost of a plan; a tensor that cannot be worked on under the cap is a problem."""
    entries = [entry for shard in shards for entry in shard.entries]
    computed = [e for e in entries if not e.copied]
    weights = list({w.key: w for w in (e.weight if isinstance(e, Coded) else e for e in computed)}.values())
    refs = {ref for e in weights for ref in _adapter_refs(e)}
    cache = memory.factor_cache(shards, max_memory)
    peaks = [0]
    for key, entry in {e.weight.key if isinstance(e, Coded) else e.key: e for e in computed}.items():
        try:
            peaks.append(_peak(entry, max_memory - cache))
        except ValueError as error:
            what = "its codes and the rows that are encoded" if isinstance(entry, Coded) else "one row and its factors"
            needed, allowed = error.args[0] + cache, f"--max_memory allows {max_memory:,}"
            problems.append(Problem(key, f"{what} take {needed:,} bytes with what is kept of files, {allowed}"))
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
