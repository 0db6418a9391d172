"""compressed-tensors with integers and 8-bit floats: against the library, and the laws of `inlay.codecs`.

`golden/compressed.npz` is what compressed-tensors 0.17 wrote and read (`golden/make_compressed.py`). The library rounds
(q − z)·s once, to the type of the scale; so must ours be after one rounding, bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from inlay.codecs import compressed, compressed_fp4, compressed_pack, modelopt, scaled
from inlay.codecs.floats import decode_float
from inlay.dtypes import DTYPES, round_nearest

GOLDEN = np.load(Path(__file__).with_name("golden") / "compressed.npz")
NAMES = sorted({key.partition("/")[0] for key in GOLDEN.files})
DATA = Path(__file__).parents[2] / "shared" / "data" / "quantised"  # beside the repository, where there are any
CODES = ("weight", "weight_packed", "weight_shape")


@dataclass(frozen=True)
class Golden:
    """A case of the file."""

    name: str

    @property
    def codec(self) -> ModuleType:
        if self.name.startswith("modelopt"):
            return modelopt
        packed = compressed_pack if self.types.get("weight_packed") == "I32" else compressed_fp4
        return compressed if "weight" in self.types else packed

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(str(GOLDEN[f"{self.name}/config"]))

    @property
    def types(self) -> dict[str, str]:
        return json.loads(str(GOLDEN[f"{self.name}/types"]))

    @property
    def weight(self) -> Any:
        return GOLDEN[f"{self.name}/weight"]

    @property
    def decoded(self) -> Any:
        return GOLDEN[f"{self.name}/part/decoded"]

    @property
    def parts(self) -> dict[str, Any]:
        prefix = f"{self.name}/part/"
        parts = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}
        del parts["decoded"]
        return parts

    @property
    def found(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {part: (self.types[part], array.shape) for part, array in self.parts.items()}

    @property
    def settings(self) -> Any:
        return json.loads(json.dumps(settings(self)))


def settings(case, module="model.layers.0.mlp.up_proj", change=None, drop=(), **found):
    """Settings of a case, of a changed config, without some parts, or with parts of other types and shapes."""
    config = case.config
    if change is not None:
        change(config)
    parts = {part: what for part, what in {**case.found, **found}.items() if part not in drop}
    return case.codec.settings(config, module, parts, case.parts.__getitem__)


def cut(codec, made, parts, first, last):
    """The slices of parts that rows [first, last) need."""
    spans = codec.spans(made, first, last)
    assert set(spans) == set(parts)
    return {
        part: parts[part] if span is None else np.take(parts[part], np.arange(span[1], span[2]), axis=span[0])
        for part, span in spans.items()
    }


def encoded(codec, made, weight, known=None, rows=None):
    """All parts of a weight that is encoded in blocks of `rows`; `known` has whole parts."""
    count, measured = len(weight), [codec.measure(weight[i : i + 2], made) for i in range(0, len(weight), 2)]
    known, blocks = known or {}, []
    for first in range(0, count, rows or count):
        last = min(first + (rows or count), count)
        spans = codec.spans(made, first, last)
        kept = {p: known[p] if spans[p] is None else known[p][spans[p][1] : spans[p][2]] for p in known}
        blocks.append(codec.encode(weight[first:last], made, first, {"measured": np.max(measured, axis=0), **kept}))
    whole = codec.spans(made, 0, count)
    return {p: blocks[0][p] if s is None else np.concatenate([b[p] for b in blocks]) for p, s in whole.items()}


def kept(parts):
    """What is not codes."""
    return {part: array for part, array in parts.items() if part not in CODES}


def group(**change):
    """A change of the arguments of weights."""
    return lambda config: config["config_groups"]["group_0"]["weights"].update(change)


def top(**change):
    """A change of the config itself."""
    return lambda config: config.update(change)


def stored(form):
    """A change of format, of the group and the config."""
    return lambda config: (config.update(format=form), config["config_groups"]["group_0"].update(format=form))


every_golden = pytest.mark.parametrize("case", [pytest.param(Golden(n), id=n) for n in NAMES])
HERE = [n for n in NAMES if "fp4" not in n]
golden = pytest.mark.parametrize("case", [pytest.param(Golden(n), id=n) for n in HERE])


@golden
def test_decoding_is_the_librarys(case):
    made, dtype = case.settings, DTYPES[case.types["decoded"]]
    values = case.codec.decode(case.parts, made, 0, made["shape"][0])
    assert values.dtype == np.float32 and values.shape == tuple(made["shape"])
    bits = round_nearest(values.astype(np.float64), dtype)
    assert bits.tobytes() == case.decoded.tobytes()


@every_golden
def test_layout_is_what_was_found(case):
    assert case.codec.layout(case.settings) == case.found


@every_golden
def test_rows_may_be_cut_anywhere(case):
    made = case.settings
    rows = made["shape"][0]
    whole = case.codec.decode(case.parts, made, 0, rows)
    for first in range(rows):
        for last in range(first + 1, rows + 1):
            block = case.codec.decode(cut(case.codec, made, case.parts, first, last), made, first, last)
            assert block.tobytes() == whole[first:last].tobytes()


@every_golden
def test_decoding_leaves_the_parts_alone(case):
    parts = {part: array.copy() for part, array in case.parts.items()}
    case.codec.decode(parts, case.settings, 0, case.settings["shape"][0])
    assert all(np.array_equal(parts[part], array) for part, array in case.parts.items())


@every_golden
def test_stored_scales_give_the_same_codes(case):
    made = case.settings
    values = case.codec.decode(case.parts, made, 0, made["shape"][0])
    for rows in (None, case.codec.align(made), 3 * case.codec.align(made)):
        again = encoded(case.codec, made, values, kept(case.parts), rows)
        assert all(np.array_equal(again[part], array) for part, array in case.parts.items())
        assert all(again[part].dtype == array.dtype for part, array in case.parts.items())


@every_golden
def test_new_parts_do_not_depend_on_the_blocks(case):
    made, order = case.settings, {p: a for p, a in case.parts.items() if p == "weight_g_idx"}
    whole = encoded(case.codec, made, case.weight, order)
    blocks = encoded(case.codec, made, case.weight, order, case.codec.align(made))
    assert {p: a.tobytes() for p, a in whole.items()} == {p: a.tobytes() for p, a in blocks.items()}
    assert case.codec.layout(made) == {p: (case.types[p], a.shape) for p, a in whole.items()}


@golden
def test_new_scales_are_the_librarys_and_codes_too_but_for_ties(case):
    """The library divides in float32, where an end of the range falls on a tie that the exact quotient may miss."""
    made, order = case.settings, {p: a for p, a in case.parts.items() if p == "weight_g_idx"}
    parts = encoded(case.codec, made, case.weight, order)
    assert all(np.array_equal(parts[p], a) for p, a in kept(case.parts).items())
    rows = made["shape"][0]
    ours = case.codec.decode(parts, made, 0, rows).astype(np.float64)
    theirs = case.codec.decode(case.parts, made, 0, rows).astype(np.float64)
    error, other = np.abs(ours - case.weight), np.abs(theirs - case.weight)
    assert (error <= other * (1 + 2**-20)).all()
    assert (ours != theirs).mean() < 0.01


def step_errors(case, made, parts):
    """How far values are from the weight, in distances between the codes there."""
    values = case.codec.decode(parts, made, 0, made["shape"][0]).astype(np.float64)
    ones = np.ones(made["shape"], np.float32)
    scales = {part: parts[part] for part in ("weight_scale", "weight_g_idx") if part in parts}
    scaled.rescale(ones, scales, made, 0, made["shape"][0])
    error = np.abs(values - case.weight) / ones
    if made["codes"] != "F8_E4M3":
        return error
    magnitude = np.abs(decode_float(parts["weight"], "F8_E4M3")).astype(np.float64)
    return error / 2.0 ** (np.floor(np.log2(np.maximum(magnitude, 2.0**-6))) - 3)


@golden
def test_new_scales_err_by_half_a_step(case):
    """And by what a scale that was rounded down to its type leaves past the end of the range.

    Half a range is 2^(bits−1) steps of integers, and 14 of e4m3, where they are widest. A power of two for a scale
    leaves up to 1¾·2^8 = 448, the last code.
    """
    made, order = case.settings, {p: a for p, a in case.parts.items() if p == "weight_g_idx"}
    parts = encoded(case.codec, made, case.weight, order)
    half_ulp = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11, "U8": 0.0}[made["scale"][0]]
    steps = 2 ** (made["weights"]["num_bits"] - 1) if made["weights"]["type"] == "int" else 14
    if not made["weights"]["symmetric"]:
        steps *= 2
    assert step_errors(case, made, parts).max() <= 0.5 + steps * half_ulp + 2.0**-18


@golden
def test_zeros_stay_zero_and_scales_are_never_zero(case):
    made, order = case.settings, {p: a for p, a in case.parts.items() if p == "weight_g_idx"}
    parts = encoded(case.codec, made, np.zeros_like(case.weight), order)
    assert not case.codec.decode(parts, made, 0, made["shape"][0]).any()
    assert (scaled.scale_values(parts["weight_scale"], made) > 0).all()


@golden
def test_a_stored_scale_of_zero_takes_any_value_to_zero(case):
    made = case.settings
    if made["scale"][0] == "U8":
        return  # has no zero
    known = {**kept(case.parts), "weight_scale": np.zeros_like(case.parts["weight_scale"])}
    parts = encoded(case.codec, made, case.weight, known)
    assert not case.codec.decode(parts, made, 0, made["shape"][0]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@golden
def test_what_has_no_code_is_refused(case, bad):
    made, weight = case.settings, case.weight.copy()
    weight[0, 1] = bad
    with pytest.raises(ValueError, match="rows from 0 have values that are NaN or infinite"):
        case.codec.encode(weight, made, 0, kept(case.parts))


SHAPES = [(1, 128), (3, 128), (200, 256), (9, 384), (130, 130)]
FRESH = [
    (compressed_pack, {"scheme": "W4A16"}), (compressed_pack, {"scheme": "W4A16_ASYM", "scale_dtype": "F32"}),
    (compressed_pack, {"scheme": "w8a16", "scale_dtype": "F16", "group_size": 32}), (compressed, {"scheme": "W8A8"}),
    (compressed, {"scheme": "FP8_DYNAMIC"}), (compressed, {"scheme": "FP8_BLOCK", "scale_dtype": "F32"}),
    (compressed, {"scheme": "MXFP8"}), (compressed, {}),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("codec", "options"), FRESH, ids=lambda x: x.get("scheme") if isinstance(x, dict) else "")
def test_a_fresh_weight_is_read_back_by_its_own_config(codec, options, shape):
    if shape == (130, 130) and options.get("scheme", "FP8_DYNAMIC") not in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK"):
        with pytest.raises(ValueError, match="a row has 130 values, which is no multiple of its group_size"):
            codec.fresh(shape, options)
        return
    made = codec.fresh(shape, options)
    weight = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    parts = encoded(codec, made, weight, rows=codec.align(made) * 2)
    found = {part: (dtype, parts[part].shape) for part, (dtype, _) in codec.layout(made).items()}
    config = json.loads(json.dumps(codec.config(made, ["lm_head"])))
    assert codec.settings(config, "model.layers.0.mlp.up_proj", found, parts.__getitem__) == made
    values = codec.decode(parts, made, 0, shape[0])
    step = 2 * np.abs(weight).max() / 2 ** made["weights"]["num_bits"]
    bound = np.abs(weight) / 16 + step / 8 if made["codes"] == "F8_E4M3" else step  # e4m3 has 3 bits of fraction
    assert (np.abs(values - weight) <= bound).all()
    with pytest.raises(ValueError, match="lm_head is quantised, but"):
        codec.settings(config, "lm_head", found, parts.__getitem__)


def test_ragged_blocks_are_cut_by_block_structure():
    """40 rows in blocks of 16 are 16, 16 and 8; compressed-tensors' decompress would make them three of 13."""
    case = Golden("fp8-block-ragged")
    scales, made = case.parts["weight_scale"], case.settings
    parts = {"weight": np.full((40, 40), 0x38, np.uint8), "weight_scale": scales}
    values = compressed.decode(parts, made, 0, 40)
    assert (values == np.repeat(np.repeat(scales, 16, 0)[:40], 16, 1)[:, :40]).all()


