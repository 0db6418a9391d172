"""Golden parts of MLX's affine form, made by MLX itself (0.32, CPU): run with `mlx[cpu]`, numpy and ml_dtypes.

Each case: the parts as stored bits, the weight that was quantised, and what `mx.dequantize` makes of the parts.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

CASES = {
    f"{bits}-{size}-{scale}{'-stack' if lead else ''}": (bits, size, scale, lead)
    for bits, size, scale, lead in [
        (2, 32, "BF16", ()), (3, 32, "F16", ()), (3, 64, "F32", ()), (4, 64, "BF16", ()), (4, 32, "F32", ()),
        (5, 32, "BF16", ()), (5, 32, "F32", ()), (6, 64, "F16", ()), (6, 32, "F32", ()), (8, 128, "BF16", ()),
        (8, 64, "F32", ()), (4, 64, "BF16", (3,)), (6, 32, "F32", (2,)),
    ]
}  # fmt: skip
TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def bits_of(array: mx.array) -> np.ndarray:
    """Stored bits; 16-bit floats as unsigned integers."""
    return np.array(array.view(mx.uint16) if array.itemsize == 2 else array)


def main() -> None:
    rng = np.random.default_rng(11)
    found: dict[str, np.ndarray] = {}
    for name, (bits, size, scale, lead) in CASES.items():
        weight = (rng.standard_normal((*lead, 10, 128)) * rng.uniform(0.01, 1, (*lead, 10, 1))).astype(np.float32)
        weight[..., 0, :size] = 0  # a group of zeros
        weight[..., 1, :size] = np.abs(weight[..., 1, :size]) + 0.5  # far from zero
        stored = mx.array(weight).astype(TYPES[scale])
        parts = mx.quantize(stored, group_size=size, bits=bits)
        back = mx.dequantize(*parts, group_size=size, bits=bits)
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            found[f"{name}/{part}"] = bits_of(array)
        found[f"{name}/original"] = np.array(stored.astype(mx.float32))
        found[f"{name}/decoded"] = bits_of(back)
        found[f"{name}/config"] = np.array(json.dumps({"bits": bits, "group_size": size, "mode": "affine"}))
    np.savez_compressed(Path(__file__).with_name("mlx.npz"), **found)


if __name__ == "__main__":
    main()
