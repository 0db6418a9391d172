"""Write bnb.npz: weights quantised and decoded by bitsandbytes 0.50.2 on the CPU.

Run with torch, numpy and bitsandbytes: `TORCHDYNAMO_DISABLE=1 python tests/golden/make_bnb.py`. For each case `NAME/…` there is the weight
as integers, to be multiplied by 2^−15, every stored part under its name in a checkpoint, and the decoded float32. Half-precision
nested statistics are what bitsandbytes saves after a forward pass on a CPU with AVX512-BF16.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

# name: shape, type, block size, nested dtype or None, storage
FOUR = {
    "nf4": ((12, 160), "nf4", 64, None, torch.uint8),
    "fp4": ((12, 160), "fp4", 64, None, torch.uint8),
    "nf4-ragged": ((7, 45), "nf4", 32, None, torch.uint8),
    "fp4-nested-ragged": ((7, 45), "fp4", 64, torch.float32, torch.uint8),
    "nf4-nested": ((17, 500), "nf4", 32, torch.float32, torch.uint8),
    "nf4-nested-bf16": ((16, 128), "nf4", 64, torch.bfloat16, torch.uint8),
    "fp4-nested-f16": ((16, 128), "fp4", 64, torch.float16, torch.uint8),
    "fp4-large-block": ((5, 1000), "fp4", 4096, None, torch.uint8),
    "nf4-row": ((1, 200), "nf4", 128, torch.float32, torch.uint8),
    "nf4-as-bf16": ((12, 160), "nf4", 64, torch.float32, torch.bfloat16),
    "fp4-as-f16": ((6, 90), "fp4", 64, None, torch.float16),
    "nf4-as-f32": ((6, 60), "nf4", 64, None, torch.float32),
}


def weight(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Normal values of many magnitudes; one stretch of zeros, longer than the smaller blocks.

    The last two lie so that fp4 gives a quotient and a product with the reciprocal other codes.
    """
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * 2000 * np.exp(random.standard_normal((shape[0], 1)) / 2)
    values.reshape(-1)[64:200] = 0
    values.reshape(-1)[-2:] = 32718, -27265
    return np.clip(np.rint(values), -32768, 32767).astype(np.int16)


def raw(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def decoded(codes: torch.Tensor, state: bnb.QuantState, shape: tuple[int, int]) -> np.ndarray:
    """By the kernel in plain torch; the public function, given the weight as one row, agrees but for the sign of a zero."""
    absmax = state.absmax
    if state.nested:
        absmax = (bnb.dequantize_blockwise(state.absmax, state.state2).add_(state.offset)).float()
    state.dtype, state.shape = torch.float32, torch.Size((1, shape[0] * shape[1]))
    values = bnb.dequantize_4bit(codes, state).numpy().reshape(shape)
    table = bnb.get_4bit_type(state.quant_type, device="cpu")
    plain = _dequantize_4bit_compute(
        codes.view(torch.uint8).reshape(-1), absmax, table, state.blocksize, shape, torch.float32
    )
    assert np.array_equal(values, plain.numpy())
    return plain.numpy()


def four(
    shape: tuple[int, int], kind: str, block: int, nested: torch.dtype | None, storage: torch.dtype, seed: int
) -> dict:
    integers = weight(shape, seed)
    values = torch.from_numpy(integers.astype(np.float32) / 32768)
    codes, state = bnb.quantize_4bit(
        values, blocksize=block, quant_type=kind, quant_storage=storage, compress_statistics=nested is torch.float32
    )
    if nested in (torch.bfloat16, torch.float16):
        absmax = state.absmax.to(nested)
        state.offset = absmax.float().mean()  # not rounded, so that it shows that the library rounds it when decoding
        state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset.to(nested), blocksize=256)
        state.nested = True
    state.dtype = torch.bfloat16
    parts = {f"weight.{name}": raw(part) for name, part in state.as_dict(packed=True).items()}
    found = {
        "integers": integers,
        "weight": raw(codes),
        **parts,
        "storage": np.array(str(storage).removeprefix("torch.")),
    }
    return {**found, "decoded": decoded(codes, state, shape)}


def eight() -> dict:
    """Ties to even, a row of zeros, and one where 127 / SCB in one rounding would give another code than in two."""
    integers = weight((24, 200), 99)
    integers[0] = np.arange(-100, 100) * 128 + 64
    integers[0, 0] = 127 * 128
    integers[1] = np.clip(integers[1], -9000, 9000)
    integers[1, :2] = 31225, 29381
    integers[2] = 0
    values = torch.from_numpy(integers.astype(np.float32) / 32768)
    codes, scales, _ = bnb.int8_vectorwise_quant(values)
    parts = {"weight": codes.numpy(), "SCB": scales.numpy(), "weight_format": np.zeros((), np.uint8)}
    return {"integers": integers, **parts, "decoded": bnb.int8_vectorwise_dequant(codes, scales).numpy()}


if __name__ == "__main__":
    cases = {name: four(*row, seed) for seed, (name, row) in enumerate(FOUR.items())}
    arrays = {f"{name}/{part}": array for name, case in cases.items() for part, array in case.items()}
    arrays |= {f"int8/{part}": array for part, array in eight().items()}
    np.savez_compressed(Path(__file__).parent / "bnb.npz", dynamic_map=bnb.create_dynamic_map().numpy(), **arrays)
