"""GPTQ: against gptqmodel and auto-round (golden/gptq.npz), the laws of a codec, its traps, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from inlay.checkpoints.header import read_header
from inlay.codecs import gptq, packing
from inlay.dtypes import DTYPES, decode, decode32

GOLDEN = Path(__file__).parent / "golden"
REAL = Path(__file__).parents[2] / "shared" / "data" / "quantised"  # beside the repository, where there are any
Parts = dict[str, Any]


def golden(file: str) -> dict[str, tuple[dict[str, Any], Parts, Any]]:
    """Config, parts and weight of each case."""
    cases: dict[str, Parts] = {}
    with np.load(GOLDEN / file) as arrays:
        for key in arrays.files:
            name, part = key.split("/")
            cases.setdefault(name, {})[part] = arrays[key]
    return {n: (json.loads(str(p.pop("config"))), p, p.pop("weight")) for n, p in cases.items()}


def found(parts: Parts, scale: str = "F16") -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (scale if name == "scales" else "I32", part.shape) for name, part in parts.items()}


def cut(codec: ModuleType, parts: Parts, settings: Mapping[str, Any], first: int, last: int) -> Parts:
    """What `spans` names, as a reader gives it."""
    slices = {}
    for name, span in codec.spans(settings, first, last).items():
        axis, begin, end = span or (0, 0, len(parts[name]))
        slices[name] = np.ascontiguousarray(parts[name].take(range(begin, end), axis))
    return slices


def decoded(codec: ModuleType, parts: Parts, settings: Mapping[str, Any], cuts: Any = None) -> Any:
    cuts = (0, settings["shape"][0]) if cuts is None else cuts
    blocks = [codec.decode(cut(codec, parts, settings, a, b), settings, a, b) for a, b in pairwise(cuts)]
    assert all(block.dtype == np.float32 and block.flags.c_contiguous for block in blocks)
    return np.concatenate(blocks)


def encoded(codec: ModuleType, weight: Any, settings: Mapping[str, Any], known: Parts, cuts: Any = None) -> Parts:
    """All blocks put together at the places that `spans` names."""
    made = {}
    for name, (dtype, shape) in codec.layout(settings).items():
        made[name] = np.zeros(shape, DTYPES[dtype].raw)
    for first, last in pairwise((0, len(weight)) if cuts is None else cuts):
        kept = {n: p for n, p in cut(codec, {**made, **known}, settings, first, last).items() if n in known}
        block = codec.encode(weight[first:last], settings, first, kept)
        for name, span in codec.spans(settings, first, last).items():
            axis, begin, end = span or (0, 0, len(made[name]))
            made[name][(slice(None),) * axis + (slice(begin, end),)] = block[name]
    return made


def same(a: Parts, b: Parts) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def steps(codec: ModuleType, parts: Parts, settings: Mapping[str, Any]) -> Any:
    """The stored scale of each value, float64."""
    scales = decode(parts["scales"], DTYPES[settings["scale"]])
    columns, size = settings["shape"][1], codec._size(settings)
    index = parts.get("g_idx", np.arange(columns) // size)
    return scales[:, index] if settings.get("version") == "gemv" else scales.T[:, index]


CASES = golden("gptq.npz")
every_case = pytest.mark.parametrize("name", CASES)


def read_case(name: str) -> tuple[dict[str, Any], Parts, Any]:
    config, parts, weight = CASES[name]
    return gptq.settings(config, "m", found(parts), parts.__getitem__), parts, weight


@every_case
def test_weights_are_those_that_the_library_reads(name: str) -> None:
    settings, parts, weight = read_case(name)
    assert settings["shape"] == list(weight.shape)
    assert np.array_equal(decoded(gptq, parts, settings), weight)
    assert np.array_equal(decoded(gptq, parts, json.loads(json.dumps(settings))), weight)


@every_case
def test_layout_is_what_was_found(name: str) -> None:
    settings, parts, _ = read_case(name)
    assert gptq.layout(settings) == found(parts)
    assert set(gptq.PARTS) <= set(parts)


@every_case
def test_rows_do_not_depend_on_the_cut(name: str) -> None:
    settings, parts, weight = read_case(name)
    for cuts in (range(33), (0, 3, 17, 32), (0, 31, 32)):
        assert np.array_equal(decoded(gptq, parts, settings, cuts), weight)


@every_case
def test_stored_scales_give_the_same_codes(name: str) -> None:
    settings, parts, weight = read_case(name)
    known = {part: parts[part] for part in parts if part != "qweight"}
    assert same(encoded(gptq, weight, settings, known), parts)
    rows = gptq.align(settings)
    assert same(encoded(gptq, weight, settings, known, (*range(0, 32, rows), 32)), parts)


@every_case
def test_the_nearest_code_is_taken(name: str) -> None:
    settings, parts, weight = read_case(name)
    known = {part: parts[part] for part in parts if part != "qweight"}
    step = steps(gptq, parts, settings)
    moved = (weight + np.random.default_rng(3).uniform(-2, 2, weight.shape) * step).astype(np.float32)
    got = decoded(gptq, encoded(gptq, moved, settings, known), settings)
    bits, best = settings["bits"], np.full(weight.shape, np.inf)
    for code in range(2**bits):
        every = packing.pack(np.full((32, settings["shape"][1]), code, np.uint8), bits).T
        value = decoded(gptq, {**parts, "qweight": np.ascontiguousarray(every)}, settings)
        best = np.minimum(best, abs(value.astype(np.float64) - moved))
    # Both neighbours of a value are rounded to float32, of at most 2^8 steps.
    assert (abs(got.astype(np.float64) - moved) <= best + step * 2.0**-15).all()


FRESH = [
    pytest.param({"bits": bits, "sym": sym, "scale": scale, "group_size": size, "zeros": zeros}, id=f"{bits}-{sym}-{scale}-{size}-{zeros}")
    for bits, sym, scale, size, zeros in (
        (4, True, "F16", 32, "field"), (4, False, "F16", 32, "field"), (4, False, "BF16", 32, "plain"),
        (4, False, "F32", -1, "word"), (2, True, "BF16", 48, "plain"), (2, False, "F16", 48, "word"),
        (3, True, "F16", 32, "field"), (3, False, "F16", 40, "field"), (8, True, "F32", 32, "field"),
        (8, False, "BF16", 7, "word"),
    )
]  # fmt: skip


def rough(rows: int, columns: int) -> Any:
    """Ordinary rows, and rows of one sign, of zeros, of tiny and of large values."""
    weight = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32) * np.float32(0.03)
    weight[0], weight[-1] = abs(weight[0]) + np.float32(0.01), -abs(weight[-1]) - np.float32(0.01)
    if rows > 5:
        weight[1] = weight[2, ::3] = 0
        weight[3:5] *= np.array([[1e-6], [1e6]], np.float32)
    return weight


@pytest.mark.parametrize("fields", FRESH)
@pytest.mark.parametrize("shape", [(64, 96), (37, 64), (1, 32)], ids=str)
@pytest.mark.parametrize("order", ["none", "regular", "given"])
def test_new_scales_err_by_half_a_step(fields: dict[str, Any], shape: tuple[int, int], order: str) -> None:
    settings = {**fields, "shape": list(shape), "order": order, "desc_act": order == "given", "format": "gptq"}
    weight, size = rough(*shape), gptq._size(settings)
    index = np.arange(shape[1], dtype=np.int32) // size
    known = {"g_idx": np.random.default_rng(1).permutation(index)} if order == "given" else {}
    parts = encoded(gptq, weight, settings, known)
    assert found(parts, fields["scale"]) == gptq.layout(settings)
    if order != "none":
        assert np.array_equal(parts["g_idx"], known.get("g_idx", index))
    error = abs(decoded(gptq, parts, settings).astype(np.float64) - weight)
    assert (error <= steps(gptq, parts, settings) / 2 * (1 + 2.0**-14)).all()  # and rounding, of up to 2^8 steps
    rows = gptq.align(settings)
    cuts = sorted({*range(0, shape[0], rows), shape[0]})
    assert same(encoded(gptq, weight, settings, known, cuts), parts)
    assert np.array_equal(decoded(gptq, parts, settings, range(shape[0] + 1)), decoded(gptq, parts, settings))


@pytest.mark.parametrize("bits", packing.BITS)
def test_packing_is_one_stream_of_bits(bits: int) -> None:
    for count in (1, 5, 31, 32, 33, 100):
        codes = np.random.default_rng(count).integers(0, 2**bits, (3, count), dtype=np.uint8)
        words = packing.pack(codes, bits)
        stream = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
        assert [int.from_bytes(row.tobytes(), "little") for row in np.ascontiguousarray(words)] == stream
        assert np.array_equal(packing.unpack(words, bits, count), codes)


CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False}


def plain(zero_words: list[int], scale: float = 1.0) -> Parts:
    """8 rows of 8 columns, all codes 0, so that the weight is minus the zero points."""
    words = np.array([zero_words], np.uint32).view(np.int32)
    return {
        "qweight": np.zeros((1, 8), np.int32),
        "qzeros": words,
        "scales": np.full((1, 8), scale, np.float16).view(np.uint16),
    }


@pytest.mark.parametrize(
    ("fields", "words", "zeros"),
    [
        ({}, 0x76543210, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"checkpoint_format": "gptq_v2"}, 0x76543210, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({}, 0xFFFFFF3F, [0, 4, 0, 0, 0, 0, 0, 0]),  # AutoGPTQ: each by itself
        ({"meta": {"quantizer": ["gptqmodel:1.0"]}}, 0xFFFFFF3F, [0, 5, 0, 1, 1, 1, 1, 1]),  # the sum carries
        ({"meta": {"quantizer": "gptqmodel:1.0"}}, 0x76543210, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"sym": True}, 0x77777777, [8] * 8),
        ({"sym": True}, 0x88888888, [8] * 8),  # called v1, stored as v2
        ({"sym": True}, 0x88888887, [8, 9, 9, 9, 9, 9, 9, 9]),  # not all of them: as declared
        ({"sym": False}, 0x88888888, [9] * 8),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, 0x76543210, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"quant_method": "auto-round"}, 0x76543210, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)  # fmt: skip
def test_zero_points_are_read_as_they_were_written(fields: Mapping[str, Any], words: int, zeros: list[int]) -> None:
    parts = plain([words])
    settings = gptq.settings({**CONFIG, **fields}, "m", found(parts), parts.__getitem__)
    assert decoded(gptq, parts, settings).tolist() == [[-float(zero)] * 8 for zero in zeros]


def test_new_zero_points_of_v1_read_alike_by_word_and_by_field() -> None:
    settings = {**CONFIG, "shape": [64, 96], "group_size": 32, "scale": "F16", "zeros": "word", "order": "none"}
    parts = encoded(gptq, rough(64, 96), settings, {})
    assert np.array_equal(decoded(gptq, parts, settings), decoded(gptq, parts, {**settings, "zeros": "field"}))


def test_a_scale_of_zero_is_kept() -> None:
    parts = plain([0x76543210], 0.0)
    settings = gptq.settings(CONFIG, "m", found(parts), parts.__getitem__)
    again = encoded(gptq, decoded(gptq, parts, settings), settings, {n: parts[n] for n in ("qzeros", "scales")})
    assert not decoded(gptq, again, settings).any()


def test_a_scale_that_is_not_finite_shows_in_the_weight() -> None:
    parts = plain([0xF7777777], np.inf)  # zero points 8, and 0 in the last row: 0 times Inf
    weight = decoded(gptq, parts, gptq.settings(CONFIG, "m", found(parts), parts.__getitem__))
    assert np.isneginf(weight[:7]).all()
    assert np.isnan(weight[7]).all()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", packing.BITS)
def test_a_new_checkpoint_is_read_back(bits: int, sym: bool) -> None:
    settings = gptq.fresh((64, 96), {"bits": bits, "sym": sym, "group_size": 32})
    parts = encoded(gptq, rough(64, 96), settings, {})
    config = json.loads(json.dumps(gptq.config(settings, ["lm_head", "model.a-b"])))
    again = gptq.settings(config, "model.up", found(parts), parts.__getitem__)
    assert again == {**settings, "zeros": again["zeros"]}
    assert np.array_equal(decoded(gptq, parts, again), decoded(gptq, parts, settings))
    for module in ("lm_head", "model.a-b"):
        with pytest.raises(ValueError, match="excludes it"):
            gptq.settings(config, module, found(parts), parts.__getitem__)
    assert "dynamic" not in gptq.config(settings, [])


@pytest.mark.parametrize(
    "fields",
    [
        {"dynamic": {r"-:.*\.up": {}, r"+:.*\.1\.down": {"bits": 8, "group_size": 16}, ".*": {"bits": 2}}},
        {"dynamic": {r"m\.1\.down": {"bits": 8, "group_size": 16}}},
        {"quant_method": "auto-round", "extra_config": {"m.1.down": {"bits": 8, "group_size": 16}, "m": {"bits": 2}}},
        {"quant_method": "auto-round", "extra_config": {r"\.down$": {"bits": 8, "group_size": 16}}},
    ],
)
def test_a_module_may_have_settings_of_its_own(fields: dict[str, Any]) -> None:
    made = gptq.fresh((32, 32), {"bits": 8, "group_size": 16})
    shapes = gptq.layout({**made, "order": "none"})
    parts = {name: np.zeros(shape, DTYPES[dtype].raw) for name, (dtype, shape) in shapes.items()}
    settings = gptq.settings({**CONFIG, **fields}, "m.1.down", found(parts), parts.__getitem__)
    assert (settings["bits"], settings["group_size"]) == (8, 16)
    with pytest.raises(ValueError, match=r"excludes it|ask for"):
        gptq.settings({**CONFIG, **fields}, "m.1.up", found(parts), parts.__getitem__)


REFUSED = [
    ({"checkpoint_format": "gptq_p"}, "gptq_p layout"),
    ({"checkpoint_format": "marlin"}, "marlin layout"),
    ({"is_marlin_format": True}, "marlin layout"),
    ({"checkpoint_format": "bitblas"}, "bitblas layout"),
    ({"quant_method": "awq"}, "'awq' is not gptq"),
    ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "auto_round:auto_awq"),
    ({"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}, "llm_compressor"),
    ({"quant_method": "auto-round", "backend": "auto_round:exllamav2"}, "exllamav2"),
    ({"bits": 5}, "5 bits"),
    ({"bits": 8}, "qzeros of m has shape"),
    ({"pack_dtype": "int64"}, "packed in int64"),
    ({"group_size": 4}, "ask for"),
    ({"group_size": 0}, "neither"),
    ({"group_size": "128"}, "neither"),
    ({"desc_act": True}, "no g_idx"),
    ({"dynamic": {"-:m": {}}}, "excludes it"),
    ({"dynamic": {"(": {}}}, "no pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_other_layouts_are_refused(fields: Mapping[str, Any], message: str) -> None:
    parts = plain([0x77777777])
    with pytest.raises(ValueError, match=message):
        gptq.settings({**CONFIG, **fields}, "m", found(parts), parts.__getitem__)


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("qweight", ("I64", (1, 8)), "is I64, not I32"),
        ("scales", ("F64", (1, 8)), "not F16 or BF16 or F32"),
        ("scales", ("F16", (1, 1, 8)), "two axes"),
        ("qweight", ("I32", (0, 8)), "none empty"),
        ("scales", ("F16", (2, 8)), "ask for"),
        ("qzeros", ("I32", (1, 2)), "ask for"),
        ("g_idx", ("I32", (9,)), "ask for"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: str, other: tuple[str, tuple[int, ...]], message: str) -> None:
    parts = {**plain([0x77777777]), "g_idx": np.zeros(9, np.int32)}
    there = {**{n: f for n, f in found(parts).items() if n != "g_idx"}, part: other}
    with pytest.raises(ValueError, match=message):
        gptq.settings(CONFIG, "m", there, parts.__getitem__)


@pytest.mark.parametrize("group", [-1, 1])
def test_a_group_that_is_not_there_is_refused(group: int) -> None:
    parts = {**plain([0x77777777]), "g_idx": np.array([0, 0, 0, 0, 0, 0, 0, group], np.int32)}
    with pytest.raises(ValueError, match="g_idx of m names groups"):
        gptq.settings(CONFIG, "m", found(parts), parts.__getitem__)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((64, 96), {"group_size": 64}, "groups of 64"),
        ((60, 96), {"group_size": 32}, "words of 32"),
        ((64, 96, 1), {}, "no matrix"),
        ((64, 128), {"bits": 5}, "bits is 5"),
        ((64, 128), {"scale": "F64"}, "scale is 'F64'"),
        ((64, 128), {"desc_act": True}, "no such option: desc_act"),
    ],
)
def test_new_weights_that_no_engine_reads_are_refused(shape: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq.fresh(shape, options)


KEPT = {"scales": np.ones((3, 64), np.uint16), "qzeros": np.zeros((3, 8), np.int32)}


@pytest.mark.parametrize(
    ("change", "known", "message"),
    [
        ({"order": "given"}, {}, "g_idx of the base must be kept"),
        ({}, {"scales": np.ones((3, 64), np.uint16)}, "kept together"),
        ({"value": np.nan}, {}, "NaN or Inf"),
        ({"value": np.inf}, {}, "NaN or Inf"),
        ({"value": np.nan}, KEPT, "NaN or Inf"),
        ({"value": 1e6}, {}, "beyond F16"),
        ({}, {**KEPT, "scales": np.full((3, 64), 0x7C00, np.uint16)}, "stored scale is NaN"),
    ],
)
def test_what_cannot_be_encoded_is_refused(change: Any, known: Parts, message: str) -> None:
    settings = {**gptq.fresh((64, 96), {"group_size": 32}), **change}
    weight = rough(64, 96)
    weight[5, 5] = change.get("value", 0)
    with pytest.raises(ValueError, match=message):
        gptq.encode(weight, settings, 0, known)


def real(name: str) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Config, and dtype and bits of each tensor."""
    config = json.loads((REAL / name / "config.json").read_text())
    header = read_header(REAL / name / "model.safetensors")
    data = (REAL / name / "model.safetensors").read_bytes()
    tensors = {}
    for entry in header.tensors:
        array = np.frombuffer(data[entry.start : entry.end], entry.dtype.raw).reshape(entry.shape)
        tensors[entry.key] = (entry.dtype.name, array)
    return config.get("quantization_config"), tensors


