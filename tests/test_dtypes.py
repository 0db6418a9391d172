"""Decoding and rounding against torch, ml_dtypes and the definition of IEEE 754."""

from __future__ import annotations

import math
import pickle
import struct
import warnings
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from build import round_exact
from inlay.dtypes import (
    BF16,
    BY_TORCH_NAME,
    DTYPES,
    F16,
    F32,
    F64,
    decode,
    decode32,
    is_finite,
    round_fraction,
    round_nearest,
)

FLOATS = {BF16: np.dtype(ml_dtypes.bfloat16), F16: np.dtype(np.float16), F32: np.dtype(np.float32)}
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["BF16", "F16"])
NARROW = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["BF16", "F16", "F32"])
EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint16)


def by_definition(x: float, dtype: object) -> float:
    """The nearest value of the type, ties to even, in rational arithmetic."""
    if not math.isfinite(x):
        return x
    found = round_exact(Fraction(x), FLOATS[dtype])
    return math.copysign(found, x)


def rounded(x: float, dtype: object) -> float:
    return float(decode(round_nearest(np.array([x]), dtype), dtype)[0])


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


# ─── decode ──────────────────────────────────────────────────────────────────────────────────────────────────────────


NUMBERS = {dtype: EVERY_PATTERN[(EVERY_PATTERN & mask) != mask] for dtype, mask in ((BF16, 0x7F80), (F16, 0x7C00))}


@HALVES
def test_every_number_decodes_to_the_value_of_ml_dtypes(dtype: object) -> None:
    wanted = NUMBERS[dtype].view(FLOATS[dtype]).astype(np.float64)
    np.testing.assert_array_equal(decode(NUMBERS[dtype], dtype).view(np.uint64), wanted.view(np.uint64))


@HALVES
def test_every_pattern_decodes_to_the_value_of_torch(dtype: object) -> None:
    """NaN and Inf too, of all 65536, and without a warning."""
    torch = pytest.importorskip("torch")
    stored = torch.from_numpy(EVERY_PATTERN.view(np.int16)).view(getattr(torch, dtype.torch))
    np.testing.assert_array_equal(decode(EVERY_PATTERN, dtype), stored.double().numpy())
    np.testing.assert_array_equal(decode32(EVERY_PATTERN, dtype), stored.float().numpy())


@HALVES
def test_rounding_a_stored_number_gives_back_its_bits(dtype: object) -> None:
    np.testing.assert_array_equal(round_nearest(decode(NUMBERS[dtype], dtype), dtype), NUMBERS[dtype])


@NARROW
def test_infinities_and_nan_stay_what_they_are(dtype: object) -> None:
    found = decode(round_nearest(np.array([np.inf, -np.inf, np.nan, -np.nan]), dtype), dtype)
    np.testing.assert_array_equal(found, [np.inf, -np.inf, np.nan, np.nan])


@NARROW
def test_nan_and_inf_are_told_from_numbers(dtype: object) -> None:
    if dtype is F32:
        patterns = np.concatenate([(EVERY_PATTERN.astype(np.uint32) << 16) | low for low in (0, 1, 0xFFFF)]).view("<f4")
        np.testing.assert_array_equal(is_finite(patterns, dtype), np.isfinite(patterns))
    else:
        wanted = np.isin(EVERY_PATTERN, NUMBERS[dtype])
        np.testing.assert_array_equal(is_finite(EVERY_PATTERN, dtype), wanted)


# ─── round_nearest ───────────────────────────────────────────────────────────────────────────────────────────────────


def neighbourhood(dtype: object) -> np.ndarray:
    """Around the middle of each two neighbouring values: the middle itself, what float64 and float32 have just beside
    it, and a hair beside it, which float32 cannot tell from it (the cases of double rounding)."""
    values = np.unique(decode(NUMBERS[dtype], dtype))
    middles = (values[:-1] + values[1:]) / 2
    single = middles.astype(np.float32)
    beside = [np.nextafter(single, np.float32(towards)).astype(np.float64) for towards in (np.inf, -np.inf)]
    hairs = [middles * (1 + sign * 2.0**-bits) for sign in (1, -1) for bits in (30, 40, 52)]
    return np.concatenate([middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf), *beside, *hairs])


