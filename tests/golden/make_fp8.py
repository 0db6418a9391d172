"""Writes fp8.npz: small FP8 weights and what transformers makes of them. Run with torch 2.13 and transformers 5.23.

Of each case: the stored bits of the weight and its scale, and the decoded float32 by transformers' own dequantisers;
of each case of Fp8Quantize, a float32 weight and the bits that it stores.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, _dequantize_fp8_weight

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
# name: shape, type of the weight, shape and type of the scale, block where it is ragged or there is none
CASES: dict[str, tuple[tuple[int, ...], torch.dtype, tuple[int, ...], torch.dtype, list[int] | str | None]] = {
    "block": ((19, 37), E4M3, (3, 3), torch.float32, [8, 16]),
    "block-e5m2": ((19, 37), E5M2, (3, 3), torch.float32, [8, 16]),
    "block-bf16": ((19, 38), E4M3, (3, 3), torch.bfloat16, [8, 16]),
    "block-row": ((1, 37), E4M3, (1, 3), torch.float32, [8, 16]),
    "ue8m0": ((16, 32), E4M3, (2, 2), E8M0, "grid"),
    "mxfp8": ((9, 64), E4M3, (9, 2), torch.uint8, "grid"),
    "tensor": ((19, 37), E4M3, (), torch.float32, None),
    "tensor-bf16": ((19, 37), E4M3, (), torch.bfloat16, None),
    "channel": ((19, 37), E4M3, (19, 1), torch.float32, "grid"),
    "experts": ((3, 16, 32), E4M3, (3, 2, 2), torch.float32, "grid"),
    "experts-ragged": ((3, 10, 20), E4M3, (3, 2, 2), torch.float32, [8, 16]),
    "experts-halves": ((3, 10, 20), E4M3, (3, 2, 1), torch.float32, "grid"),
}


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    return tensor.view(torch.uint16 if tensor.element_size() == 2 else torch.uint8).numpy()


def scales(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    if dtype in (E8M0, torch.uint8):
        return torch.randint(0, 255, shape, generator=random, dtype=torch.uint8).view(dtype)
    return (torch.rand(shape, generator=random) * 0.01 + 1e-4).to(dtype)


def main() -> None:
    random = torch.Generator().manual_seed(7)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, (shape, dtype, scale_shape, scale_dtype, block) in CASES.items():
        codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        every = min(256, codes.numel())
        codes.view(-1)[:every] = torch.arange(256)[:every]
        weight, scale = codes.view(dtype), scales(scale_shape, scale_dtype, random)
        if block == "grid":
            decoded = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
        else:
            decoded = _dequantize_fp8_weight(weight, scale, block, torch.float32)
        arrays |= {f"{name}/weight": bits(weight), f"{name}/scale": bits(scale), f"{name}/decoded": decoded.numpy()}
    for name in ("float", "ue8m0"):
        config = SimpleNamespace(weight_block_size=[8, 16], scale_fmt=name)
        weight = torch.randn((24, 48), generator=random)
        weight[:8, :16] = 0
        made = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("q.weight", weight)
        arrays |= {f"quantize-{name}/values": weight.numpy(), f"quantize-{name}/weight": bits(made["q.weight"])}
        arrays[f"quantize-{name}/scale"] = bits(made["q.weight_scale_inv"])
    np.savez_compressed(Path(__file__).with_name("fp8.npz"), **arrays)


if __name__ == "__main__":
    main()