def test_one_block_that_is_larger_than_the_weight_is_encoded_whole():
    made = compressed.fresh((20, 300), {"scheme": "FP8_BLOCK"})
    assert compressed.align(made) == 128
    assert compressed.align(compressed.fresh((20, 100), {"scheme": "FP8_BLOCK"})) == 1  # measured


def test_a_symmetric_weight_with_a_zero_point_is_read_with_it():
    case = Golden("int8-asym")
    symmetric = lambda config: config["config_groups"]["group_0"]["weights"].update(symmetric=True)  # noqa: E731
    made = settings(case, change=symmetric)
    assert made["zero_point"] == ["I8", [12, 1]]
    assert np.array_equal(compressed.decode(case.parts, made, 0, 12), case.decoded)
    assert not encoded(compressed, made, case.weight)["weight_zero_point"].any()


def test_an_order_that_was_never_set_is_none():
    case = Golden("pack4-order")
    parts = {**case.parts, "weight_g_idx": np.full(64, -1, np.int32)}
    made = compressed_pack.settings(case.config, "m", case.found, parts.__getitem__)
    assert not made["ordered"] and compressed_pack.layout(made) == case.found
    plain = compressed_pack.decode(parts, made, 0, 8)
    other = compressed_pack.decode(case.parts, case.settings, 0, 8)
    assert np.array_equal(plain[:, :16] == 0, other[:, :16] == 0) and not np.array_equal(plain, other)