@HALVES
def test_between_all_neighbours_the_nearer_one_is_taken_and_of_two_the_even_one(dtype: object) -> None:
    """Every pair of neighbouring values of the type; differences of neighbours are exact in float64."""
    x = neighbourhood(dtype)
    order = np.argsort(decode(NUMBERS[dtype], dtype), kind="stable")
    values, bits = decode(NUMBERS[dtype], dtype)[order], NUMBERS[dtype][order]
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    down, up = x - values[above - 1], values[above] - x
    take_low = (down < up) | ((down == up) & (bits[above - 1] % 2 == 0))
    wanted = np.where(take_low, values[above - 1], values[above])
    np.testing.assert_array_equal(decode(round_nearest(x, dtype), dtype), wanted)


@NARROW
def test_half_a_step_beyond_the_largest_value_is_infinite(dtype: object) -> None:
    largest = (2 - 2.0**-dtype.fraction_bits) * 2.0**dtype.max_exponent
    beyond = largest + 2.0 ** (dtype.max_exponent - dtype.fraction_bits - 1)
    for x, wanted in ((beyond, np.inf), (np.nextafter(beyond, 0), largest), (1e308, np.inf), (largest, largest)):
        assert rounded(x, dtype) == wanted == -rounded(-x, dtype)


@NARROW
@given(st.floats(allow_nan=True, allow_infinity=True))
@example(1 + 2.0**-8 + 2.0**-40)
@example(1 + 2.0**-8 - 2.0**-40)
@example(1 + 3 * 2.0**-8 - 2.0**-50)
@example(1 + 2.0**-11 + 2.0**-52)
@example(3.3895313892515355e38)
@example(-3.3961775292304957e38)
@example(65519.99999999999)
@example(65520.0)
@example(2.0**-134)
@example(2.0**-134 * (1 + 2.0**-52))
@example(2.0**-25)
@example(2.0**-25 * (1 + 2.0**-52))
@example(-(2.0**-1074))
@example(-0.0)
def test_any_float_is_rounded_once(dtype: object, x: float) -> None:
    assert same(rounded(x, dtype), by_definition(x, dtype))


@NARROW
@given(st.integers(0, (1 << 16) - 1), st.integers(-3, 3), st.sampled_from([0.5, 0.25, 0.75]), st.integers(1, 60))
def test_a_float_beside_a_boundary_is_rounded_once(
    dtype: object, pattern: int, ulps: int, part: float, small: int
) -> None:
    """Boundary + 2^-k of it: the place where a rounding through float32 goes wrong."""
    assume(pattern & 0x7F80 != 0x7F80)
    value = float(decode(np.array([pattern], np.uint16), BF16)[0])
    step = math.ulp(value) * 2.0 ** (52 - dtype.fraction_bits)
    for x in (value + part * step, (value + part * step) * (1 + ulps * 2.0**-small)):
        if math.isfinite(x):
            assert same(rounded(x, dtype), by_definition(x, dtype)), x


@given(st.floats(width=32))
def test_a_float32_rounds_as_torch_has_it(x: float) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (BF16, F16):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = float(torch.tensor(x, dtype=torch.float32).to(getattr(torch, dtype.torch)).double())
        assert same(rounded(x, dtype), wanted)


@given(st.floats())
def test_a_float64_rounds_to_float32_as_the_processor_does(x: float) -> None:
    with np.errstate(over="ignore"):
        assert same(rounded(x, F32), float(np.float64(x).astype(np.float32)))
    assert same(rounded(x, F64), x)


def test_rounding_through_float32_would_differ_on_these() -> None:
    """The examples of this file do catch a second rounding."""
    x = 1 + 2.0**-8 + 2.0**-40
    assert float(np.float32(x).astype(ml_dtypes.bfloat16)) != by_definition(x, BF16) == rounded(x, BF16)


