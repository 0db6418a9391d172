"""MXFP4 experts: against transformers, against the formula value by value, and the laws of the protocol."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inlay.codecs import mxfp4

GOLDEN = Path(__file__).parent / "golden" / "mxfp4.npz"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CASES = ("even", "odd", "one", "wide")
every_case = pytest.mark.parametrize("case", CASES)


def golden(case: str) -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return {key.partition("/")[2]: file[key] for key in file.files if key.startswith(case + "/")}


def found(parts: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("U8", parts[name].shape) for name in ("blocks", "scales")}


def settings_of(parts: dict[str, Any]) -> Any:
    made = mxfp4.settings({"quant_method": "mxfp4"}, "experts.down_proj", found(parts), lambda part: parts[part])
    return json.loads(json.dumps(made))


def decoded(parts: dict[str, Any], settings: Any, first: int, last: int) -> Any:
    spans = mxfp4.spans(settings, first, last)
    cut = {name: parts[name][span[1] : span[2]] for name, span in spans.items() if span and span[0] == 0}
    return mxfp4.decode(cut, settings, first, last)


def whole(parts: dict[str, Any]) -> Any:
    settings = settings_of(parts)
    return decoded(parts, settings, 0, settings["shape"][0] * settings["shape"][1])


def encoded(weight: Any, settings: Any, scales: Any = None) -> dict[str, Any]:
    """Expert by expert, as a caller with little memory does."""
    rows = mxfp4.align(settings)
    pieces = []
    for expert in range(settings["shape"][0]):
        known = {} if scales is None else {"scales": scales[expert : expert + 1]}
        pieces.append(mxfp4.encode(weight[expert * rows : (expert + 1) * rows], settings, expert * rows, known))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in mxfp4.PARTS}


@every_case
def test_decoding_equals_transformers(case: str) -> None:
    parts = golden(case)
    got = whole(parts)
    assert got.dtype == np.float32
    assert got.tobytes() == parts["float32"].tobytes()
    finite = np.isfinite(got)  # in bfloat16 too 6 · 2^127 is beyond the range
    short = (parts["bfloat16"].astype(np.uint32) << 16).view(np.float32).reshape(got.shape)
    np.testing.assert_array_equal(got[finite], short[finite])


def test_decoding_equals_the_formula() -> None:
    parts = golden("even")
    settings, got = settings_of(parts), whole(golden("even"))
    experts, rows, out = settings["shape"]
    assert (experts, rows, out) == (2, 96, 6)
    for e, i, o in np.ndindex(experts, rows, out):
        byte = int(parts["blocks"][e, o, i // 32, i % 32 // 2])
        code = byte >> 4 if i % 2 else byte & 15
        value = math.copysign(E2M1[code & 7], -1 if code & 8 else 1) * 2.0 ** (
            int(parts["scales"][e, o, i // 32]) - 127
        )
        assert got[e * rows + i, o] == value


@every_case
def test_rows_do_not_depend_on_the_cut(case: str) -> None:
    parts = golden(case)
    settings, want = settings_of(parts), whole(parts)
    total = len(want)
    middle = settings["shape"][1]
    for cut in (range(total + 1), (0, 1, total), (0, middle // 2 + 1, total), (0, max(1, middle - 1), total)):
        pieces = [decoded(parts, settings, a, b) for a, b in pairwise(cut) if a < b]
        assert np.concatenate(pieces).tobytes() == want.tobytes()


@every_case
def test_layout_is_what_was_found(case: str) -> None:
    parts = golden(case)
    assert mxfp4.layout(settings_of(parts)) == found(parts)


def test_a_scale_of_255_is_not_a_number() -> None:
    parts = golden("one")
    parts["scales"] = np.full_like(parts["scales"], 255)
    assert np.isnan(whole(parts)).all()


@every_case
def test_stored_scales_give_the_same_codes(case: str) -> None:
    parts = golden(case)
    parts["scales"] = np.minimum(parts["scales"], 251)  # so that all values are finite
    again = encoded(whole(parts), settings_of(parts), parts["scales"])
    assert again["blocks"].tobytes() == parts["blocks"].tobytes()
    assert again["scales"].tobytes() == parts["scales"].tobytes()


def test_new_scales_keep_what_is_on_a_grid() -> None:
    parts = golden("even")
    want = whole(parts)
    settings = settings_of(parts)
    again = encoded(want, settings)
    assert whole(again).tobytes() == want.tobytes()


@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e30, 1e-44])
def test_new_scales_err_by_half_a_step(spread: float) -> None:
    """Below 6 units of the scale; from there to 8 a value becomes 6, as the specification has it."""
    settings = mxfp4.fresh((2, 64, 5), {})
    weight = (np.random.default_rng(3).standard_normal((128, 5)) * spread).astype(np.float32)
    weight[32:64, 2] = 0
    parts = encoded(weight, settings)
    groups = weight.reshape(2, 2, 32, 5).astype(np.float64)
    largest = np.abs(groups).max(axis=2)
    unit = 2.0 ** (parts["scales"].transpose(0, 2, 1).astype(np.float64) - 127)
    normal = largest >= 2.0**-125
    np.testing.assert_array_equal(unit[normal], 2.0 ** (np.floor(np.log2(largest[normal])) - 2))
    assert (unit[~normal & (largest > 0)] == 2.0**-127).all()
    scaled = np.abs(groups) / unit[:, :, None]
    assert (scaled < 8).all() and scaled.max() > (4 if spread > 1e-40 else 0)
    error = np.abs(whole(parts).reshape(groups.shape) - groups) / unit[:, :, None]
    half = np.where(scaled < 2, 0.25, np.where(scaled < 4, 0.5, 1.0))
    assert (error <= np.where(scaled > 6, scaled - 6, half)).all()


def test_ties_go_to_the_even_code_and_the_rest_saturates() -> None:
    settings = mxfp4.fresh((1, 32, 1), {})
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, -0.25, -0.75, -0.0, 6.0, 0.0]
    nearest = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -1.0, -0.0, 6.0, 0.0]
    weight = np.zeros((32, 1), np.float32)
    weight[: len(values), 0] = values
    parts = encoded(weight, settings)
    assert parts["scales"].tolist() == [[[127]]]
    got = whole(parts)[: len(values), 0]
    assert got.tobytes() == np.array(nearest, np.float32).tobytes()


def test_a_fresh_weight_has_the_layout_of_a_stored_one() -> None:
    settings = mxfp4.fresh([4, 96, 7], {})
    parts = encoded(np.ones((4 * 96, 7), np.float32), settings)
    assert mxfp4.layout(settings) == found(parts)
    assert settings_of(parts) == settings
    assert mxfp4.config(settings, ["lm_head"]) == {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


BLOCKS, SCALES = ("U8", (2, 6, 3, 16)), ("U8", (2, 6, 3))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"blocks": BLOCKS}, "has no x.down_proj_scales"),
        ({"scales": SCALES}, "has no x.down_proj_blocks"),
        ({"blocks": ("BF16", BLOCKS[1]), "scales": SCALES}, "blocks of BF16"),
        ({"blocks": BLOCKS, "scales": ("F32", SCALES[1])}, "scales of F32"),
        ({"blocks": ("U8", (2, 6, 48)), "scales": SCALES}, "blocks of x.down_proj are"),
        ({"blocks": ("U8", (2, 6, 3, 8)), "scales": SCALES}, "blocks of x.down_proj are"),
        ({"blocks": BLOCKS, "scales": ("U8", (2, 6, 4))}, "not one a group"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(parts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mxfp4.settings({}, "x.down_proj", parts, lambda part: np.empty(0))


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [((2, 48, 4), {}, "multiple of 32"), ((32, 4), {}, "cannot be MXFP4"), ((1, 32, 4), {"bits": 4}, "no option bits")],
)
def test_new_weights_that_do_not_fit_are_refused(shape: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mxfp4.fresh(shape, options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        mxfp4.encode(np.full((32, 1), value, np.float32), mxfp4.fresh((1, 32, 1), {}), 0, {})
