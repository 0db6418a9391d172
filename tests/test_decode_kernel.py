"""Compiled decoding and float32 results: the bytes of the numpy paths, of the formats, and of exact sums."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from build import write_adapter, write_model
from inlay import Quant, make_plan, run_plan
from inlay.checkpoints.decoded import parts_of as parts_suffixes
from inlay.codecs import bnb4, compiled, fp8, gptq, mxfp4
from inlay.codecs.encoding import encode_whole
from inlay.codecs.table import codec
from inlay.dtypes import BF16, DTYPES, F16, F32, decode, round_nearest
from inlay.plan import memory
from inlay.run.survival import Survival, Survived
from inlay.tuners import kernel
from oracle import exact_sum, header, round_exactly

pytestmark = pytest.mark.skipif(not compiled.available() or not kernel.available(), reason="no C compiler was here")
BF16_ARRAY = np.dtype(ml_dtypes.bfloat16)
ARRAYS = {"BF16": BF16_ARRAY, "F16": np.dtype("<f2"), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
ALL_KEPT = Survived((), Survival(None, 0, 0.0, 0.0, 1.0), True, False)
Case = tuple[ModuleType, tuple[int, ...], dict[str, Any]]

CASES: dict[str, Case] = {
    "nf4": (bnb4, (40, 96), {}),
    "nf4, odd rows": (bnb4, (33, 45), {"double_quant": False, "blocksize": 32}),
    "fp4 as bfloat16": (bnb4, (24, 70), {"quant_type": "fp4", "storage": "bfloat16"}),
    "gptq": (gptq, (64, 256), {}),
    "gptq, zeros": (gptq, (32, 96), {"sym": False, "group_size": 32, "scale": "F32"}),
    "gptq, one group": (gptq, (96, 160), {"group_size": -1, "scale": "BF16"}),
    "fp8 blocks": (fp8, (150, 200), {}),
    "fp8 powers": (fp8, (40, 64), {"weight_block_size": [8, 24], "scale_fmt": "ue8m0"}),
    "fp8 channels": (fp8, (9, 33), {"strategy": "channel"}),
    "fp8 tensor": (fp8, (9, 33), {"strategy": "tensor"}),
    "fp8 experts": (fp8, (3, 20, 40), {"weight_block_size": [16, 16]}),
    "mxfp4": (mxfp4, (3, 64, 70), {}),
}


def parts_of(case: Case, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and parts of a weight: encoded, and then with codes from all of their range."""
    form, shape, options = case
    settings, rng = form.fresh(shape, options), np.random.default_rng(seed)
    weight = rng.normal(0, 0.05, (int(np.prod(shape[:-1])), shape[-1])).astype(np.float32)
    parts = encode_whole(form, settings, lambda: [(0, weight)])
    codes = next(iter(form.PARTS))
    raw = rng.integers(0, 256, parts[codes].nbytes, np.uint8)
    parts[codes] = raw.view(parts[codes].dtype).reshape(parts[codes].shape)
    if form is gptq:
        parts["qzeros"] = rng.integers(-(2**31), 2**31, parts["qzeros"].shape).astype(np.int32)
    return settings, parts