@pytest.mark.parametrize("name", ["compressed-tensors-w4a16", "compressed-tensors-fp8-dynamic"])
def test_real_checkpoints_are_read_and_lie_near_their_base(name):
    safetensors = pytest.importorskip("safetensors.numpy")
    if not (DATA / name).is_dir():
        pytest.skip("no checkpoints here")
    torch, safe_open = pytest.importorskip("torch"), pytest.importorskip("safetensors").safe_open
    assert safetensors
    codec = compressed_pack if "w4" in name else compressed
    config = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    types = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int32": "I32", "int64": "I64"}
    with (
        safe_open(DATA / name / "model.safetensors", "pt") as file,
        safe_open(next((DATA / "base-bf16").glob("*.safetensors")), "pt") as base,
    ):
        module = "model.layers.0.mlp.down_proj"
        stored = {
            p: file.get_tensor(module + s)
            for p, s in (codec.PARTS | codec.OPTIONAL).items()
            if module + s in file.keys()  # noqa: SIM118
        }
        original = base.get_tensor(f"{module}.weight").float().numpy()
    found = {p: (types[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for p, t in stored.items()}
    views = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    parts = {p: t.view(views.get(t.dtype, t.dtype)).numpy() for p, t in stored.items()}
    made = codec.settings(config, module, found, parts.__getitem__)
    assert codec.layout(made) == found
    values = codec.decode(parts, made, 0, made["shape"][0])
    assert values.shape == original.shape
    assert np.abs(values - original).max() / np.abs(original).max() < (0.2 if "w4" in name else 0.05)
