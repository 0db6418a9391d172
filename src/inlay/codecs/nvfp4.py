"""Two e2m1 codes a byte, the lower bits first, and a step for each group of a row: w = e2m1·step.

    NVFP4   groups of 16, step = an e4m3 scale of the group over or times a float32 of the tensor
    MXFP4   groups of 32, step = 2^(code − 127)

NVIDIA modelopt, torch/quantization/qtensor/nvfp4_tensor.py; compressed-tensors 0.17, compressors/nvfp4. The step is
rounded to float32 first, then the product, as both do; the type that the model is loaded in rounds it once more.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from inlay.codecs import grids
from inlay.codecs.floats import E2M1, encode_e2m1, look_up, wide

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]


@cache
def _values() -> F32Array:
    octet = np.arange(256)
    return wide(E2M1[np.stack([octet & 15, octet >> 4], axis=1)])


def decode(codes: U8Array, steps: F32Array, group: int) -> F32Array:
    """Values (n, in) of codes (n, in/2) and steps (n, in/group)."""
    values = look_up(codes, _values())
    grids.apply(np.multiply, values, steps, (1, group), 0)
    return values


def encode(weight: F32Array, steps: F32Array, group: int) -> U8Array:
    """The nearest codes of values (n, in), two a byte."""
    quotients = weight.astype(np.float64)
    divisors = steps.astype(np.float64)
    divisors[divisors == 0] = np.inf  # any code gives 0; this one is that of 0
    grids.apply(np.divide, quotients, divisors, (1, group), 0)
    codes = encode_e2m1(quotients)
    octets: U8Array = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
    return octets


def largest(weight: F32Array, group: int) -> F32Array:
    """The greatest magnitude in each group, (n, in/group)."""
    low, high = grids.extremes(weight, (1, group))
    return np.maximum(high, np.abs(low))