def cut(form: ModuleType, parts: dict[str, Any], settings: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    spans = form.spans(settings, first, last)
    return {
        name: parts[name] if span is None else parts[name][(slice(None),) * span[0] + (slice(span[1], span[2]),)]
        for name, span in spans.items()
    }


@pytest.mark.parametrize(
    ("name", "zeros"),
    [(name, zeros) for name in CASES for zeros in (("plain", "field", "word") if name[:4] == "gptq" else (None,))],
)
def test_the_kernel_gives_the_bytes_of_numpy_wherever_it_is_cut(name: str, zeros: str | None) -> None:
    form = CASES[name][0]
    settings, parts = parts_of(CASES[name])
    if zeros is not None:
        settings["zeros"] = zeros
    assert form.by_kernel(settings)
    rows = int(np.prod(settings["shape"][:-1]))
    rng = np.random.default_rng(1)
    for cuts in ([0, rows], sorted({0, rows, *rng.integers(1, rows, 6).tolist()})):
        for first, last in pairwise(cuts):
            slices = cut(form, parts, settings, first, last)
            wanted = form.decode(slices, settings, first, last)
            found = np.full(wanted.shape, -7, np.float32)
            form.decode_into(slices, settings, first, last, found)
            same = (found.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(found) & np.isnan(wanted))
            assert same.all(), (first, last, np.argwhere(~same)[:3])


def test_every_code_of_e4m3_is_that_of_the_format() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    out = np.empty((1, 256), np.float32)
    compiled.e4m3(codes, np.ones((1, 1), np.float32), 256, out)
    wanted = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(out, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(wanted))


def test_every_code_and_exponent_of_mxfp4_is_that_of_the_format() -> None:
    codes = np.arange(16, dtype=np.uint8)
    blocks = np.tile(codes[::2] | codes[1::2] << 4, 2).reshape(1, 1, 16).repeat(256, axis=0)
    scales = np.arange(256, dtype=np.uint8).reshape(256, 1)
    out = np.empty((32, 256), np.float32)
    compiled.mxfp4(blocks, scales, 0, 32, out)
    values = np.tile(codes, 2).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = np.outer(values, scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[:, 0]).astype(np.float32)
    assert np.array_equal(out, wanted, equal_nan=True)
    signs = ~np.isnan(wanted)
    assert np.array_equal(np.signbit(out)[signs], np.signbit(wanted)[signs])


def test_a_product_and_a_sum_are_rounded_one_after_the_other() -> None:
    """Of nested absmax, in values for which a fused multiply-add gives another sum."""
    rng = np.random.default_rng(0)
    table, absmax = rng.normal(size=256).astype(np.float32), rng.normal(size=4).astype(np.float32)
    codes, offset = rng.integers(0, 256, 1000).astype(np.uint8), float(np.float32(0.1))
    found = compiled.nested(codes, table, absmax, 24, 256, offset)
    place = (np.arange(1000) + 24) // 256
    product = table[codes].astype(np.float64) * absmax[place]
    twice = product.astype(np.float32) + np.float32(offset)
    assert np.array_equal(found, twice)
    assert (twice != (product + np.float32(offset)).astype(np.float32)).any()


MODULES = {"model.layers.0.self_attn.q_proj": (64, 128), "model.layers.0.mlp.down_proj": (32, 96)}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("bnb4", {}),
    "fp4": ("bnb4", {"quant_type": "fp4", "double_quant": False, "blocksize": 32}),
    "gptq": ("gptq", {"group_size": 32, "sym": False}),
    "gptq-8": ("gptq", {"group_size": 32, "bits": 8}),
    "fp8": ("fp8", {"weight_block_size": [32, 32]}),
    "awq": ("awq", {"group_size": 32}),
    "int4": ("compressed_pack", {"group_size": 32}),
}


def write_base(folder: Path, name: str) -> Path:
    """Two linear layers in that form, and a norm."""
    file, options = BASES[name]
    form, rng, tensors = codec(file), np.random.default_rng(3), {"model.norm.weight": np.ones(128, BF16_ARRAY)}
    for module, shape in MODULES.items():
        weight = rng.normal(0, 0.1, shape).astype(np.float32)
        settings = form.fresh(shape, options)
        parts = encode_whole(form, settings, lambda weight=weight: [(0, weight)])
        stem = module if form.NAME_SUFFIX else module + ".weight"
        for part, (dtype, stored_shape) in form.layout(settings).items():
            array = np.ascontiguousarray(parts[part]).reshape(stored_shape)
            tensors[stem + parts_suffixes(form)[part]] = array.view(ARRAYS.get(dtype, array.dtype))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    return write_model(folder, tensors, config={**config, "quantization_config": form.config(settings, ["lm_head"])})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("quant", [Quant(), Quant(keep=True, scales="fresh")], ids=["floats", "codes"])
def test_bytes_do_not_depend_on_kernels_threads_and_blocks(
    name: str, quant: Quant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = write_base(tmp_path / "base", name), write_adapter(tmp_path / "adapter", MODULES)
    found = []
    for i, (on, workers, tile) in enumerate((("1", 1, 1 << 22), ("1", 3, 300), ("0", 2, 1 << 22), ("0", 1, 300))):
        monkeypatch.setenv("INLAY_KERNEL", on)
        for constant in ("KERNEL_TILE_BYTES", "FLOAT64_TILE_BYTES"):
            monkeypatch.setattr(memory, constant, tile)
        plan = make_plan(base, [adapter], quant=quant)
        run_plan(plan, tmp_path / str(i), workers=workers, survived=ALL_KEPT, accept_loss=True)
        found.append(bytes_of(tmp_path / str(i)))
    assert found[0] == found[1] == found[2] == found[3]


def experts(folder: Path) -> Path:
    """Two stacks of gpt-oss's experts."""
    tensors = {}
    for i, shape in enumerate([(2, 64, 40), (2, 32, 64)]):
        _, parts = parts_of((mxfp4, shape, {}), i)
        parts["scales"] = parts["scales"] % 4 + 120
        tensors |= {f"model.layers.{i}.mlp.experts.down_proj_{part}": array for part, array in parts.items()}
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "torch_dtype": "bfloat16"}
    return write_model(folder, tensors, config={**config, "quantization_config": mxfp4.config({}, [])})


