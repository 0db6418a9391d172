"""Writes awq.npz: small AWQ weights packed by the libraries that own the format, and read by them where they can.

    python tests/golden/make_awq.py        with torch 2.13.0 (CPU), gptqmodel 7.6.0; AutoAWQ 0.2.9 (sources) on the path

Of each case: the stored parts, `weight` in float32, and `config`, the fields of quantization_config, as JSON.
`weight` is what `dequantize_gemm` gives with float32 scales; gemv has no reader without a GPU, so it is the weight
that was packed, (code − zero) · scale, which lies on the grid.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

# name: version, group_size, zero_point, columns
CASES = {
    "gemm": ("gemm", 16, True, 32),
    "gemm-sym": ("gemm", 16, False, 32),
    "gemm-one-group": ("gemm", -1, True, 32),
    "gemv-32": ("gemv", 32, True, 96),
    "gemv-64": ("gemv", 64, True, 128),
    "gemv-128": ("gemv", 128, True, 256),
}
ROWS = {"gemm": 32, "gemv": 8}
RANDOM = np.random.default_rng(6)


def case(version: str, size: int, zero_point: bool, columns: int) -> dict[str, np.ndarray]:
    actual = columns if size == -1 else size
    rows = ROWS[version]
    shape = (rows, columns // actual)
    codes = torch.from_numpy(RANDOM.integers(0, 16, (rows, columns)))
    zeros = torch.from_numpy(RANDOM.integers(0, 16, shape)) if zero_point else torch.full(shape, 8)
    scales = torch.from_numpy(RANDOM.uniform(0.001, 0.02, shape)).half().float()
    index = torch.arange(columns) // actual
    layer = torch.nn.Linear(columns, rows, bias=False)
    layer.weight.data = (codes - zeros[:, index]).float() * scales[:, index]
    if version == "gemm":
        made = WQLinear_GEMM.from_linear(layer, 4, actual, False, scales.T.contiguous(), zeros.T.contiguous().float())
        weight = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, actual).T.contiguous()
        assert torch.equal(weight, layer.weight.data)
    else:
        made = WQLinear_GEMV.from_linear(layer, 4, actual, False, scales, zeros.float())
        weight = layer.weight.data
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version, "zero_point": zero_point}
    return {
        "qweight": made.qweight.numpy(),
        "qzeros": made.qzeros.numpy(),
        "scales": made.scales.numpy().view(np.uint16),
        "weight": weight.numpy(),
        "config": np.array(json.dumps(config)),
    }


if __name__ == "__main__":
    made = {name: case(*arguments) for name, arguments in CASES.items()}
    flat = {f"{name}/{part}": array for name, parts in made.items() for part, array in parts.items()}
    np.savez_compressed(Path(__file__).with_name("awq.npz"), **flat)
