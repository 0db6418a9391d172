"""torch's CPU generator for float32 uniforms, without torch: projections that files leave out are drawn with it.

A seeded generator is MT19937 (Matsumoto and Nishimura 1998), seeded as in its reference code; a float32 takes the
low 24 bits of one number, times 2⁻²⁴, in double precision, and is rounded once (ATen/core/TransformationHelper.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt


def uniform(
    generator: np.random.RandomState, shape: tuple[int, ...], low: float, high: float
) -> npt.NDArray[np.float32]:
    """What `torch.empty(shape).uniform_(low, high, generator=…)` holds."""
    low, high = float(np.float32(low)), float(np.float32(high))
    bits = generator.randint(0, 1 << 32, math.prod(shape), np.uint32)
    share = (bits & np.uint32(0xFFFFFF)).astype(np.float64) * 2.0**-24
    return (share * (high - low) + low).astype(np.float32).reshape(shape)


@lru_cache(maxsize=1)
def kaiming_uniform(seed: int, shapes: Sequence[tuple[int, int]]) -> tuple[npt.NDArray[np.float32], ...]:
    """Matrices drawn one after the other from one generator, as PEFT draws shared projections.

    Between −b and b, b = √3 · √2 / √columns (He et al. 2015). The last draw is kept: all layers share it.
    """
    generator = np.random.RandomState(seed % (1 << 32))
    bounds = [math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(cols)) for _, cols in shapes]
    return tuple(uniform(generator, shape, -b, b) for shape, b in zip(shapes, bounds, strict=True))
