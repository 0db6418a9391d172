"""Write compressed.npz: small weights, compressed and decompressed by compressed-tensors 0.17.0 with torch 2.13.

Run with both installed: python tests/golden/make_compressed.py. Of each case the file has `config` (JSON), `weight`
(float32, what was compressed), the parts and their types, `decoded` and its type. A 16-bit or 8-bit float is its bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.helpers import maybe_pad_tensor_for_block_quant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64",
    torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
E4M3 = torch.float8_e4m3fn

# name -> format, shape, type of scales, arguments of weights
CASES: dict[str, tuple[str, tuple[int, int], torch.dtype, dict[str, Any]]] = {
    "pack4": (PACK, (24, 64), BF16, {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "pack4-f32": (PACK, (24, 64), F32, {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "pack4-asym": (PACK, (20, 64), F32, {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}),
    "pack4-asym-bf16": (PACK, (20, 32), BF16, {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}),
    "pack4-ragged": (PACK, (5, 44), F16, {"num_bits": 4, "strategy": "channel"}),
    "pack4-order": (PACK, (8, 64), F16, {"num_bits": 4, "strategy": "group", "group_size": 16, "actorder": "group"}),
    "pack4-order-asym": (
        PACK, (9, 64), F32,
        {"num_bits": 4, "strategy": "group", "group_size": 16, "actorder": "group", "symmetric": False},
    ),
    "pack4-tensor-asym": (PACK, (6, 16), F32, {"num_bits": 4, "strategy": "tensor", "symmetric": False}),
    "pack8": (PACK, (12, 32), F16, {"num_bits": 8, "strategy": "channel"}),
    "pack8-asym": (PACK, (7, 30), F32, {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "pack2": (PACK, (10, 40), BF16, {"num_bits": 2, "strategy": "group", "group_size": 8}),
    "pack2-asym": (PACK, (18, 40), F32, {"num_bits": 2, "strategy": "group", "group_size": 8, "symmetric": False}),
    "pack4-one-row": (PACK, (1, 16), BF16, {"num_bits": 4, "strategy": "group", "group_size": 8}),
    "int8-channel": (INT, (12, 32), BF16, {"num_bits": 8, "strategy": "channel"}),
    "int8-asym": (INT, (12, 32), F32, {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8-tensor": (INT, (12, 32), F32, {"num_bits": 8, "strategy": "tensor"}),
    "int8-tensor-asym": (INT, (12, 32), F32, {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
    "int8-group": (INT, (6, 32), F16, {"num_bits": 8, "strategy": "group", "group_size": 8}),
    "int4-naive": ("naive-quantized", (6, 32), BF16, {"num_bits": 4, "strategy": "channel"}),
    "fp8-channel": (FLOAT, (12, 33), BF16, {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-tensor": (FLOAT, (12, 32), F32, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-group": (FLOAT, (6, 32), F16, {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16}),
    "fp8-block": (FLOAT, (32, 48), BF16, {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}),
    "fp8-block-ragged": (
        FLOAT, (40, 40), F32, {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    ),
    "mxfp8": (
        "mxfp8-quantized", (5, 64), F32,
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized", (5, 64), F32,
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized", (5, 64), F32,
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
}  # fmt: skip


def grouped(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """The weight with what shares a scale on its last axis."""
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "channel":
        return weight.unsqueeze(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return blocks.transpose(1, 2).flatten(2)
    return weight.unflatten(1, (-1, args.group_size))


def compressed(name: str) -> dict[str, Any]:
    """The parts of a case, and what the library reads from them."""
    form, shape, dtype, raw = CASES[name]
    args = QuantizationArgs(**raw)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, quantization_status="compressed")
    torch.manual_seed(sorted(CASES).index(name))
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).bfloat16().float()
    if args.symmetric and args.strategy != "block":  # of a group without a range, the library's zero point is a NaN
        weight[0, : args.group_size or shape[1]] = 0
    state = {"weight": weight}
    arranged = weight
    if raw.get("actorder"):
        state["weight_g_idx"] = torch.randperm(shape[1], dtype=torch.int32) // args.group_size
        arranged = weight[:, torch.argsort(state["weight_g_idx"], stable=True)]
    groups = grouped(arranged, args)
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    low, high = groups.amin(-1), groups.amax(-1)
    if args.symmetric:  # as for a model of this type, of which a scale of 0 is replaced by its epsilon
        low, high = low.to(dtype), high.to(dtype)
    scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    state |= {"weight_scale": scale.to(dtype), "weight_zero_point": zero.to(torch.int8)}
    if args.symmetric:
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress(state, scheme)
    if args.strategy == "block":  # decompress would guess the block from the shapes, wrongly where they are ragged
        decoded = dequantize(parts["weight"], parts["weight_scale"], args=args)
    else:
        decoded = compressor.decompress(parts, scheme)["weight"]
    return {"config": config.model_dump(mode="json"), "weight": weight, "parts": parts, "decoded": decoded}


def modelopt() -> dict[str, Any]:
    """NVFP4 as ModelOpt stores it, through the library's converter, which inverts the scale of the tensor."""
    case = compressed("nvfp4")
    second = 1 / case["parts"]["weight_global_scale"].reshape(())
    parts = {"weight": case["parts"]["weight_packed"], "weight_scale": case["parts"]["weight_scale"],
             "weight_scale_2": second}  # fmt: skip
    stored = {f"m.{key}": value for key, value in parts.items()}
    converted = ModelOptNvfp4Converter(targets=["re:m"]).process(dict(stored))
    # Its one axis keeps torch from dividing in bfloat16, which it does by a tensor without axes.
    converted["m.weight_global_scale"] = converted["m.weight_global_scale"].reshape(1)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**CASES["nvfp4"][3]))
    decoded = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(
        {key.removeprefix("m."): value for key, value in converted.items()}, scheme
    )["weight"]
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return {"config": config, "weight": case["weight"], "parts": parts, "decoded": decoded}


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """As stored."""
    as_integer = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    tensor = tensor.detach().contiguous()
    return (tensor.view(as_integer[tensor.dtype]) if tensor.dtype in as_integer else tensor).numpy()


def main() -> None:
    """Write the file beside this one."""
    arrays: dict[str, Any] = {}
    for name, case in {**{name: compressed(name) for name in CASES}, "modelopt-nvfp4": modelopt()}.items():
        arrays[f"{name}/config"] = np.array(json.dumps(case["config"]))
        arrays[f"{name}/weight"] = bits(case["weight"])
        types = {part: NAMES[tensor.dtype] for part, tensor in case["parts"].items()}
        arrays[f"{name}/types"] = np.array(json.dumps({**types, "decoded": NAMES[case["decoded"].dtype]}))
        for part, tensor in {**case["parts"], "decoded": case["decoded"]}.items():
            arrays[f"{name}/part/{part}"] = bits(tensor)
    np.savez_compressed(Path(__file__).with_name("compressed.npz"), **arrays)


if __name__ == "__main__":
    main()
