"""How much is worked on at once: integer arithmetic on shapes, under a hard cap.

The cap counts what the merge itself holds: the block of rows that each thread works on, and the factors
of the tensor at hand. It does not depend on the size of a tensor, a shard or a model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from inlay.checkpoints.made import BLOCK_ELEMENTS, read_settings
from inlay.checkpoints.spans import KEPT_BYTES, KEPT_MAKERS, KEPT_SIMULATED
from inlay.codecs import compensation, compiled
from inlay.codecs.table import codec
from inlay.dtypes import DTYPES, F32
from inlay.plan.pieces import pieces
from inlay.plan.steps import Delta, Dense, Step
from inlay.plan.types import Coded, Entry, ShardPlan
from inlay.tuners import combining, mixing
from inlay.tuners import kernel as compiled_merge
from inlay.tuners.dense import drawn_elements, needs_whole

DEFAULT_MAX_MEMORY = 1 << 30
# The work space of a thread: large enough to hide the cost of a call, small enough for the last cache.
KERNEL_TILE_BYTES = 1 << 22
FLOAT64_TILE_BYTES = 1 << 22
# Live float64 arrays of one block in the float64 path: value, error, delta, norms, bits low and high.
FLOAT64_ARRAYS = 8
MIXED_ARRAYS = 3  # of a block, for each adapter that is mixed: delta, mask, and what it is weighed with
WHOLE_MATRICES = 8  # of float64, where a combination decomposes whole deltas
ENCODING_BYTES = 40  # a value: float64 quotients, codes, and what is between them
UNFINISHED_BYTES = 3  # a value: a code a byte in blocks, put together, and on the way to their stored form
ENCODED_TILE_BYTES = 1 << 24  # the work space in which rows are encoded
COMPILED_BYTES = 2  # a value that a kernel decodes: its codes and scales as read
DECODING_BYTES = 16  # a value: its codes and scales as read, and the float32 values before and after they are scaled


@dataclass(frozen=True)
class Tiling:
    """Rows a block, and the bytes that this takes: once for the tensor, and for each thread.

    Where each element stands alone, a row is one element. `encoded` rows are gathered to be encoded together.
    """

    rows: int
    shared: int
    per_thread: int
    encoded: int = 0


def whole(entry: Entry) -> bool:
    """Whether the entry can only be worked on in one block of all its rows."""
    return any(isinstance(step, Dense) and needs_whole(step.tuner, step.transposed, step.bias) for step in entry.steps)


def by_kernel(entry: Entry) -> bool:
    """Whether the compiled kernel does this entry, or any piece of it; otherwise it is computed in float64."""
    if entry.patches:
        return False
    steps = entry.low_rank
    additive = len(steps) == len(entry.steps) and all(step.magnitude is None for step in steps)
    parts = [part.ref.dtype for step in steps for part in (step.left, step.right) if part]
    return additive and compiled_merge.fits(entry.source.dtype, entry.dtype, parts)


def tile(entry: Entry, kernel: bool, by_rows: bool = False) -> Tiling:
    """Preferred blocking of an entry; `kernel` for the float32 kernel, otherwise float64.

    `by_rows` counts in rows even where each element stands alone.
    """
    rows, cols = (entry.count, 1) if entry.elementwise and not by_rows else entry.matrix
    stored = cols * (entry.source.dtype.bits + entry.dtype.bits) // 8
    rank = sum(step.rank for step in entry.low_rank)
    dense_steps = [step for step in entry.steps if isinstance(step, Dense)]
    dense = sum(ref.count for step in dense_steps for ref in step.refs)
    dense += sum(drawn_elements(step.tuner, step.settings) for step in dense_steps)
    made = cols * _decoding(entry)
    if kernel:
        shared = 2 * rank * cols * 8  # the factor as stored and packed, of this tensor and the next
        per_row = stored + made + rank * 12
        block = KERNEL_TILE_BYTES
    else:
        shared = 2 * rank * cols * 16 + dense * 16
        per_row = stored + made + cols * 8 * FLOAT64_ARRAYS + rank * 16
        block = FLOAT64_TILE_BYTES
    count = rows if whole(entry) else max(1, min(rows, block // max(1, per_row)))
    return Tiling(count, shared + _simulating(entry) + _combining(entry), count * per_row)


def _decoding(entry: Entry) -> int:
    """Bytes a value that making the weight takes."""
    made = entry.source.made
    if made is None:
        return 0
    settings = read_settings(made.settings)
    by_kernel = made.formula == "codec" and compiled.serves(codec(settings["codec"]), settings)
    return COMPILED_BYTES if by_kernel else DECODING_BYTES


def _simulating(entry: Entry) -> int:
    """Bytes that a weight takes which is encoded to be decoded again: its codes, and the block that is encoded."""
    made = entry.source.made
    if made is None or made.formula != "simulated":
        return 0
    settings = read_settings(made.settings)
    return KEPT_SIMULATED * _parts_bytes(settings["codec"], settings) + BLOCK_ELEMENTS * ENCODING_BYTES


def _combining(entry: Entry) -> int:
    """Bytes that combined factors and mixed deltas take: the factors that are kept, and what making them needs."""
    held = 0
    for step in entry.steps:
        if isinstance(step, Delta):
            assert step.ref.made is not None
            parts = step.ref.made.parts
            kept = sum(ref.count for name, ref in parts if name.startswith("right")) * 8 * KEPT_MAKERS
            adapters = len({name.partition(".")[0] for name, _ in parts})
            held += kept + (MIXED_ARRAYS * adapters + FLOAT64_ARRAYS) * mixing.BLOCK_ELEMENTS * 8 * (threads() + 1)
        elif isinstance(step, Step) and step.right.ref.made is not None:
            made = step.right.ref.made
            recipe = combining.Recipe(**read_settings(made.settings)["recipe"])
            pairs = sum(ref.count for _, ref in made.parts) * 8 * 2
            result = step.rank * sum(entry.matrix) * 8 * KEPT_MAKERS
            matrices = WHOLE_MATRICES * entry.count * 8 if recipe.method.on_deltas and recipe.name != "svd" else 0
            held += pairs + result + matrices
    return held


def threads() -> int:
    """Threads that a run uses when not told otherwise: the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parts_bytes(name: str, settings: Mapping[str, Any]) -> int:
    return sum(DTYPES[dtype].nbytes(math.prod(shape)) for dtype, shape in codec(name).layout(settings).values())


