"""Writes gptq.npz: small GPTQ weights packed and read by the libraries that own the format.

    python tests/golden/make_gptq.py        with torch 2.13.0 (CPU), gptqmodel 7.6.0, auto-round 0.16.1

Of each case: the stored parts, `weight` as the library reads it in float32 (an integer times a scale, rounded once),
and `config`, the fields of quantization_config, as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

# name: bits, group_size, sym, checkpoint_format, columns, desc_act
CASES = {
    "4-sym": (4, 16, True, "gptq", 32, False),
    "4-asym": (4, 16, False, "gptq", 32, False),
    "4-asym-v2": (4, 16, False, "gptq_v2", 32, False),
    "4-desc_act": (4, 16, False, "gptq", 32, True),
    "4-one-group": (4, -1, False, "gptq", 32, False),
    "4-ragged": (4, 16, False, "gptq", 40, False),
    "2-asym": (2, 16, False, "gptq", 32, False),
    "3-asym": (3, 16, False, "gptq", 32, False),
    "3-asym-v2": (3, 16, False, "gptq_v2", 32, False),
    "8-sym": (8, 16, True, "gptq", 32, False),
    "8-asym": (8, 16, False, "gptq", 32, False),
}
# name: bits, packing_format
AUTO_ROUND = {
    "4-auto_gptq": (4, "auto_round:auto_gptq"),
    "4-auto_round": (4, "auto_round"),
    "3-auto_gptq": (3, "auto_round:auto_gptq"),
}
ROWS = 32
RANDOM = np.random.default_rng(5)


def numbers(bits: int, columns: int, groups: int, sym: bool, least: int) -> tuple[torch.Tensor, ...]:
    """Codes (rows, columns), zero points and scales (rows, groups) of all values that there are."""
    codes = torch.from_numpy(RANDOM.integers(0, 2**bits, (ROWS, columns)))
    zeros = torch.from_numpy(RANDOM.integers(least, 2**bits, (ROWS, groups)))
    zeros[:2, :] = least
    if sym:
        zeros[:] = 2 ** (bits - 1)
    scales = torch.from_numpy(RANDOM.uniform(0.001, 0.02, (ROWS, groups))).half().float()
    return codes, zeros, scales


def linear(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> torch.nn.Linear:
    """A layer whose weight is exactly on the grid."""
    layer = torch.nn.Linear(codes.shape[1], ROWS, bias=False)
    layer.weight.data = (codes - zeros[:, index]).float() * scales[:, index]
    return layer


def gptqmodel(bits: int, size: int, sym: bool, form: str, columns: int, desc_act: bool) -> dict[str, np.ndarray]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    actual = columns if size == -1 else size
    groups = -(-columns // actual)
    index = torch.arange(columns) // actual
    if desc_act:
        index = index[torch.from_numpy(RANDOM.permutation(columns))]
    codes, zeros, scales = numbers(bits, columns, groups, sym, 0)

    def make() -> TorchLinear:
        return TorchLinear(bits, size, sym, desc_act, columns, ROWS)

    packed, read = make(), make()
    packed.pack_original(linear(codes, zeros, scales, index), scales, zeros, index.int())
    if form == "gptq":
        convert_gptq_v2_to_v1_format_module(packed, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    parts = {name: getattr(packed, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    for name, part in parts.items():
        read.register_buffer(name, part.float() if name == "scales" else part.clone())
    if form == "gptq":
        convert_gptq_v1_to_v2_format_module(read, bits, torch.int32)
    parts["weight"] = read.dequantize_weight().T.contiguous()
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, "desc_act": desc_act}
    config |= {"checkpoint_format": form, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    assert torch.equal(parts["weight"], linear(codes, zeros, scales, index).weight.data)
    return stored(parts, config)


def auto_round(bits: int, form: str) -> dict[str, np.ndarray]:
    if form == "auto_round":
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    index = torch.arange(32) // 16
    codes, zeros, scales = numbers(bits, 32, 2, False, int(form != "auto_round"))
    layer = QuantLinear(bits, 16, 32, ROWS, bias=False)
    layer.device = "cpu"  # as its exporter does
    layer.pack(linear(codes, zeros, scales, index), scales, zeros.clone(), None, device="cpu")
    parts = {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales")}
    layer.scales = layer.scales.float()
    parts["weight"] = layer(torch.eye(32)).T.contiguous()
    config = {"quant_method": "auto-round", "bits": bits, "group_size": 16, "sym": False, "packing_format": form}
    return stored(parts, config)


def stored(parts: dict[str, torch.Tensor], config: dict[str, object]) -> dict[str, np.ndarray]:
    arrays = {name: part.numpy() for name, part in parts.items()}
    arrays["scales"] = arrays["scales"].view(np.uint16)
    return {**arrays, "config": np.array(json.dumps(config))}


if __name__ == "__main__":
    made = {name: gptqmodel(*case) for name, case in CASES.items()}
    made |= {name: auto_round(*case) for name, case in AUTO_ROUND.items()}
    flat = {f"{name}/{part}": array for name, parts in made.items() for part, array in parts.items()}
    np.savez_compressed(Path(__file__).with_name("gptq.npz"), **flat)
