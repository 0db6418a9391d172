"""Writes mxfp4.npz: small experts of MXFP4 and what transformers makes of them. Run with torch 2.13, transformers 5.23.

Of each case: blocks, scales, and the decoded weight in float32 and, as its bits, in bfloat16. Scales are 0 … 254;
255 is NaN in the specification and 2^128 in transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

# name: blocks (experts, out, groups, 16), and the range of the scales
CASES = {
    "even": ((2, 6, 3, 16), (120, 130)),
    "odd": ((3, 5, 2, 16), (110, 140)),
    "one": ((1, 1, 1, 16), (127, 128)),
    "wide": ((2, 8, 2, 16), (0, 255)),
}


def main() -> None:
    random = torch.Generator().manual_seed(7)
    arrays = {}
    for name, (shape, (low, high)) in CASES.items():
        blocks = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        scales = torch.randint(low, high, shape[:-1], generator=random, dtype=torch.uint8)
        every = min(256, blocks.numel())
        blocks.view(-1)[:every] = torch.arange(256)[:every]
        arrays |= {f"{name}/blocks": blocks.numpy(), f"{name}/scales": scales.numpy()}
        arrays[f"{name}/float32"] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
        short = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        arrays[f"{name}/bfloat16"] = short.view(torch.uint16).numpy()
    np.savez_compressed(Path(__file__).with_name("mxfp4.npz"), **arrays)


if __name__ == "__main__":
    main()
