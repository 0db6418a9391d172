"""How much is worked on at once: integer arithmetic on shapes, under a hard cap.

The cap counts what the merge itself holds: the block of rows that each thread works on, and the factors
of the tensor at hand. It does not depend on the size of a tensor, a shard or a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from inlay.checkpoints.spans import KEPT_BYTES
from inlay.codecs.table import codec
from inlay.dtypes import DTYPES
from inlay.plan.pieces import pieces
from inlay.plan.steps import Dense
from inlay.plan.types import Coded, Entry, ShardPlan
from inlay.tuners.dense import drawn_elements, needs_whole

DEFAULT_MAX_MEMORY = 1 << 30
# The work space of a thread: large enough to hide the cost of a call, small enough for the last cache.
KERNEL_TILE_BYTES = 1 << 22
FLOAT64_TILE_BYTES = 1 << 22
# Live float64 arrays of one block in the float64 path: value, error, delta, norms, bits low and high.
FLOAT64_ARRAYS = 8
ENCODING_BYTES = 40  # a value: float64 quotients, codes, and what is between them
DECODING_BYTES = 16  # a value: its codes and scales as read, and the float32 values before and after they are scaled


@dataclass(frozen=True)
class Tiling:
    """Rows a block, and the bytes that this takes: once for the tensor, and for each thread.

    Where each element stands alone, a row is one element.
    """

    rows: int
    shared: int
    per_thread: int


def whole(entry: Entry) -> bool:
    """Whether the entry can only be worked on in one block of all its rows."""
    return any(isinstance(step, Dense) and needs_whole(step.tuner, step.transposed, step.bias) for step in entry.steps)


def tile(entry: Entry, kernel: bool) -> Tiling:
    """Preferred blocking of an entry; `kernel` for the float32 kernel, otherwise float64."""
    rows, cols = (entry.count, 1) if entry.elementwise else entry.matrix
    stored = cols * (entry.source.dtype.bits + entry.dtype.bits) // 8
    rank = sum(step.rank for step in entry.low_rank)
    dense_steps = [step for step in entry.steps if isinstance(step, Dense)]
    dense = sum(ref.count for step in dense_steps for ref in step.refs)
    dense += sum(drawn_elements(step.tuner, step.settings) for step in dense_steps)
    made = cols * DECODING_BYTES if entry.source.made is not None else 0
    if kernel:
        shared = 2 * rank * cols * 8  # the factor as stored and packed, of this tensor and the next
        per_row = stored + made + rank * 12
        block = KERNEL_TILE_BYTES
    else:
        shared = 2 * rank * cols * 16 + dense * 16
        per_row = stored + made + cols * 8 * FLOAT64_ARRAYS + rank * 16
        block = FLOAT64_TILE_BYTES
    count = rows if whole(entry) else max(1, min(rows, block // max(1, per_row)))
    return Tiling(count, shared, count * per_row)


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


def fit(entry: Entry, kernel: bool, threads: int, max_memory: int) -> tuple[Tiling, int]:
    """Blocking and number of threads under the cap.

    Raises ValueError with the bytes needed when one row on one thread (or all rows, where they are needed
    together) is too much.
    """
    parts = pieces(entry)
    if len(parts) > 1:  # every thread may be at another piece, with the factors of that
        tilings = [tile(piece.entry, kernel) for piece in parts]
        wanted = Tiling(
            max(t.rows for t in tilings),
            max(t.shared for t in tilings) * threads,
            max(t.rows for t in tilings) * max(-(-t.per_thread // max(1, t.rows)) for t in tilings),
        )
    else:
        wanted = tile(entry, kernel)
    per_row = max(1, -(-wanted.per_thread // max(1, wanted.rows)))  # of a tensor without elements too
    least = wanted.rows if whole(entry) else 1
    if wanted.shared + least * per_row > max_memory:
        if len(parts) > 1 and threads > 1:
            return fit(entry, kernel, 1, max_memory)
        raise ValueError(wanted.shared + least * per_row)
    threads = 1 if whole(entry) else max(1, min(threads, (max_memory - wanted.shared) // per_row))
    rows = min(wanted.rows, (max_memory - wanted.shared) // (threads * per_row))
    return Tiling(rows, wanted.shared, rows * per_row), threads


def fit_coded(coded: Coded, threads: int, max_memory: int) -> tuple[Tiling, int]:
    """Blocking of a weight that is encoded, and the number of such weights at once: a thread each.

    All parts of the weight are held until it is done. Raises ValueError with the bytes needed.
    """
    form = codec(coded.codec)
    parts = sum(DTYPES[dtype].nbytes(math.prod(shape)) for dtype, shape in form.layout(coded.settings).values())
    held = 2 * parts  # as encoded, and as they are put together
    step = form.align(coded.settings)
    wanted, _ = fit(coded.weight, False, 1, max_memory)
    per_row = max(1, -(-wanted.per_thread // max(1, wanted.rows))) + coded.weight.matrix[1] * ENCODING_BYTES
    rows = max(step, min(wanted.rows, (max_memory - held - wanted.shared) // per_row) // step * step)
    if whole(coded.weight):
        rows = max(coded.weight.matrix[0], step)
    needed = held + wanted.shared + rows * per_row
    if needed > max_memory:
        raise ValueError(needed)
    return Tiling(rows, wanted.shared + held, rows * per_row), max(1, min(threads, max_memory // needed))


def peak(entry: Entry, kernel: bool, threads: int, max_memory: int) -> int:
    """Bytes that working on this entry takes."""
    tiling, threads = fit(entry, kernel, threads, max_memory)
    return tiling.shared + threads * tiling.per_thread
