"""Write hqq.npz: weights quantised by hqq 0.2.8, and decoded by it in float32.

Run with torch, numpy and hqq: `python tests/golden/make_hqq.py`. For each case `NAME/…` there is the weight as
integers, to be multiplied by 2^−15, every tensor of HQQLinear.state_dict but the bias, as bits, and the decoded float32.
"""

from pathlib import Path

import numpy as np
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

CASES = {
    "4bit": ((12, 64), {"nbits": 4, "group_size": 32, "axis": 1}, torch.bfloat16),
    "4bit-across": ((12, 64), {"nbits": 4, "group_size": 48, "axis": 1}, torch.float16),
    "4bit-columns": ((12, 64), {"nbits": 4, "group_size": 32, "axis": 0}, torch.bfloat16),
    "8bit": ((9, 40), {"nbits": 8, "group_size": None, "axis": 1}, torch.float32),
    "8bit-columns": ((9, 40), {"nbits": 8, "group_size": 24, "axis": 0}, torch.bfloat16),
    "6bit": ((9, 40), {"nbits": 6, "group_size": 40, "axis": 1}, torch.bfloat16),
    "3bit": ((13, 48), {"nbits": 3, "group_size": 24, "axis": 1}, torch.bfloat16),
    "3bit-columns": ((8, 48), {"nbits": 3, "group_size": 64, "axis": 0}, torch.bfloat16),
    "2bit": ((12, 64), {"nbits": 2, "group_size": 16, "axis": 1}, torch.float32),
    "1bit": ((16, 32), {"nbits": 1, "group_size": 32, "axis": 1}, torch.bfloat16),
    "4bit-as-float": ((12, 64), {"nbits": 4, "group_size": 32, "axis": 1, "view_as_float": True}, torch.bfloat16),
    "4bit-plain": ((12, 64), {"nbits": 4, "group_size": 32, "axis": 1}, torch.float32),
    "8bit-plain": ((12, 64), {"nbits": 8, "group_size": 32, "axis": 1}, torch.float32),
    "3bit-as-float": ((10, 48), {"nbits": 3, "group_size": 24, "axis": 1, "view_as_float": True}, torch.float16),
}


def raw(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def case(name: str, shape: tuple[int, int], how: dict, dtype: torch.dtype, seed: int) -> dict[str, np.ndarray]:
    """Two groups have so narrow a range that the library takes another scale. Plain cases have no search for zeros."""
    integers = np.clip(np.random.default_rng(seed).standard_normal(shape) * 1500, -32768, 32767).astype(np.int16)
    integers[3, :32], integers[4, :32] = 900 + np.arange(32) % 3, -900 - np.arange(32) % 6
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = torch.from_numpy(integers.astype(np.float32) / 32768)
    config = BaseQuantizeConfig(**how)
    config["weight_quant_params"]["optimize"] = "plain" not in name
    layer = HQQLinear(layer, config, compute_dtype=dtype, device="cpu")
    exact = {name: value.float() if name in ("scale", "zero") else value for name, value in layer.meta.items()}
    values = Quantizer.dequantize(layer.W_q, {**exact, "compute_dtype": torch.float32})
    parts = {name: raw(value.data) for name, value in layer.state_dict().items()}
    names = {"dtype": np.array(str(dtype).removeprefix("torch."))}
    return {"integers": integers, **parts, **names, "decoded": values.numpy()}


if __name__ == "__main__":
    cases = {name: case(name, *row, seed) for seed, (name, row) in enumerate(CASES.items())}
    arrays = {f"{name}/{part}": array for name, found in cases.items() for part, array in found.items()}
    np.savez_compressed(Path(__file__).parent / "hqq.npz", **arrays)
