"""The local executor: a pool of threads on this machine.

Reading, computing and writing of different bands overlap, because each thread does all three for its
own band and none of them holds the interpreter. Finished shards are synced behind the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from inlay.checkpoints.header import read_header
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.errors import InputError
from inlay.output.copying import clone
from inlay.output.staging import Staging
from inlay.plan.memory import by_kernel, factor_cache, fit, fit_coded, threads
from inlay.plan.types import Coded, Entry, Expectation, Plan, ShardPlan
from inlay.records.fingerprint import check_digest, tensor_digest
from inlay.run.encode import Encoding
from inlay.run.merge import Device
from inlay.run.recorded import check_stored, passing
from inlay.run.shard import Bands, Layout, Progress, Target, copies, lay_out_file, run_copy

QUEUED_PER_THREAD = 2


@dataclass
class ShardResult:
    """Digests of the computed tensors of a finished shard."""

    nbytes: int
    digests: dict[str, str] = field(default_factory=dict)


class LocalExecutor:
    """Runs the shards of a plan into a staging folder."""

    def __init__(self, plan: Plan, max_memory: int, workers: int | None = None, device: Device = None) -> None:
        self.plan = plan
        self.cache_bytes = factor_cache(plan.shards, max_memory)
        self.max_memory = max_memory - self.cache_bytes
        self.workers = workers or threads() + 1  # one more than processors, since one of them is writing
        self.device = device
        self._expected: Mapping[str, Expectation] = {e.key: e for e in passing(plan)}

    def run(self, staging: Staging, progress: Progress) -> dict[str, ShardResult]:
        """Write every shard that has no valid record yet; results by file name.

        Raises InputError when a result is not finite or the base is not the recorded one.
        """
        check_stored(self.plan)
        results = {}
        with (
            SpanReader(self.plan.roots, self.cache_bytes) as reader,
            ThreadPoolExecutor(self.workers) as pool,
            ThreadPoolExecutor(1) as syncer,
        ):
            pending = []
            for shard in self.plan.shards:
                layout = lay_out_file(shard, self._base_header(shard))
                done = _taken_up(staging, shard, layout, reader)
                if done is not None:
                    progress(layout.nbytes - len(layout.header))
                    results[shard.file] = done
                    continue
                results[shard.file] = self._run_shard(shard, layout, staging.path / shard.file, reader, pool, progress)
                pending.append(syncer.submit(_finish, staging, shard.file, results[shard.file]))
            for future in pending:
                future.result()
        return results

    def _base_header(self, shard: ShardPlan) -> bytes | None:
        if shard.like is None:
            return None
        return read_header(self.plan.roots[BASE] / shard.like).raw

    def _run_shard(
        self,
        shard: ShardPlan,
        layout: Layout,
        path: Path,
        reader: SpanReader,
        pool: ThreadPoolExecutor,
        progress: Progress,
    ) -> ShardResult:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        target = Target(path, layout.nbytes, layout.header)
        queue = _Queue(pool, self.workers * QUEUED_PER_THREAD)
        try:
            if self._cloned(shard, reader, target):
                progress(sum(e.nbytes for e in shard.entries if e.copied))
            else:
                for copy in copies(shard, layout.places):
                    queue.submit(run_copy, copy, reader, target, progress)
            merged = [
                self._merge(entry, layout, reader, queue, target, progress)
                for entry in shard.entries
                if isinstance(entry, Entry) and not entry.copied
            ]
            encoded = [
                self._encode(parts, layout, reader, queue, target, progress) for parts in _by_weight(shard.entries)
            ]
            queue.drain()
        finally:
            queue.abandon()  # after an error: a task must not write to a descriptor that is closed, or reused
            target.close()
        self._check(shard, merged, reader)
        digests = {bands.entry.key: bands.digest for bands in merged}
        return ShardResult(layout.nbytes, digests | {k: d for encoding in encoded for k, d in encoding.digests.items()})

    def _cloned(self, shard: ShardPlan, reader: SpanReader, target: Target) -> bool:
        """Whether the target now shares the extents of a base shard with the same header."""
        return shard.like is not None and clone(reader.fileno(BASE, shard.like), target.fd)

    def _merge(
        self, entry: Entry, layout: Layout, reader: SpanReader, queue: _Queue, target: Target, progress: Progress
    ) -> Bands:
        try:
            tiling, at_once = fit(entry, by_kernel(entry) and self.device is None, self.workers, self.max_memory)
        except ValueError as error:
            raise InputError(
                f"{entry.key}: one row and its factors take {error.args[0]:,} bytes, max_memory is {self.max_memory:,}"
            ) from None
        queue.limit_tensors(1)
        bands = Bands(entry, layout.places[entry.key], reader, tiling, self.device)
        digest_source = entry.key in self._expected
        queue.limit = at_once if at_once < self.workers else self.workers * QUEUED_PER_THREAD
        for task in range(bands.tasks):
            queue.submit(bands.run, task, target, digest_source, progress)
        queue.end_tensor()
        return bands

    def _encode(
        self,
        parts: Sequence[Coded],
        layout: Layout,
        reader: SpanReader,
        queue: _Queue,
        target: Target,
        progress: Progress,
    ) -> Encoding:
        weight = parts[0].weight
        try:
            tiling, at_once = fit_coded(parts[0], self.workers, self.max_memory)
        except ValueError as error:
            raise InputError(
                f"{weight.key}: encoding it takes {error.args[0]:,} bytes, max_memory is {self.max_memory:,}"
            ) from None
        if queue.limit != at_once:  # the tensors under way were counted otherwise
            queue.drain()
        queue.limit = at_once
        encoding = Encoding(parts, layout.places, reader, tiling)
        queue.submit(encoding.run, target, progress)
        return encoding

    def _check(self, shard: ShardPlan, merged: list[Bands], reader: SpanReader) -> None:
        bad = [bands.entry.key for bands in merged if not bands.finite]
        if bad:
            raise InputError(
                f"{len(bad)} merged tensor{'s' if len(bad) > 1 else ''} would hold Inf or NaN: {', '.join(bad[:10])}. "
                "The values are out of the range of the stored type, or not finite in the base; "
                "choose a wider --torch_dtype. Nothing was written"
            )
        taken = {bands.entry.key: bands.source_digest for bands in merged}
        for entry in shard.entries:
            if isinstance(entry, Entry) and entry.key in self._expected and entry.source.root == BASE:
                self._check_source(entry.key, taken.get(entry.key) or tensor_digest(reader, entry.source))

    def _check_source(self, key: str, found: str) -> None:
        expected = self._expected[key]
        check_digest(key, found, expected.digest, self.plan.adapters[expected.adapter].name)


class _Queue:
    """Submits tasks and holds back when enough are under way, so that memory stays bounded."""

    def __init__(self, pool: ThreadPoolExecutor, limit: int) -> None:
        self.limit = limit
        self._pool = pool
        self._running: set[Future[None]] = set()
        self._tensors: list[set[Future[None]]] = [set()]

    def submit(self, task: Callable[..., None], *args: object) -> None:
        while len(self._running) >= self.limit:
            self._wait(FIRST_COMPLETED)
        future = self._pool.submit(task, *args)
        self._running.add(future)
        self._tensors[-1].add(future)

    def end_tensor(self) -> None:
        self._tensors.append(set())

    def limit_tensors(self, count: int) -> None:
        """Wait until at most `count` earlier tensors still have tasks under way."""
        while True:
            self._tensors = [t & self._running for t in self._tensors[:-1] if t & self._running] + [self._tensors[-1]]
            if len(self._tensors) - 1 <= count:
                return
            self._wait(FIRST_COMPLETED)

    def drain(self) -> None:
        while self._running:
            self._wait(FIRST_COMPLETED)

    def abandon(self) -> None:
        """Cancel what has not begun and wait for what has; errors of these tasks do not matter any more."""
        for future in self._running:
            future.cancel()
        wait(self._running)
        self._running = set()

    def _wait(self, when: str) -> None:
        done, self._running = wait(self._running, return_when=when)
        for future in done:
            future.result()


def _by_weight(entries: Iterable[Entry | Coded]) -> list[list[Coded]]:
    """The parts that are encoded, those of one weight together."""
    found: dict[str, list[Coded]] = {}
    for entry in entries:
        if isinstance(entry, Coded):
            found.setdefault(entry.weight.key, []).append(entry)
    return list(found.values())


def _finish(staging: Staging, file: str, result: ShardResult) -> None:
    fd = os.open(staging.path / file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    staging.put_record(file, {"digests": result.digests})


def _taken_up(staging: Staging, shard: ShardPlan, layout: Layout, reader: SpanReader) -> ShardResult | None:
    """The result of an earlier, interrupted run, if the file still is what its record says.

    Computed tensors are compared by digest, copied spans with their source.
    """
    record, path = staging.record(shard.file), staging.path / shard.file
    digests = record.get("digests") if record else None
    if not isinstance(digests, dict) or not path.is_file() or path.stat().st_size != layout.nbytes:
        return None
    with open(path, "rb") as file:
        if file.read(len(layout.header)) != layout.header:
            return None
    with SpanReader({"staged": staging.path}) as staged:
        for entry in shard.entries:
            place = TensorRef.of("staged", shard.file, layout.places[entry.key])
            found = tensor_digest(staged, place)
            if isinstance(entry, Entry) and entry.copied:
                wanted: object = tensor_digest(reader, entry.source)
            else:
                wanted = digests.get(entry.key)
            if found != wanted:
                return None
    return ShardResult(layout.nbytes, dict(digests))