@NARROW
def test_rounding_keeps_the_shape_and_the_stored_type(dtype: object) -> None:
    for shape in ((0,), (3,), (2, 0), (2, 3)):
        bits = round_nearest(np.ones(shape), dtype)
        assert (bits.shape, bits.dtype) == (shape, np.dtype(dtype.raw))


# ─── round_fraction ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=["BF16", "F16", "F32", "F64"])
@given(st.floats(allow_nan=False, allow_infinity=False))
@example(65520.0)
@example(65519.99999999999)
@example(2.0**-25)
@example(3.3961775292304957e38)
@example(2.0**-1074)
def test_fractions_round_as_floats_do(dtype: object, x: float) -> None:
    wanted = rounded(x, dtype)
    found = round_fraction(Fraction(x), dtype, negative_zero=math.copysign(1, x) < 0)
    assert same(found, wanted)


@NARROW
@given(st.fractions(), st.integers(-160, 140))
def test_fractions_round_by_the_definition(dtype: object, x: Fraction, exponent: int) -> None:
    x *= Fraction(2) ** exponent
    found = round_fraction(x, dtype)
    wanted = round_exact(x, FLOATS[dtype])
    assert found == wanted
    assert x == 0 or math.copysign(1, found) == (1 if x > 0 else -1)


@NARROW
@given(st.integers(0, (1 << 16) - 2), st.integers(1, 300))
def test_what_lies_a_hair_beside_a_tie_goes_to_its_side(dtype: object, pattern: int, bits: int) -> None:
    """Exact arithmetic sees what no float does."""
    if dtype is F32:
        low, high = np.array([pattern << 15, (pattern << 15) + 1], np.uint32).view(np.float32).tolist()
    else:
        low, high = np.array([pattern, pattern + 1], np.uint16).view(FLOATS[dtype]).tolist()
    assume(math.isfinite(low) and math.isfinite(high) and abs(high) > abs(low))
    tie, hair = (Fraction(low) + Fraction(high)) / 2, abs(Fraction(high)) / 2 ** (bits + 60)
    assert round_fraction(tie - hair, dtype) == min(low, high)
    assert round_fraction(tie + hair, dtype) == max(low, high)


def test_zero_keeps_the_sign_it_is_given() -> None:
    assert math.copysign(1, round_fraction(Fraction(0), BF16)) == 1
    assert math.copysign(1, round_fraction(Fraction(0), BF16, negative_zero=True)) == -1
    tiny = Fraction(1, 2**2000)
    assert math.copysign(1, round_fraction(-tiny, BF16)) == -1
    assert math.copysign(1, round_fraction(tiny, BF16, negative_zero=True)) == 1


# ─── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_name_that_users_write_is_the_type_that_torch_means() -> None:
    torch = pytest.importorskip("torch")
    for name, dtype in BY_TORCH_NAME.items():
        known = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
        assert getattr(torch, known) is getattr(torch, dtype.torch), name


def test_every_type_that_torch_has_is_named_as_torch_names_it() -> None:
    torch = pytest.importorskip("torch")
    for dtype in DTYPES.values():
        if dtype.torch:
            found = getattr(torch, dtype.torch)
            assert 8 * torch.empty((), dtype=found).element_size() == (8 if dtype.bits == 4 else dtype.bits)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_type_stays_itself_through_pickle(name: str) -> None:
    assert pickle.loads(pickle.dumps(DTYPES[name])) is DTYPES[name]


def test_a_count_that_fills_no_whole_byte_has_no_size() -> None:
    assert DTYPES["F4"].nbytes(4) == 2
    assert DTYPES["F6_E2M3"].nbytes(4) == 3
    with pytest.raises(ValueError, match="F4"):
        DTYPES["F4"].nbytes(3)


def test_the_definition_used_here_agrees_with_struct_for_float32_and_float16() -> None:
    """The oracle of this file against another implementation."""
    pick = np.random.default_rng(0)
    for x in [*pick.normal(size=300), *(pick.normal(size=300) * 2.0 ** pick.integers(-30, 15, 300))]:
        for code, dtype in (("f", F32), ("e", F16)):
            assert struct.unpack(code, struct.pack(code, x))[0] == by_definition(float(x), dtype)
