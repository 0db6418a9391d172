"""Codes of 4 bits in e2m1: NVFP4 and MXFP4 of compressed-tensors, and NVIDIA ModelOpt with all its forms.

The laws that hold for every codec are tested over these too in `test_codec_compressed`. ModelOpt itself is not at hand:
its formulas are written out below from its sources, and compressed-tensors' converter of its checkpoints is a second
opinion.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch

from inlay.codecs import compressed_fp4, modelopt
from inlay.codecs.floats import E2M1, encode_float, table
from inlay.dtypes import BF16, decode32, round_nearest
from test_codec_compressed import Golden, encoded, group, kept, settings, stored, top

NV, MX, OPT = Golden("nvfp4"), Golden("mxfp4"), Golden("modelopt-nvfp4")
each = pytest.mark.parametrize("case", [NV, MX, OPT], ids=lambda c: c.name)


def values_of(case, parts=None, made=None):
    """All rows."""
    made = made or case.settings
    return case.codec.decode(parts or case.parts, made, 0, made["shape"][0])


@pytest.mark.parametrize("case", [NV, MX], ids=lambda c: c.name)
def test_decoding_is_the_librarys_rounded_once(case):
    assert case.types["decoded"] == "BF16"
    assert round_nearest(values_of(case).astype(np.float64), BF16).tobytes() == case.decoded.tobytes()


def test_modelopt_lies_within_a_step_of_what_its_conversion_gives():
    """The conversion inverts the scale of the tensor, two roundings of float32, and rounds values to bfloat16."""
    theirs = decode32(OPT.decoded, BF16)
    assert (np.abs(values_of(OPT) - theirs) <= np.abs(theirs) * (2.0**-8 + 2.0**-22)).all()


def one_by_one(codes, scales, second, form):
    """Each value by itself: the step in float32, then the product."""
    rows, octets = codes.shape
    values = np.empty((rows, octets * 2), np.float32)
    size = octets * 2 // scales.shape[1]
    for row, column in np.ndindex(values.shape):
        code = int(codes[row, column // 2]) >> 4 * (column % 2) & 15
        raw = scales[row, column // size : column // size + 1]
        if form == "mxfp4":
            step = raw.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0]
        else:
            scale = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[0]
            step = scale / second if form == "nvfp4" else scale * second
        values[row, column] = E2M1[code] * step
    return values


@each
def test_the_lower_bits_come_first_and_the_step_is_rounded_first(case):
    parts = case.parts
    second = next((a.reshape(-1)[0] for p, a in parts.items() if p in ("weight_global_scale", "weight_scale_2")), None)
    codes = parts["weight" if case is OPT else "weight_packed"]
    expected = one_by_one(codes, parts["weight_scale"], second, case.name)
    assert values_of(case).tobytes() == expected.tobytes()


def test_new_parts_are_those_of_compressed_tensors():
    for case in (NV, MX):
        parts = encoded(case.codec, case.settings, case.weight)
        assert {p: a.tobytes() for p, a in parts.items()} == {p: a.tobytes() for p, a in case.parts.items()}


def modelopt_parts(weight):
    """NVFP4QTensor.quantize, written out in torch from NVIDIA/Model-Optimizer, qtensor/nvfp4_tensor.py."""
    weight = torch.from_numpy(weight)
    second = weight.abs().max() / (6.0 * 448.0)
    groups = weight.unflatten(1, (-1, 16))
    scale = groups.abs().amax(-1) / (6.0 * second)
    scale[scale == 0] = 1.0
    scale = scale.clamp(min=2**-9).to(torch.float8_e4m3fn)
    quotients = (groups / (scale.float() * second).unsqueeze(-1)).flatten(1)
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    magnitude = quotients.abs()
    code = torch.searchsorted(bounds, magnitude) + (magnitude.unsqueeze(-1) == bounds[[1, 3, 5]]).any(-1).long()
    code = code.to(torch.uint8) + ((quotients < 0).to(torch.uint8) << 3)
    packed = code[:, 1::2] << 4 | code[:, ::2]
    return {"weight": packed.numpy(), "weight_scale": scale.view(torch.uint8).numpy(), "weight_scale_2": second.numpy()}


@pytest.mark.parametrize("seed", range(4))
def test_new_parts_are_those_of_modelopt(seed):
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((7, 96)) * 10.0 ** random.integers(-3, 2, (7, 1))).astype(np.float32)
    weight[1, :16] = 0
    made = modelopt.fresh(weight.shape, {})
    parts = encoded(modelopt, made, weight)
    assert {p: a.tobytes() for p, a in parts.items()} == {p: a.tobytes() for p, a in modelopt_parts(weight).items()}


@each
def test_new_scales_err_by_half_a_step(case):
    """The widest step of e2m1 is 2, from 4 to 6; past 6, a group ends at most at 7 (MXFP4) or 6·(1 + 2^-4) (NVFP4)."""
    random = np.random.default_rng(8)
    weight = random.standard_normal((40, 64), dtype=np.float32)
    made = {**case.settings, "shape": [40, 64]}
    parts = encoded(case.codec, made, weight)
    codes = parts["weight" if case is OPT else "weight_packed"]
    magnitude = np.abs(E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(40, 64)])
    step = np.select([magnitude < 2, magnitude < 4], [0.5, 1.0], 2.0)
    ones = {**parts, "weight" if case is OPT else "weight_packed": np.full_like(codes, 0x22)}
    scale = case.codec.decode(ones, made, 0, 40)
    error = np.abs(case.codec.decode(parts, made, 0, 40).astype(np.float64) - weight)
    assert (error <= step * scale / 2 * (1 + 2.0**-20)).all()


@each
def test_zeros_stay_zero_and_no_scale_is_zero(case):
    made = case.settings
    parts = encoded(case.codec, made, np.zeros_like(case.weight))
    assert not values_of(case, parts, made).any()
    finite = table("F8_E8M0" if case is MX else "F8_E4M3")[parts["weight_scale"]]
    assert (finite > 0).all() and np.isfinite(finite).all()


def test_a_tensor_too_small_for_a_global_scale_has_1():
    weight = np.full((1, 16), 1e-38, np.float32)
    parts = encoded(compressed_fp4, compressed_fp4.fresh((1, 16), {}), weight)
    assert parts["weight_global_scale"].tolist() == [1.0]


@each
def test_stored_scales_of_zero_take_any_value_to_zero(case):
    known = {**kept(case.parts), "weight_scale": np.zeros_like(case.parts["weight_scale"])}
    if case is MX:
        known["weight_scale"] += 127  # has no zero
    parts = encoded(case.codec, case.settings, case.weight, known)
    assert values_of(case, parts).any() == (case is MX)


@each
def test_what_has_no_code_is_refused(case):
    weight = case.weight.copy()
    weight[2, 3] = np.nan
    with pytest.raises(ValueError, match="rows from 0 have values that are NaN or infinite"):
        case.codec.encode(weight, case.settings, 0, kept(case.parts))


@pytest.mark.parametrize("case", [NV, OPT], ids=lambda c: c.name)
def test_scales_of_groups_are_not_kept_without_that_of_the_tensor(case):
    with pytest.raises(ValueError, match="weight_scale is to be kept without weight_"):
        case.codec.encode(case.weight, case.settings, 0, {"weight_scale": case.parts["weight_scale"]})


FRESH = [
    (compressed_fp4, {"scheme": "NVFP4A16"}), (compressed_fp4, {"scheme": "mxfp4a16"}), (modelopt, {}),
    (modelopt, {"scheme": "FP8_PER_CHANNEL_PER_TOKEN"}), (modelopt, {"scheme": "FP8_PB_WO"}), (modelopt, {"scheme": "MXFP8"}),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 128), (130, 256), (7, 64)], ids=str)
@pytest.mark.parametrize(("codec", "options"), FRESH, ids=lambda x: x.get("scheme") if isinstance(x, dict) else "")
def test_a_fresh_weight_is_read_back_by_its_own_config(codec, options, shape):
    made = codec.fresh(shape, options)
    weight = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    parts = encoded(codec, made, weight, rows=codec.align(made))
    found = {part: (dtype, parts[part].shape) for part, (dtype, _) in codec.layout(made).items()}
    assert codec.layout(made) == found
    config = json.loads(json.dumps(codec.config(made, ["lm_head"])))
    assert codec.settings(config, "model.layers.0.mlp.up_proj", found, parts.__getitem__) == made
    values = codec.decode(parts, made, 0, shape[0])
    again = encoded(codec, made, values, {p: a for p, a in parts.items() if p not in ("weight", "weight_packed")})
    assert all(np.array_equal(again[p], a) for p, a in parts.items())
    eighths = 4 if parts[next(iter(codec.PARTS))].dtype == np.uint8 and "FP8" not in str(options) else 1
    assert (np.abs(values - weight) <= np.abs(weight) / 16 * eighths + np.abs(weight).max() / 12).all()


def opt(algorithm, **more):
    """A config of ModelOpt."""
    return {"quant_method": "modelopt", "quant_algo": algorithm, **more}


FP8 = {"weight": ("F8_E4M3", (256, 128)), "weight_scale": ("F32", ())}
STORED = [
    (opt("FP8"), (), None), (opt("fp8"), (1,), None), (opt("FP8_PER_CHANNEL_PER_TOKEN"), (256,), [1, 128]),
    (opt("FP8_PER_CHANNEL_PER_TOKEN"), (256, 1), [1, 128]), (opt("FP8_PB_WO"), (2, 1, 1, 1), [128, 128]),
    (opt("fp8_pb_wo"), (2, 1), [128, 128]), ({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, (), None),
    (opt("MIXED_PRECISION", quantized_layers={"m": {"quant_algo": "FP8"}}), (), None),
]  # fmt: skip


@pytest.mark.parametrize(("config", "shape", "cell"), STORED, ids=str)
def test_modelopt_fp8_is_read_in_each_shape_that_it_is_stored_in(config, shape, cell):
    found = {**FP8, "weight_scale": ("F32", shape)}
    made = json.loads(json.dumps(modelopt.settings(config, "m", found, {}.__getitem__)))
    assert modelopt.layout(made) == found
    random = np.random.default_rng(4)
    codes, scales = random.integers(0, 127, (256, 128), dtype=np.uint8), random.random(shape, dtype=np.float32)
    rows, columns = cell or (256, 128)
    grid = np.asarray(scales, np.float32).reshape(-(-256 // rows), -(-128 // columns))
    expected = table("F8_E4M3")[codes] * np.repeat(np.repeat(grid, rows, 0), columns, 1)
    parts = {"weight": codes, "weight_scale": np.asarray(scales)}
    for first, last in ((0, 256), (100, 131), (255, 256)):
        spans = modelopt.spans(made, first, last)
        some = {p: a if spans[p] is None else a[spans[p][1] : spans[p][2]] for p, a in parts.items()}
        assert modelopt.decode(some, made, first, last).tobytes() == expected[first:last].tobytes()


WRONG = [
    (NV, {"change": group(type="int")}, "is U8, but its config group is not symmetric float of 4 bits"),
    (NV, {"change": group(group_size=32)}, "is nvfp4-pack-quantized, but its config group has group_size 32, not 16"),
    (NV, {"change": stored("pack-quantized")}, "stored as weight_packed U8, which is nvfp4-pack-quantized or mxfp4"),
    (NV, {"weight_scale": ("U8", (5, 4))}, "weight_scale is U8; nvfp4-pack-quantized has F8_E4M3"),
    (NV, {"weight_scale": ("F8_E4M3", (5, 3))}, r"weight_scale is F8_E4M3 \[5, 3\], but in nvfp4.* it is F8_E4M3 \[5, 4\]"),
    (NV, {"weight_packed": ("U8", (2, 5, 32))}, r"weight_packed is \[2, 5, 32\], not \(out, in/2\)"),
    (NV, {"drop": ("weight_global_scale",)}, "weight_global_scale is absent, but in nvfp4-pack-quantized it is F32"),
    (NV, {"drop": ("weight_scale",)}, "weight_scale is missing"),
    (MX, {"weight_global_scale": ("F32", (1,))}, r"weight_global_scale is F32 \[1\], but in mxfp4-pack-quantized it is absent"),
    (OPT, {"pre_quant_scale": ("F16", (64,))}, "has a pre_quant_scale, which its inputs are multiplied with"),
    (OPT, {"weight": ("U8", (2, 5, 32))}, r"weight is \[2, 5, 32\]; a quantised weight is read as"),
    (OPT, {"change": top(group_size=32)}, "is NVFP4 with group_size 32; NVFP4 has groups of 16"),
    (OPT, {"change": top(quant_algo="FP8")}, "weight is U8, but quant_algo is FP8"),
    (OPT, {"change": top(quant_algo="W4A16_AWQ")}, "has quant_algo W4A16_AWQ; of ModelOpt's, these are read: NVFP4,"),
    (OPT, {"change": top(quant_algo=None)}, "has quant_algo unset"),
    (OPT, {"change": top(ignore=["*up_proj*"])}, r"is quantised, but the config excludes it \(\*up_proj\*\)"),
    (OPT, {"change": top(quant_algo="MIXED_PRECISION")}, "quantized_layers of the config does not have it"),
    (OPT, {"weight_scale_2": ("F32", (3,))}, r"weight_scale_2 is F32 \[3\], but in NVFP4 it is F32 \[\]"),
    (OPT, {"drop": ("weight_scale",)}, "weight_scale is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_what_contradicts_is_refused(case, change, message):
    settings(case)
    with pytest.raises(ValueError, match=message):
        settings(case, **change)


@pytest.mark.parametrize(
    ("codec", "options", "message"),
    [
        (compressed_fp4, {"scheme": "NVFP4"}, "scheme NVFP4 is not one that can be made here without calibration"),
        (compressed_fp4, {}, "a row of 40 values does not fill groups of 16"),
        (modelopt, {}, "a row of 40 values does not fill groups of 16"),
        (modelopt, {"scheme": "NVFP4"}, "scheme NVFP4 is not one made here without calibration"),
        (modelopt, {"bits": 4}, "options that are not known: bits"),
    ],
)
def test_what_cannot_be_made_is_refused(codec, options, message):
    with pytest.raises(ValueError, match=message):
        codec.fresh((8, 40), options)


def test_a_group_whose_scale_underflows_takes_the_least_that_is_not_zero():
    weight = np.ones((1, 32), np.float32)
    weight[0, 16:] = 1e-9
    parts = encoded(modelopt, modelopt.fresh((1, 32), {}), weight)
    assert parts["weight_scale"].tolist() == [[encode_float(np.float32([448]), "F8_E4M3")[0], 1]]