@pytest.mark.parametrize("name", ["nf4", "gptq", "fp8", "mxfp4"])
def test_a_base_without_adapters_is_decoded_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that end within a row too."""
    base, found = experts(tmp_path / "base") if name == "mxfp4" else write_base(tmp_path / "base", name), []
    for i, (on, tile) in enumerate((("1", 1 << 22), ("1", 100), ("0", 1 << 22), ("0", 300))):
        monkeypatch.setenv("INLAY_KERNEL", on)
        monkeypatch.setattr(memory, "KERNEL_TILE_BYTES", tile)
        run_plan(make_plan(base, [], torch_dtype="bfloat16"), tmp_path / str(i), workers=1 + i % 2)
        found.append(bytes_of(tmp_path / str(i)))
    assert found[0] == found[1] == found[2] == found[3]
    places = header(next((tmp_path / "0").glob("*.safetensors")))
    assert all(place["dtype"] == "BF16" for key, place in places.items() if key != "__metadata__")


def stored(values: Any, dtype: Any) -> Any:
    return round_nearest(np.asarray(values, np.float64), dtype)


@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("rows", "cols", "rank"), [(7, 37, 5), (4, 16, 16), (1, 9, 1), (13, 70, 33)])
def test_a_float32_result_is_the_rounded_exact_sum(source: str, rows: int, cols: int, rank: int) -> None:
    rng, dtype = np.random.default_rng(rows * cols), DTYPES[source]
    raw = stored(rng.normal(0, 0.02, (rows, cols)), dtype)
    left, right = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((rows, rank), (rank, cols)))
    scale, out = np.full(rank, 0.7), np.empty((rows, cols), np.float32)
    result = kernel.merge(raw, dtype, left, kernel.Packed.of(right, scale), out, F32)
    total, shift = exact_sum(decode(raw, dtype), [(left.astype(np.float64), right.astype(np.float64), 0.7)])
    wanted = round_exactly(total, shift, "F32").astype(np.float32)
    decided = np.ones(out.size, bool)
    decided[result.open] = False
    assert result.finite and np.array_equal(out.reshape(-1)[decided], wanted.reshape(-1)[decided])
    assert result.open.size <= 1


def test_what_float64_cannot_decide_is_left_open() -> None:
    """A sum in the middle between two float32, one a hair above it, and one that cancels to zero."""
    step = 2.0**-24
    raw = np.array([[1.0, 1.0, -0.5]], np.float32)
    left = np.ones((1, 2), np.float32)
    right = np.array([[step, step, 0.5], [0.0, 2.0**-90, 0.0]], np.float32)
    out = np.empty((1, 3), np.float32)
    result = kernel.merge(raw, F32, left, kernel.Packed.of(right, np.ones(2)), out, F32)
    assert result.open.tolist() == [0, 1, 2]


@pytest.mark.parametrize("source", [F32, BF16, F16], ids=lambda d: d.name)
def test_a_zero_factor_keeps_the_sign_of_zero_and_infinities_are_reported(source: Any) -> None:
    raw = stored([[-0.0, 1.5, 3.0e-39 if source is F32 else 0.25] * 5] * 3, source)
    right = kernel.Packed.of(np.ones((2, 15), np.float32), np.ones(2))
    out = np.empty((3, 15), np.float32)
    result = kernel.merge(raw, source, np.zeros((3, 2), np.float32), right, out, F32)
    assert result.finite and result.open.size == 0
    assert np.array_equal(out.view(np.uint32), decode(raw, source).astype(np.float32).view(np.uint32))
    raw[1, 4] = stored([np.inf], source)[0]
    for left in (np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)):
        assert not kernel.merge(raw, source, left, right, out, F32).finite
    huge = np.full((3, 2), 3e38, np.float32)
    result = kernel.merge(np.zeros((3, 15), np.float32), F32, huge, right, out, F32)
    assert not result.finite