def check_real(codec: ModuleType, name: str) -> None:
    """Every module: layout, the same codes again, and near to the checkpoint that was quantised."""
    config, tensors = real(name)
    _, base = real("base-bf16")
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    assert modules
    for module in modules:
        there = {
            part: tensors[module + end]
            for part, end in (codec.PARTS | codec.OPTIONAL).items()
            if module + end in tensors
        }
        parts = {part: array for part, (_, array) in there.items()}
        settings = codec.settings(config, module, {p: (d, a.shape) for p, (d, a) in there.items()}, parts.__getitem__)
        assert codec.layout(settings) == {p: (d, a.shape) for p, (d, a) in there.items()}
        weight = decoded(codec, parts, settings)
        known = {part: parts[part] for part in parts if part != "qweight"}
        assert same(encoded(codec, weight, settings, known), parts)
        was = decode32(base[f"{module}.weight"][1], DTYPES[base[f"{module}.weight"][0]])
        assert abs(weight - was).mean() < 0.2 * abs(was).mean()


@pytest.mark.skipif(not REAL.exists(), reason="no real checkpoints here")
@pytest.mark.parametrize("name", ["gptq-int4", "gptq-int4-desc-act"])
def test_real_checkpoints_are_read(name: str) -> None:
    check_real(gptq, name)
