"""HQQ: the golden file of the library, the laws of a codec, and what does not fit.

The golden values are decoded by the library in float32, from scales as they are stored, so they are compared bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inlay.codecs import hqq
from inlay.dtypes import DTYPES, decode32

GOLDEN = Path(__file__).parent / "golden" / "hqq.npz"
NAMES = (
    "4bit", "4bit-across", "4bit-columns", "8bit", "8bit-columns", "6bit", "3bit", "3bit-columns", "2bit", "1bit",
    "4bit-as-float", "3bit-as-float", "4bit-plain", "8bit-plain",
)  # fmt: skip
ALONG = [name for name in NAMES if "columns" not in name]
every_case = pytest.mark.parametrize("name", NAMES)
KINDS = {"float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8"}


@cache
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return {key: file[key] for key in file.files}


class Case:
    """One weight of the golden file."""

    def __init__(self, name: str) -> None:
        held = {key.partition("/")[2]: value for key, value in golden().items() if key.startswith(f"{name}/")}
        half = {"bfloat16": "BF16", "float16": "F16"}.get(str(held["dtype"]))
        self.parts = {part: held[part] for part in hqq.PARTS | hqq.OPTIONAL if part in held}
        self.found = {part: (KINDS.get(v.dtype.name, half), v.shape) for part, v in self.parts.items()}
        self.decoded = held["decoded"]
        self.weight = held["integers"].astype(np.float32) / 32768
        assert self.parts.keys() == held.keys() - {"integers", "decoded", "dtype"}, "every tensor has a name"

    def settings(self, found: Mapping[str, Any] | None = None, **values: Any) -> dict[str, Any]:
        """As read, with other tensors in the header, or other values in the small ones; texts are given as such."""
        parts, header = {**self.parts}, {**self.found, **(found or {})}
        for part, value in values.items():
            array = (
                np.frombuffer(value.encode(), np.uint8)
                if isinstance(value, str)
                else np.array(value, parts[part].dtype)
            )
            parts[part], header[part] = array, (header[part][0], array.shape)
        header = {part: shape for part, shape in header.items() if shape}
        return json.loads(json.dumps(hqq.settings({}, "m", header, parts.__getitem__)))


def sliced(settings: Mapping[str, Any], first: int, last: int, parts: Mapping[str, Any]) -> dict[str, Any]:
    taken = {}
    for part, span in hqq.spans(settings, first, last).items():
        if part in parts and span is not None:
            axis, begin, end = span
            assert 0 <= begin < end <= parts[part].shape[axis]
            taken[part] = parts[part][begin:end] if axis == 0 else parts[part][:, begin:end]
        elif part in parts:
            taken[part] = parts[part]
    return taken


@every_case
def test_blocks_of_rows_decode_as_hqq_wherever_they_are_cut(name: str) -> None:
    case, count = Case(name), len(Case(name).weight)
    settings = case.settings()
    for first in range(count):
        for last in range(first + 1, count + 1):
            found = hqq.decode(sliced(settings, first, last, case.parts), settings, first, last)
            assert (found.dtype, found.shape) == (np.float32, (last - first, case.weight.shape[1]))
            assert found.tobytes() == case.decoded[first:last].tobytes(), (first, last)


@every_case
def test_layout_is_what_was_found(name: str) -> None:
    assert hqq.layout(Case(name).settings()) == Case(name).found


def encoded(settings: Mapping[str, Any], weight: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """All parts, encoded in the smallest blocks."""
    cuts = [*range(0, len(weight), hqq.align(settings)), len(weight)]
    blocks = [hqq.encode(weight[a:b], settings, a, sliced(settings, a, b, known)) for a, b in pairwise(cuts)]
    whole = {part: np.concatenate([block[part] for block in blocks]) for part in blocks[0]}
    return {**whole, **hqq.finish(whole, settings)}


@every_case
def test_stored_scales_give_the_same_bytes(name: str) -> None:
    case = Case(name)
    kept = {part: case.parts[part] for part in ("scale", "zero")}
    made = encoded(case.settings(), case.decoded, kept)
    assert made.keys() == case.parts.keys() - kept.keys()
    for part, value in made.items():
        assert (value.dtype, value.shape) == (case.parts[part].dtype, case.parts[part].shape), part
        assert value.tobytes() == case.parts[part].tobytes(), part


@pytest.mark.parametrize("name", ["4bit-plain", "8bit-plain"])
def test_new_scales_are_those_of_hqq_without_its_search(name: str) -> None:
    case = Case(name)
    made = encoded(case.settings(), case.weight, {})
    assert made["scale"].max() == 1
    assert made["scale"].min() == np.float32(1) / np.float32(2e4)
    for part, value in made.items():
        assert value.tobytes() == case.parts[part].tobytes(), part


@pytest.mark.parametrize("name", ALONG)
def test_new_scales_err_at_most_half_a_step(name: str) -> None:
    """And by what rounding of scale and zero point moves the ends of the range: the values there are clipped."""
    case = Case(name)
    settings = case.settings()
    made = encoded(settings, case.weight, {})
    assert made.keys() == case.parts.keys()
    assert hqq.settings({}, "m", case.found, made.__getitem__) == settings
    scale, zero = (decode32(made[part], DTYPES[settings[part]]).astype(np.float64) for part in ("scale", "zero"))
    groups = case.weight.reshape(len(scale), -1).astype(np.float64)
    ends = np.stack([-zero * scale, ((1 << settings["nbits"]) - 1 - zero) * scale])
    clipped = np.maximum(ends[0] - groups, 0) + np.maximum(groups - ends[1], 0)
    error = np.abs(hqq.decode(made, settings, 0, len(case.weight)) - case.weight).reshape(groups.shape)
    assert np.all(error <= np.maximum(scale / 2, clipped) + 1e-6)
    width = groups.max(axis=1) - groups.min(axis=1)
    moved = 0 if settings["scale"] == "F32" else 2.0**-7 * (1 << settings["nbits"])  # steps, for 8 bits of precision
    rounded = 0.5 if settings["small"]["round_zero"][0] else 0.0
    assert np.all(clipped.max(axis=1) <= (moved + rounded) * scale[:, 0] + 1e-6)
    spread = np.abs(scale[:, 0] * ((1 << settings["nbits"]) - 1) - width)[width > 255 / 2e4]  # others have a scale set
    assert np.all(spread <= 2.0**-8 * width[width > 255 / 2e4] + 1e-6)


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_fresh_weight_reads_back(nbits: int, dtype: str) -> None:
    settings = json.loads(json.dumps(hqq.fresh((16, 48), {"nbits": nbits, "dtype": dtype, "group_size": 24})))
    weight = np.random.default_rng(nbits).standard_normal((16, 48)).astype(np.float32)
    weight[3] = 0.25  # a group of one value has a scale of one
    made = encoded(settings, weight, {})
    layout = hqq.layout(settings)
    assert {part: value.shape for part, value in made.items()} == {part: shape for part, (_, shape) in layout.items()}
    assert all(value.dtype.itemsize == DTYPES[layout[part][0]].bits // 8 for part, value in made.items())
    assert hqq.settings(hqq.config(settings, []), "m", layout, made.__getitem__) == settings
    error = np.abs(hqq.decode(made, settings, 0, 16) - weight)
    width = (weight.reshape(-1, 24).max(axis=1) - weight.reshape(-1, 24).min(axis=1)).max()
    assert np.delete(error, 3, axis=0).max() <= width / ((1 << nbits) - 1) / 2 + width * 2.0**-7


def test_new_scales_across_rows_are_refused() -> None:
    case = Case("4bit-columns")
    with pytest.raises(ValueError, match="reach across the whole weight: keep the stored scales"):
        hqq.encode(case.weight, case.settings(), 0, {})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    case = Case("4bit")
    case.weight[4, 7] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        hqq.encode(case.weight, case.settings(), 0, {})


VALUES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"quant_scale": 1}, "quantised scales"),
    ({"quant_zero": 1}, "quantised zero points"),
    ({"channel_wise": 0}, "one scale for the weight"),
    ({"shape": [768]}, r"shape is \[768\], which is not that of a matrix"),
    ({"shape": [12, 32]}, r"W_q is .*\(12, 32\)\), but a weight \[12, 32\]"),
    ({"packing": "4bit_32"}, "4 bits packed as '4bit_32'"),
    ({"nbits": 5}, "5 bits packed as '4bit_u8'"),
    ({"axis": 2}, "groups of 32 along axis 2"),
    ({"group_size": 36}, "groups of 36 along axis 1, which do not divide"),
    ({"group_size": 256}, "3 rows of groups, which 4bit_u8 cannot hold"),
    ({"group_size": 64}, r"W_q is"),
)  # fmt: skip


@pytest.mark.parametrize(("values", "message"), VALUES)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case("4bit").settings(**values)


FOUND: tuple[tuple[dict[str, Any], str], ...] = (
    ({"zero": None}, r"no \.zero: not a weight that HQQ saved"),
    ({"encoded_state_dict": None}, r"no \.encoded_state_dict"),
    ({"scale": ("F64", (24, 1))}, "has scale F64 and zero BF16"),
    ({"scale": ("BF16", (1, 24))}, "scale is"),
    ({"W_q": ("I64", (12, 4))}, r"W_q is I64 \[12, 4\], which does not hold U8"),
    ({"W_q": ("U8", (24, 32))}, "W_q is"),
    ({"nbits": ("I32", (1,))}, "nbits is"),
)  # fmt: skip


@pytest.mark.parametrize(("found", "message"), FOUND)
def test_parts_that_do_not_fit_are_refused(found: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case("4bit").settings(found)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [((4, 64), {"bits": 4}, "has no option bits"), ((4, 64), {"nbits": 5}, "nbits 5"),
     ((4, 64), {"dtype": "int8"}, "dtype 'int8'"), ((64,), {}, "not that of a matrix"),
     ((4, 60), {}, "groups of 64 along axis 1"), ((1, 64), {}, "1 rows of groups, which 4bit_u8 cannot hold")],
)  # fmt: skip
def test_a_fresh_weight_of_no_form_is_refused(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hqq.fresh(shape, options)
