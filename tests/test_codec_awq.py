"""AWQ: against AutoAWQ and gptqmodel (golden/awq.npz), the laws of a codec, its traps, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from inlay.codecs import awq, packing
from test_codec_gptq import REAL, Parts, check_real, decoded, encoded, found, golden, rough, same, steps

CASES = golden("awq.npz")
every_case = pytest.mark.parametrize("name", CASES)
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def read_case(name: str) -> tuple[dict[str, Any], Parts, Any]:
    config, parts, weight = CASES[name]
    return awq.settings(config, "m", found(parts), parts.__getitem__), parts, weight


def kept(parts: Parts) -> Parts:
    return {part: parts[part] for part in ("qzeros", "scales")}


@every_case
def test_weights_are_those_that_the_library_reads(name: str) -> None:
    settings, parts, weight = read_case(name)
    assert settings["shape"] == list(weight.shape)
    assert np.array_equal(decoded(awq, parts, settings), weight)
    assert np.array_equal(decoded(awq, parts, json.loads(json.dumps(settings))), weight)


@every_case
def test_layout_is_what_was_found(name: str) -> None:
    settings, parts, _ = read_case(name)
    assert awq.layout(settings) == found(parts)
    assert set(awq.PARTS) == set(parts)


@every_case
def test_rows_do_not_depend_on_the_cut(name: str) -> None:
    settings, parts, weight = read_case(name)
    rows = len(weight)
    for cuts in (range(rows + 1), (0, 3, 7, rows), (0, 1, rows)):
        assert np.array_equal(decoded(awq, parts, settings, cuts), weight)


@every_case
def test_stored_scales_give_the_same_codes(name: str) -> None:
    settings, parts, weight = read_case(name)
    assert same(encoded(awq, weight, settings, kept(parts)), parts)
    assert same(encoded(awq, weight, settings, kept(parts), range(0, len(weight) + 1, awq.align(settings))), parts)


@every_case
def test_the_nearest_code_is_taken(name: str) -> None:
    settings, parts, weight = read_case(name)
    step = steps(awq, parts, settings)[:, : weight.shape[1]]
    moved = (weight + np.random.default_rng(3).uniform(-2, 2, weight.shape) * step).astype(np.float32)
    got = decoded(awq, encoded(awq, moved, settings, kept(parts)), settings)
    best = np.full(weight.shape, np.inf)
    for code in range(16):
        every = np.full_like(parts["qweight"], np.int64(code * 0x11111111).astype(np.int32))
        value = decoded(awq, {**parts, "qweight": every}, settings)
        best = np.minimum(best, abs(value.astype(np.float64) - moved))
    assert (abs(got.astype(np.float64) - moved) <= best + step * 2.0**-19).all()  # rounding, of up to 2^4 steps


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("size", "scale"), [(32, "F16"), (64, "BF16"), (-1, "F32")])
@pytest.mark.parametrize("rows", [64, 8])
def test_new_scales_err_by_half_a_step(version: str, zero_point: bool, size: int, scale: str, rows: int) -> None:
    settings = {"shape": [rows, 192], "bits": 4, "group_size": size, "version": version, "scale": scale}
    settings["zero_point"] = zero_point
    weight = rough(rows, 192)
    parts = encoded(awq, weight, settings, {})
    assert found(parts, scale) == awq.layout(settings)
    error = abs(decoded(awq, parts, settings).astype(np.float64) - weight)
    assert (error <= steps(awq, parts, settings) / 2 * (1 + 2.0**-18)).all()
    assert same(encoded(awq, weight, settings, {}, range(0, rows + 1, 8)), parts)
    config = awq.config(settings, [])
    assert awq.settings(json.loads(json.dumps(config)), "m", found(parts, scale), parts.__getitem__) == settings


def test_nibbles_of_a_word_are_rows_0_2_4_6_1_3_5_7() -> None:
    settings = {"shape": [8, 1], "bits": 4, "group_size": 1, "version": "gemm", "scale": "F16", "zero_point": True}
    one = np.ones((1, 8), np.float16).view(np.uint16)
    parts = {"qweight": np.array([[0x76543210]], np.int32), "qzeros": np.zeros((1, 1), np.int32), "scales": one}
    assert decoded(awq, parts, settings).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_zero_points_are_stored_as_they_are() -> None:
    settings = {"shape": [8, 1], "bits": 4, "group_size": 1, "version": "gemm", "scale": "F16", "zero_point": True}
    one = np.ones((1, 8), np.float16).view(np.uint16)
    parts = {"qweight": np.zeros((1, 1), np.int32), "qzeros": np.array([[0x76543210]], np.int32), "scales": one}
    assert decoded(awq, parts, settings).ravel().tolist() == [0, -4, -1, -5, -2, -6, -3, -7]


def test_a_symmetric_form_stores_eight() -> None:
    settings = awq.fresh((32, 64), {"zero_point": False, "group_size": 32})
    assert (encoded(awq, rough(32, 64), settings, {})["qzeros"].view(np.uint32) == 0x88888888).all()


def test_a_row_of_gemv_is_padded_with_scales_of_zero() -> None:
    settings = {"shape": [8, 96], "bits": 4, "group_size": 32, "version": "gemv", "scale": "F16", "zero_point": True}
    parts = encoded(awq, rough(8, 96), settings, {})
    assert parts["scales"].shape == (8, 32)
    assert not parts["scales"][:, 3:].any()
    assert not parts["qzeros"][:, 1:].any()


@pytest.mark.parametrize(
    "fields",
    [
        {"version": "GEMM"},
        {"version": None, "format": "gemm"},
        {"version": None},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        {"quant_method": "auto-round", "packing_format": "auto_round:awq", "extra_config": {"lm_head": {"bits": 16}}},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "extra_config": {"m": {"group_size": 32}}, "group_size": 64},
        {"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 32},
    ],
)  # fmt: skip
def test_configs_that_mean_gemm(fields: Mapping[str, Any]) -> None:
    made = awq.fresh((32, 64), {"group_size": 32})
    parts = encoded(awq, rough(32, 64), made, {})
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not None}
    settings = awq.settings(config, "m", found(parts), parts.__getitem__)
    assert settings == made
    assert np.array_equal(decoded(awq, parts, settings), decoded(awq, parts, made))


def test_auto_round_declares_a_symmetric_form_by_sym() -> None:
    parts = encoded(awq, rough(32, 64), awq.fresh((32, 64), {"group_size": 32}), {})
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "group_size": 32, "sym": True}
    assert not awq.settings(config, "m", found(parts), parts.__getitem__)["zero_point"]


def test_excluded_modules_are_in_the_config() -> None:
    settings = awq.fresh((32, 128), {})
    assert awq.config(settings, ["lm_head"])["modules_to_not_convert"] == ["lm_head"]
    assert awq.config(settings, [])["modules_to_not_convert"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "gemv_fast"}, "gemv_fast layout"),
        ({"version": "llm-awq"}, "llm-awq layout"),
        ({"version": "marlin"}, "marlin layout"),
        ({"version": "gemv"}, "ask for"),
        ({"quant_method": "gptq"}, "'gptq' is not awq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "auto_round:auto_gptq"),
        ({"quant_method": "auto-round"}, "packing_format ''"),
        ({"bits": 8}, "8 bits"),
        ({"group_size": 48}, "do not fill"),
        ({"group_size": 16}, "ask for"),
        ({"group_size": 0}, "neither"),
        ({"extra_config": {"m": {"bits": 16}}}, "16 bits"),
    ],
)
def test_other_layouts_are_refused(fields: Mapping[str, Any], message: str) -> None:
    parts = encoded(awq, rough(32, 64), awq.fresh((32, 64), {"group_size": 32}), {})
    with pytest.raises(ValueError, match=message):
        awq.settings({**CONFIG, **fields}, "m", found(parts), parts.__getitem__)


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("qweight", ("I16", (64, 4)), "is I16, not I32"),
        ("scales", ("F16", (2, 16)), "ask for"),
        ("qzeros", ("I32", (2, 5)), "ask for"),
        ("qzeros", None, "has no qzeros"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: str, other: Any, message: str) -> None:
    parts = encoded(awq, rough(32, 64), awq.fresh((32, 64), {"group_size": 32}), {})
    there = {name: entry for name, entry in {**found(parts), part: other}.items() if entry}
    with pytest.raises(ValueError, match=message):
        awq.settings(CONFIG, "m", there, parts.__getitem__)


def test_gemv_with_groups_that_it_does_not_have_is_refused() -> None:
    parts = {
        "qweight": np.zeros((8, 8), np.int32),
        "qzeros": np.zeros((8, 1), np.int32),
        "scales": np.zeros((8, 8), np.uint16),
    }
    with pytest.raises(ValueError, match="not of 16"):
        awq.settings({**CONFIG, "version": "gemv", "group_size": 16}, "m", found(parts), parts.__getitem__)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((64, 96), {}, "groups of 128"),
        ((8, 128), {}, "words of 32"),
        ((64, 128), {"bits": 8}, "written with 4"),
        ((64, 128), {"sym": True}, "no such option: sym"),
    ],
)
def test_new_weights_that_no_engine_reads_are_refused(shape: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        awq.fresh(shape, options)


def test_what_cannot_be_encoded_is_refused() -> None:
    settings, weight = awq.fresh((32, 64), {"group_size": 32}), rough(32, 64)
    with pytest.raises(ValueError, match="kept together"):
        awq.encode(weight, settings, 0, {"scales": np.ones((2, 32), np.uint16)})
    weight[7, 7] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        awq.encode(weight, settings, 0, {})
    weight[7, 7] = 3e6
    with pytest.raises(ValueError, match="beyond F16"):
        awq.encode(weight, settings, 0, {})


def test_packing_in_rows_is_undone() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (24, 5), dtype=np.uint8)
    words = awq._words(codes)
    assert words.dtype == np.int32
    assert words.shape == (5, 3)
    assert np.array_equal(awq._rows(np.ascontiguousarray(words[:, 1:]), 8, 24), codes[8:])
    assert np.array_equal(awq._rows(np.ascontiguousarray(words[:, 1:]), 11, 13), codes[11:13])
    assert packing.whole_words(11, 13, awq.BITS) == (1, 2)


@pytest.mark.skipif(not REAL.exists(), reason="no real checkpoints here")
def test_a_real_checkpoint_is_read() -> None:
    check_real(awq, "awq-gemm")
