"""8-bit floats and e2m1: their tables and their rounding, against ml_dtypes and brute force."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from inlay.codecs.floats import E2M1, LARGEST, decode_float, encode_e2m1, encode_float, look_up, table, wide

TYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
CODES = np.arange(256, dtype=np.uint8)
every_type = pytest.mark.parametrize("name", TYPES)
rounded = pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
either = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def ladder(name):
    """The values of codes without a sign, in order."""
    values = E2M1[:8] if name == "F4" else table(name)[:128]
    return values[values <= LARGEST[name]].astype(np.float64)


def hard(name):
    """Values of codes, middles between them, and their neighbours on both sides; zeros; and past the end."""
    steps = ladder(name)
    exact = np.concatenate([steps, (steps[1:] + steps[:-1]) / 2]).astype(np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    near = np.concatenate([near, np.float32([1e-40, 3e38, np.inf, LARGEST[name] * 1.04])])
    return np.concatenate([near, -near])


def nearest(value, name):
    """The code by brute force: least distance, then the even code."""
    steps = ladder(name)
    distance = np.abs(min(abs(float(value)), LARGEST[name]) - steps)
    best = np.flatnonzero(distance == distance.min())
    code = int(best[0] if len(best) == 1 or best[0] % 2 == 0 else best[1])
    return code | (8 if name == "F4" else 128) * int(np.signbit(value))


@every_type
def test_tables_are_those_of_ml_dtypes(name):
    theirs = CODES.view(TYPES[name]).astype(np.float32)
    assert np.array_equal(table(name), theirs, equal_nan=True)
    finite = ~np.isnan(theirs)
    assert np.array_equal(np.signbit(table(name))[finite], np.signbit(theirs)[finite])


def test_e2m1_is_that_of_ml_dtypes():
    assert np.array_equal(E2M1, np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert np.signbit(E2M1[8]) and not np.signbit(E2M1[0])


@rounded
@either
def test_rounding_is_to_the_nearest_with_ties_to_even(name, dtype):
    values = hard(name).astype(dtype)
    assert encode_float(values, name).tolist() == [nearest(v, name) for v in values]


@either
def test_e2m1_rounding_is_to_the_nearest_with_ties_to_even(dtype):
    values = hard("F4").astype(dtype)
    assert encode_e2m1(values).tolist() == [nearest(v, "F4") for v in values]


@rounded
def test_rounding_agrees_with_ml_dtypes_in_range(name):
    random = np.random.default_rng(3)
    values = (random.standard_normal(20000) * 10.0 ** random.integers(-8, 3, 20000)).astype(np.float32)
    values = np.clip(values, -LARGEST[name], LARGEST[name])
    assert np.array_equal(encode_float(values, name), values.astype(TYPES[name]).view(np.uint8))


@rounded
def test_float64_is_not_rounded_twice(name):
    """A hair above a middle is a middle in float32, where it would go down to the even code."""
    steps = ladder(name)
    middle = (steps[2] + steps[3]) / 2  # 2 is even, so the tie goes down to it
    assert encode_float(np.array([middle, middle * (1 + 2**-50)]), name).tolist() == [2, 3]


@rounded
def test_every_code_survives(name):
    values = decode_float(CODES, name)
    finite = np.isfinite(values)
    assert np.array_equal(encode_float(values, name)[finite], CODES[finite])


def test_nan_stays_nan_with_its_sign():
    values = decode_float(np.array([0x7F, 0xFF], np.uint8), "F8_E4M3")
    assert np.isnan(values).all()
    assert encode_float(values, "F8_E4M3").tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 6), (7,), (0, 4), (2, 0)])
@every_type
def test_decoding_is_the_table_for_any_shape(name, shape):
    codes = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode_float(codes, name), table(name)[codes], equal_nan=True)


def test_looking_up_takes_the_values_of_a_byte_in_order_and_strided_codes():
    values = np.arange(256 * 3, dtype=np.float32).reshape(256, 3)
    codes = np.random.default_rng(6).integers(0, 256, (5, 14), dtype=np.uint8)
    for cut in (codes, codes[:, 1:], codes[:, ::2], codes[1:, :5]):
        assert np.array_equal(look_up(cut, wide(values)), values[cut].reshape(len(cut), -1))


def test_what_is_no_8_bit_float_is_refused():
    with pytest.raises(ValueError, match="BF16 is no float of 8 bits with a table here"):
        table("BF16")
    with pytest.raises(ValueError, match="F8_E8M0 is no float of 8 bits that values are rounded to"):
        encode_float(np.zeros(1, np.float32), "F8_E8M0")
    with pytest.raises(ValueError, match="a value is NaN"):
        encode_e2m1(np.array([1, np.nan], np.float32))