def _sliced(entry: Entry, max_memory: int) -> int:
    """Bytes of stored parts that even one row needs: whole experts, or all of a part that is not cached."""
    made = entry.source.made
    if made is None or made.formula != "codec":
        return 0
    settings, parts = read_settings(made.settings), dict(made.parts)
    cache = min(KEPT_BYTES, max_memory // 3)  # of three quarters of the cap, the fourth is the cache
    total = 0
    for part, span in codec(settings["codec"]).spans(settings, 0, 1).items():
        ref = parts[part]
        if span is not None:
            total += ref.nbytes * (span[2] - span[1]) // max(1, ref.shape[span[0]])
        elif ref.nbytes > cache:
            total += ref.nbytes
    return total


def factor_cache(shards: Iterable[ShardPlan], max_memory: int) -> int:
    """Bytes of the cap that are set aside for what is read in pieces over and over, where there is such a thing.

    Interleaved factors (LoRA on stacks of experts), and the parts of quantised weights.
    """
    weights = (e.weight if isinstance(e, Coded) else e for shard in shards for e in shard.entries)
    kept = any(_interleaved(entry) or entry.source.made is not None for entry in weights)
    return min(KEPT_BYTES, max_memory // 4) if kept else 0


def _interleaved(entry: Entry) -> bool:
    """Whether a factor's elements stand between those of others."""
    parts = [part for step in entry.low_rank for part in (step.left, step.right) if part]
    return any(min(part.strides) > 1 for part in parts)


def fit(entry: Entry, kernel: bool, threads: int, max_memory: int, by_rows: bool = False) -> tuple[Tiling, int]:
    """Blocking and number of threads under the cap.

    Raises ValueError with the bytes needed when one row on one thread (or all rows, where they are needed
    together) is too much.
    """
    parts = pieces(entry)
    if len(parts) > 1:  # every thread may be at another piece, with the factors of that
        tilings = [tile(piece.entry, kernel, by_rows) for piece in parts]
        wanted = Tiling(
            max(t.rows for t in tilings),
            max(t.shared for t in tilings) * threads,
            max(t.rows for t in tilings) * max(-(-t.per_thread // max(1, t.rows)) for t in tilings),
        )
    else:
        wanted = tile(entry, kernel, by_rows)
    fixed = _sliced(entry, max_memory)
    per_row = max(1, -(-wanted.per_thread // max(1, wanted.rows)))  # of a tensor without elements too
    least = wanted.rows if whole(entry) else 1
    if wanted.shared + fixed + least * per_row > max_memory:
        if len(parts) > 1 and threads > 1:
            return fit(entry, kernel, 1, max_memory, by_rows)
        raise ValueError(wanted.shared + fixed + least * per_row)
    threads = 1 if whole(entry) else max(1, min(threads, (max_memory - wanted.shared) // (fixed + per_row)))
    rows = min(wanted.rows, ((max_memory - wanted.shared) // threads - fixed) // per_row)
    return Tiling(rows, wanted.shared, fixed + rows * per_row), threads


def fit_coded(coded: Coded, threads: int, max_memory: int) -> tuple[Tiling, int]:
    """Blocking of a weight that is encoded, and the number of such weights at once: a thread each.

    All parts of the weight are held until it is done; rows are merged few at a time, and gathered until as many are
    there as must be encoded together. Raises ValueError with the bytes needed.
    """
    rows, cols = coded.weight.matrix
    step = codec(coded.codec).align(coded.settings)
    chosen = compensation.BYTES if coded.compensate else 0
    per_encoded = max(1, cols * (F32.bits // 8 + ENCODING_BYTES + chosen))
    held = 2 * _parts_bytes(coded.codec, coded.settings)  # as encoded, and as they are put together
    if getattr(codec(coded.codec), "UNFINISHED", ()):
        held += UNFINISHED_BYTES * coded.weight.count
    room = min(ENCODED_TILE_BYTES, (max_memory - held) // 2)
    encoded = max(step, min(-(-rows // step) * step, room // per_encoded // step * step))
    held += min(encoded, rows) * per_encoded
    if held >= max_memory:
        raise ValueError(held)
    try:
        wanted, _ = fit(coded.weight, by_kernel(coded.weight), 1, max_memory - held, by_rows=True)
    except ValueError as error:
        raise ValueError(held + error.args[0]) from None
    needed = held + wanted.shared + wanted.per_thread
    shared = wanted.shared + held
    return Tiling(wanted.rows, shared, wanted.per_thread, encoded), max(1, min(threads, max_memory // needed))


def peak(entry: Entry, kernel: bool, threads: int, max_memory: int) -> int:
    """Bytes that working on this entry takes."""
    tiling, threads = fit(entry, kernel, threads, max_memory)
    return tiling.shared + threads * tiling.per_thread
