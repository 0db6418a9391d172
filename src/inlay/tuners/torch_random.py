"""torch's CPU generator for uniform floats, without torch: projections that files leave out are drawn with it.

A seeded generator is MT19937 (Matsumoto and Nishimura 1998), seeded as in its reference code; a number takes the
low 24 bits of one draw, times 2⁻²⁴, in double precision, is rounded to float32 and then to its type, and where that
is the upper bound, which is excluded, it becomes the lower (ATen/core/TransformationHelper.h and
ATen/native/cpu/DistributionTemplates.h of torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from inlay.dtypes import F32, DType, decode32, round_nearest

F32Array = npt.NDArray[np.float32]
BLOCK = 1 << 20  # numbers drawn at once, so that a large matrix is held in float32 only


def uniform(
    generator: np.random.RandomState, shape: tuple[int, ...], low: float, high: float, dtype: DType = F32
) -> F32Array:
    """What `torch.empty(shape, dtype=dtype).uniform_(low, high, generator=…)` holds, as float32."""
    low, high = float(np.float32(low)), float(np.float32(high))
    drawn = np.empty(math.prod(shape), np.float32)
    for first in range(0, drawn.size, BLOCK):
        bits = generator.randint(0, 1 << 32, min(BLOCK, drawn.size - first), np.uint32)
        share = (bits & np.uint32(0xFFFFFF)).astype(np.float64) * 2.0**-24
        drawn[first : first + len(bits)] = in_type((share * (high - low) + low).astype(np.float32), dtype)
    lower, upper = in_type(np.array([low, high], np.float32), dtype)
    drawn[drawn == upper] = lower
    return drawn.reshape(shape)


def in_type(x: F32Array, dtype: DType) -> F32Array:
    """The values rounded to a type of 16 or 32 bits."""
    return x if dtype is F32 else decode32(round_nearest(x.astype(np.float64), dtype), dtype)


def kaiming_bound(columns: int, slope: float = 0.0) -> float:
    """√3 · gain / √columns, gain = √(2 / (1 + slope²)) (He et al. 2015), in the order in which torch computes it."""
    return math.sqrt(3.0) * (math.sqrt(2.0 / (1 + slope**2)) / math.sqrt(columns))


@lru_cache(maxsize=1)
def kaiming_uniform(seed: int, shapes: Sequence[tuple[int, int]]) -> tuple[F32Array, ...]:
    """Matrices drawn one after the other from one generator, as PEFT draws shared projections.

    The last draw is kept: all layers share it.
    """
    generator = np.random.RandomState(seed % (1 << 32))
    bounds = [kaiming_bound(cols) for _, cols in shapes]
    return tuple(uniform(generator, shape, -b, b) for shape, b in zip(shapes, bounds, strict=True))
