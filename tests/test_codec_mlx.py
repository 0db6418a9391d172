"""MLX's affine form: against MLX itself (golden/mlx.npz), the laws of a codec, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inlay.codecs import mlx
from inlay.dtypes import DTYPES, decode, round_nearest

Parts = Mapping[str, Any]
FILE = np.load(Path(__file__).parent / "golden" / "mlx.npz")
CASES = sorted({name.partition("/")[0] for name in FILE.files})
every_case = pytest.mark.parametrize("name", CASES)


def case(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and parts."""
    parts = {part: FILE[f"{name}/{part}"] for part in ("weight", "scales", "biases")}
    return mlx.settings(
        json.loads(str(FILE[f"{name}/config"])), "m", found(parts, name.split("-")[2]), no_reading
    ), parts


def no_reading(part: str) -> Any:
    raise AssertionError(f"{part} is read")


def found(parts: Parts, scale: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {part: ("U32" if part == "weight" else scale, a.shape) for part, a in parts.items()}


def cut(parts: Parts, settings: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    spans = mlx.spans(settings, first, last)
    return {part: a[spans[part][1] : spans[part][2]] for part, a in parts.items()}


def rows_of(settings: Mapping[str, Any]) -> int:
    return int(np.prod(settings["shape"][:-1]))


def decoded(parts: Parts, settings: Mapping[str, Any]) -> Any:
    return mlx.decode(parts, settings, 0, rows_of(settings))


@every_case
def test_decodes_as_mlx(name: str) -> None:
    settings, parts = case(name)
    scale = DTYPES[settings["scale"]]
    assert json.loads(json.dumps(settings)) == settings
    values = decoded(parts, settings)
    theirs = FILE[f"{name}/decoded"]
    if scale.name == "F32":  # a compiler may fuse product and sum: one rounding of the product apart
        largest = (
            np.abs(values).reshape(theirs.shape)
            + np.abs(theirs)
            + np.abs(np.repeat(decode(parts["biases"], scale), settings["group_size"], axis=-1))
        )
        assert (np.abs(values.reshape(theirs.shape).astype(np.float64) - theirs) <= largest * 2.0**-23).all()
    else:  # MLX gives 16 bits, rounded once or twice
        mine = decode(round_nearest(values.astype(np.float64), scale), scale).reshape(theirs.shape)
        unit = np.abs(mine) + np.abs(np.repeat(decode(parts["biases"], scale), settings["group_size"], axis=-1))
        assert (np.abs(mine - decode(theirs, scale)) <= unit * 2.0**-scale.fraction_bits).all()


@every_case
def test_values_are_code_times_scale_plus_bias(name: str) -> None:
    """The bits of a row read by Python, as one large number."""
    settings, parts = case(name)
    bits, columns, scale = settings["bits"], settings["shape"][-1], DTYPES[settings["scale"]]
    words = parts["weight"].reshape(rows_of(settings), -1)
    codes = np.array([
        [int.from_bytes(row.astype("<u4").tobytes(), "little") >> bits * k & 2**bits - 1 for k in range(columns)]
        for row in words
    ])  # fmt: skip
    scales, biases = (
        np.repeat(decode(parts[p], scale).reshape(len(words), -1), settings["group_size"], axis=1)
        for p in ("scales", "biases")
    )
    product = (codes * scales).astype(np.float32).astype(np.float64)
    assert np.array_equal(decoded(parts, settings), (product + biases).astype(np.float32))


@every_case
def test_rows_do_not_depend_on_the_cut(name: str) -> None:
    settings, parts = case(name)
    whole, rows = decoded(parts, settings), rows_of(settings)
    for cuts in (range(rows + 1), (0, 3, 7, rows)):
        pieces = [mlx.decode(cut(parts, settings, a, b), settings, a, b) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(pieces), whole)


@every_case
def test_stored_scales_give_the_same_codes(name: str) -> None:
    settings, parts = case(name)
    assert mlx.layout(settings) == found(parts, settings["scale"])
    weight, step = decoded(parts, settings), mlx.align(settings)
    kept = {part: parts[part] for part in ("scales", "biases")}
    for at in range(0, len(weight), step):
        made = mlx.encode(weight[at : at + step], settings, at, cut(kept, settings, at, at + step))
        wanted = cut(parts, settings, at, at + step)
        assert all(np.array_equal(made[part], wanted[part]) for part in parts)


@every_case
def test_new_scales_and_codes_are_those_of_mlx(name: str) -> None:
    """Scales and biases to the bit but for the last one of a quotient; codes where nothing is rounded between."""
    settings, parts = case(name)
    weight = FILE[f"{name}/original"].reshape(rows_of(settings), -1)
    made = mlx.encode(weight, settings, 0, {})
    assert found(made, settings["scale"]) == mlx.layout(settings)
    scale = DTYPES[settings["scale"]]
    assert np.array_equal(made["biases"], parts["biases"])
    a, b = decode(made["scales"], scale), decode(parts["scales"], scale)
    assert (np.abs(a - b) <= np.abs(b) * 2.0**-scale.fraction_bits).all()
    if scale.name == "F32":
        assert (made["weight"] == parts["weight"]).mean() > 0.99


@pytest.mark.parametrize("bits", mlx.BITS)
@pytest.mark.parametrize(("size", "scale"), [(32, "F16"), (64, "BF16"), (128, "F32")])
def test_new_scales_err_by_half_a_step(bits: int, size: int, scale: str) -> None:
    weight = np.random.default_rng(bits).standard_normal((12, 256)).astype(np.float32)
    settings = mlx.fresh((12, 256), {"bits": bits, "group_size": size, "scale": scale})
    parts = mlx.encode(weight, settings, 0, {})
    dtype = DTYPES[scale]
    step = np.abs(np.repeat(decode(parts["scales"], dtype), size, axis=1))
    reach = np.repeat(np.abs(decode(parts["biases"], dtype)), size, axis=1) * 2.0**-dtype.fraction_bits
    # The scale is made so that 0 is a code, which leaves the far end up to a step outside; its rounding adds `reach`.
    low = np.repeat(weight.reshape(12, -1, size).min(2), size, axis=1)
    high = np.repeat(weight.reshape(12, -1, size).max(2), size, axis=1)
    inside = np.minimum(weight - low, high - weight) > step
    error = np.abs(decoded(parts, settings).astype(np.float64) - weight)
    assert (error <= step + reach).all()
    assert (error[inside] <= (step / 2 * (1 + 2.0**-10) + reach)[inside]).all()
    config = json.loads(json.dumps(mlx.config(settings, ["lm_head"])))
    assert mlx.settings(config, "m", found(parts, scale), no_reading) == settings
    with pytest.raises(ValueError, match="says it has none"):
        mlx.settings(config, "lm_head", found(parts, scale), no_reading)


def test_a_module_has_bits_and_groups_of_its_own() -> None:
    parts = mlx.encode(np.ones((4, 64), np.float32), mlx.fresh((4, 64), {"bits": 8, "group_size": 64}), 0, {})
    config = {"bits": 4, "group_size": 64, "a.b": {"bits": 8, "group_size": 64}}
    assert mlx.settings(config, "a.b", found(parts, "BF16"), no_reading)["bits"] == 8
    with pytest.raises(ValueError, match="ask for"):
        mlx.settings(config, "a.c", found(parts, "BF16"), no_reading)


def test_a_group_of_one_value_is_that_value() -> None:
    settings = mlx.fresh((2, 64), {"bits": 4, "group_size": 64, "scale": "F32"})
    for value in (0.0, 0.37, -2.5):
        weight = np.full((2, 64), value, np.float32)
        assert np.array_equal(decoded(mlx.encode(weight, settings, 0, {}), settings), weight)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"mode": "mxfp4"}, {}, "mode 'mxfp4'"),
        ({"bits": 7}, {}, "bits 7"),
        ({"group_size": 48}, {}, "do not fill"),
        ({"group_size": 32}, {}, "ask for"),
        ({"group_size": True}, {}, "group_size True"),
        ({}, {"biases": None}, "no m.biases"),
        ({}, {"scales": ("F64", (4, 1))}, "scales of F64"),
        ({}, {"biases": ("F16", (4, 1))}, "m.biases is F16"),
        ({}, {"weight": ("U32", (8,))}, "no matrix"),
    ],
)
def test_what_contradicts_is_refused(config: Parts, change: Parts, message: str) -> None:
    parts: dict[str, Any] = {"weight": ("U32", (4, 8)), "scales": ("BF16", (4, 1)), "biases": ("BF16", (4, 1))}
    parts = {part: value for part, value in {**parts, **change}.items() if value}
    with pytest.raises(ValueError, match=message):
        mlx.settings({"bits": 4, "group_size": 64, "mode": "affine", **config}, "m", parts, no_reading)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 64), {"bits": 7}, "bits 7"), ((4, 48), {"group_size": 16}, "does not fill"),
        ((4, 96), {}, "does not fill"), ((64,), {}, "does not fill"), ((4, 64), {"mode": "mxfp4"}, "no such option"),
    ],
)  # fmt: skip
def test_new_weights_of_no_form_are_refused(shape: tuple[int, ...], options: Parts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlx.fresh(shape, options)


def test_what_cannot_be_encoded_is_refused() -> None:
    settings = mlx.fresh((1, 64), {"scale": "F16"})
    for value, message in ((np.nan, "NaN"), (np.inf, "NaN"), (1e6, "beyond F16")):
        weight = np.ones((1, 64), np.float32)
        weight[0, 3] = value
        with pytest.raises(ValueError, match=message):
            mlx.encode(weight, settings, 0, {})
    with pytest.raises(ValueError, match="together"):
        mlx.encode(np.ones((1, 64), np.float32), settings, 0, {"scales": np.ones((1, 1), np.uint16)})
