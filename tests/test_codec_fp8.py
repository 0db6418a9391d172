"""FP8 weights: against transformers, against numpy in float64, and the laws of the protocol."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inlay.codecs import fp8
from inlay.codecs.floats import LARGEST, table
from inlay.dtypes import BF16, DTYPES, decode32

GOLDEN = Path(__file__).parent / "golden" / "fp8.npz"
REAL = Path(__file__).parents[2] / "shared" / "data" / "quantised"  # beside the repository, where there are any
BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 16]}
WHOLE = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
INV, PLAIN = "weight_scale_inv", "weight_scale"


@dataclass(frozen=True)
class Case:
    """A weight in the golden file: how its config and its names declare it."""

    name: str
    config: Any
    scale: str = INV
    dtype: str = "F8_E4M3"
    scale_dtype: str = "F32"
    strategy: str = "block"

    @property
    def parts(self) -> dict[str, Any]:
        with np.load(GOLDEN) as file:
            return {"weight": file[f"{self.name}/weight"], self.scale: file[f"{self.name}/scale"]}

    @property
    def decoded(self) -> Any:
        with np.load(GOLDEN) as file:
            decoded = file[f"{self.name}/decoded"]
        return decoded.reshape(-1, decoded.shape[-1])

    @property
    def found(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        types = {"weight": self.dtype, self.scale: self.scale_dtype}
        return {name: (types[name], part.shape) for name, part in self.parts.items()}

    @property
    def settings(self) -> Any:
        return json.loads(json.dumps(fp8.settings(self.config, "q.weight", self.found, lambda part: self.parts[part])))


CASES = (
    Case("block", BLOCKS),
    Case("block-e5m2", {**BLOCKS, "fmt": "e5m2"}, dtype="F8_E5M2"),
    Case("block-bf16", {**BLOCKS, "fmt": "float8_e4m3fn"}, scale_dtype="BF16"),
    Case("block-row", BLOCKS),
    Case("ue8m0", {**BLOCKS, "scale_fmt": "ue8m0"}, scale_dtype="F8_E8M0"),
    Case("mxfp8", {**BLOCKS, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, scale_dtype="U8"),
    Case("tensor", WHOLE, strategy="tensor"),
    Case("tensor-bf16", {"quant_method": "modelopt", "quant_algo": "FP8"}, PLAIN, "F8_E4M3", "BF16", "tensor"),
    Case("channel", {"quant_method": "fbgemm_fp8"}, PLAIN, strategy="channel"),
    Case("experts", BLOCKS),
    Case("experts-ragged", BLOCKS),
    Case("experts-halves", WHOLE, strategy="tensor"),
)
every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


def cut(parts: Any, settings: Any, first: int, last: int) -> Any:
    spans = fp8.spans(settings, first, last)
    assert spans.keys() == parts.keys()
    return {name: part if (s := spans[name]) is None else part[s[1] : s[2]] for name, part in parts.items()}


def decoded(parts: Any, settings: Any, first: int = 0, last: int | None = None) -> Any:
    last = int(np.prod(settings["shape"][:-1])) if last is None else last
    return fp8.decode(cut(parts, settings, first, last), settings, first, last)


def encoded(weight: Any, settings: Any, stored: Any = None, blocks: int = 1) -> Any:
    """Encoded `blocks` times `align` rows at a time, put together again."""
    step, scale = fp8.align(settings) * blocks, settings["scale"]
    measured = [fp8.measure(weight[i : i + step], settings) for i in range(0, len(weight), step)]
    pieces = []
    for first in range(0, len(weight), step):
        rows = weight[first : first + step]
        known = {"measured": np.maximum.reduce(measured)}
        if stored is not None:
            known[scale] = cut(stored, settings, first, first + len(rows))[scale]
        pieces.append(fp8.encode(rows, settings, first, known))
        want = cut(pieces[-1] if stored is None else stored, settings, first, first + len(rows))
        assert stored is None or {k: v.shape for k, v in pieces[-1].items()} == {k: v.shape for k, v in want.items()}
    whole = {"weight": np.concatenate([piece["weight"] for piece in pieces])}
    if fp8.spans(settings, 0, 1)[scale] is None:
        assert all(piece[scale].tobytes() == pieces[0][scale].tobytes() for piece in pieces)
        return {**whole, scale: pieces[0][scale]}
    return {**whole, scale: np.concatenate([piece[scale] for piece in pieces])}


def wide_scales(parts: Any, settings: Any) -> Any:
    """The scale of each value, float64, worked out with no function of the codec but its tables."""
    stored, dtype = parts[settings["scale"]], settings["scale_dtype"]
    values = table("F8_E8M0")[stored] if dtype in ("U8", "F8_E8M0") else decode32(np.atleast_1d(stored), DTYPES[dtype])
    *lead, out, columns = settings["shape"]
    rows, across = settings["block"]
    if values.size == 1:
        return np.full((int(np.prod([*lead, out])), columns), float(values.reshape(())))
    grid = values.astype(np.float64).reshape(*lead, -(-out // rows), -(-columns // across))
    wide = np.repeat(np.repeat(grid, rows, axis=-2)[..., :out, :], across, axis=-1)[..., :columns]
    return wide.reshape(-1, columns)


@every_case
def test_decoding_equals_transformers(case: Case) -> None:
    got, want = decoded(case.parts, case.settings), case.decoded
    assert got.dtype == np.float32
    assert np.isnan(got).tobytes() == np.isnan(want).tobytes()
    there = ~np.isnan(want)
    assert got[there].tobytes() == want[there].tobytes()
    assert case.settings["strategy"] == case.strategy and "inferred" not in case.settings


@every_case
def test_rows_do_not_depend_on_the_cut(case: Case) -> None:
    parts, settings, want = case.parts, case.settings, decoded(case.parts, case.settings)
    for bounds in (range(len(want) + 1), (0, min(7, len(want)), len(want)), (0, len(want) // 2, len(want))):
        pieces = [decoded(parts, settings, a, b) for a, b in pairwise(bounds) if a < b]
        assert np.concatenate(pieces).tobytes() == want.tobytes()


@every_case
def test_layout_is_what_was_found(case: Case) -> None:
    assert fp8.layout(case.settings) == case.found


@every_case
@pytest.mark.parametrize("blocks", [1, 2])
def test_stored_scales_give_the_same_codes(case: Case, blocks: int) -> None:
    parts, settings = case.parts, case.settings
    parts["weight"] = np.where(np.isfinite(table(case.dtype)[parts["weight"]]), parts["weight"], 1).astype(np.uint8)
    if case.scale_dtype in ("F8_E8M0", "U8"):  # so that no product is too large or too small for float32
        parts[case.scale] = np.clip(parts[case.scale], 20, 230)
    again = encoded(decoded(parts, settings), settings, parts, blocks)
    assert {name: part.tobytes() for name, part in again.items()} == {n: p.tobytes() for n, p in parts.items()}


@every_case
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e30, 1e-42])
def test_new_scales_err_by_half_a_step(case: Case, size: float) -> None:
    settings = case.settings
    count = int(np.prod(settings["shape"][:-1]))
    weight = (np.random.default_rng(3).standard_normal((count, settings["shape"][-1])) * size).astype(np.float32)
    weight[0, :3] = 0, -0.0, weight[0, 2]
    parts = encoded(weight, settings)
    assert {name: part.shape for name, part in parts.items()} == {n: s for n, (_, s) in fp8.layout(settings).items()}
    assert all(
        a.tobytes() == b.tobytes()
        for a, b in zip(parts.values(), encoded(weight, settings, None, 2).values(), strict=True)
    )
    scale = wide_scales(parts, settings)
    levels = np.unique(table(case.dtype)[np.isfinite(table(case.dtype))].astype(np.float64))
    quotient = weight.astype(np.float64) / scale
    got = table(case.dtype)[parts["weight"]].reshape(quotient.shape).astype(np.float64)
    best = np.abs(levels[:, None] - quotient.reshape(-1)).min(axis=0).reshape(quotient.shape)
    np.testing.assert_array_equal(np.abs(got - quotient), best)
    step = LARGEST[case.dtype] / 14 if case.dtype == "F8_E4M3" else LARGEST[case.dtype] / 7
    assert (best <= step / 2).all()  # the step below the largest code: nothing was cut off
    if settings["scale_fmt"] == "ue8m0" and size > 1e-30:
        assert (np.frexp(scale)[0] == 0.5).all()


def test_a_block_of_zeros_has_the_scale_one() -> None:
    settings = fp8.fresh((8, 16), {"weight_block_size": [8, 8]})
    weight = np.zeros((8, 16), np.float32)
    weight[:, 8:] = -3.5
    parts = encoded(weight, settings)
    assert parts[INV].tolist() == [[1.0, np.float32(3.5 / 448)]]
    assert decoded(parts, settings).tobytes() == weight.tobytes()


def test_a_stored_scale_of_zero_makes_zeros() -> None:
    settings = fp8.fresh((2, 4), {"weight_block_size": [1, 4]})
    stored = {"weight": np.zeros((2, 4), np.uint8), INV: np.array([[0.0], [-2.0]], np.float32)}
    parts = encoded(np.full((2, 4), 3.0, np.float32), settings, stored)
    assert decoded(parts, settings).tolist() == [[0.0] * 4, [3.0] * 4]


def test_a_quotient_beside_a_tie_goes_to_the_nearer_code() -> None:
    """Two neighbours around 17 scales, of which float32 takes at least one for 17 itself, between 16 and 18."""
    settings = fp8.fresh((1, 2), {"weight_block_size": [1, 2]})
    for step in range(1, 200, 2):
        scale = np.float32(1 + 2**-12 + step * 2**-23)
        near = np.float32(17 * float(scale))
        other = np.nextafter(near, np.float32(0 if float(near) > 17 * float(scale) else 99))
        below, above = sorted([near, other])
        assert float(below) < 17 * float(scale) < float(above) and 17 in (below / scale, above / scale)
        for sign in (1, -1):
            stored = {"weight": np.zeros((1, 2), np.uint8), INV: (sign * scale).reshape(1, 1)}
            parts = encoded(np.array([[above, below]]), settings, stored)
            assert (sign * table("F8_E4M3")[parts["weight"]]).tolist() == [[18.0, 16.0]]


def test_a_bfloat16_scale_keeps_the_largest_value_in_reach() -> None:
    settings = {**fp8.fresh((1, 16), {"weight_block_size": [1, 16]}), "scale_dtype": "BF16"}
    for value in np.linspace(1, 2, 301, dtype=np.float32):
        parts = encoded(np.full((1, 16), value), settings)
        assert parts[INV].dtype == np.uint16
        ratio = decode32(parts[INV], BF16)[0, 0] * 448 / value
        assert abs(ratio - 1) <= 2**-8
        assert decoded(parts, settings)[0, 0] / value == pytest.approx(1, abs=2**-8)


@pytest.mark.parametrize("name", ["float", "ue8m0"])
def test_encoding_is_that_of_transformers(name: str) -> None:
    """Their scale is a reciprocal of a reciprocal and their quotient a product: each a rounding or two away."""
    with np.load(GOLDEN) as file:
        values, weight, scale = (file[f"quantize-{name}/{part}"] for part in ("values", "weight", "scale"))
    settings = fp8.fresh(values.shape, {"weight_block_size": [8, 16], "scale_fmt": name})
    parts = encoded(values, settings)
    if name == "ue8m0":
        assert parts[INV].tobytes() == scale.tobytes() and parts["weight"].tobytes() == weight.tobytes()
    else:
        np.testing.assert_allclose(parts[INV], scale, rtol=2**-22, atol=0)
        given = encoded(values, settings, {"weight": weight, INV: scale})
        assert (given["weight"] != weight).mean() < 0.01
        wide = wide_scales(given, settings)
        ours, theirs = (np.abs(table("F8_E4M3")[codes] * wide - values) for codes in (given["weight"], weight))
        assert (ours <= theirs).all()


OPTIONS = (
    ((300, 200), {}, "block"), ((3, 130, 200), {"scale_fmt": "ue8m0"}, "block"), ((9, 7), {"fmt": "e5m2"}, "block"),
    ((9, 7), {"weight_block_size": [1, 4]}, "block"), ((9, 7), {"strategy": "channel"}, "channel"),
    ((9, 7), {"strategy": "tensor"}, "tensor"), ((3, 9, 7), {"strategy": "tensor", "fmt": "e5m2"}, "tensor"),
)  # fmt: skip


@pytest.mark.parametrize(("shape", "options", "strategy"), OPTIONS)
def test_a_fresh_weight_is_what_its_config_declares(shape: Any, options: Any, strategy: str) -> None:
    settings = json.loads(json.dumps(fp8.fresh(shape, options)))
    config = json.loads(json.dumps(fp8.config(settings, ["lm_head"])))
    assert fp8.settings(config, "q.weight", fp8.layout(settings), lambda part: np.empty(0)) == settings
    assert settings["strategy"] == strategy and config["modules_to_not_convert"] == ["lm_head"]
    assert config["quant_method"] in fp8.METHODS
    one = int(np.prod(settings["scale_shape"])) == 1  # measured beforehand, so rows are free
    rows = shape[1] if len(shape) == 3 else 1 if one or strategy == "channel" else config["weight_block_size"][0]
    assert fp8.align(settings) == rows
    weight = np.random.default_rng(5).standard_normal((int(np.prod(shape[:-1])), shape[-1]), np.float32)
    parts = encoded(weight, settings)
    values = table(settings["dtype"])[parts["weight"]].reshape(weight.shape).astype(np.float64)
    want = (values * wide_scales(parts, settings)).astype(np.float32)
    assert decoded(parts, settings).tobytes() == want.tobytes()


def test_the_config_of_a_scale_a_tensor_is_that_of_autofp8() -> None:
    found = {"weight": ("F8_E4M3", (4, 4)), PLAIN: ("F32", (1,))}
    settings = fp8.settings({"quant_method": "fp8"}, "q.weight", found, lambda part: np.empty(0))
    config = fp8.config(settings, ["lm_head"])
    assert config["ignored_layers"] == ["lm_head"] and "weight_block_size" not in config
    with pytest.raises(ValueError, match="keep that of the base"):
        fp8.config({**settings, "strategy": "channel", "scale": INV}, [])


@pytest.mark.parametrize(
    ("shape", "grid", "strategy"),
    [((256, 512), (2, 4), "block"), ((300, 64), (3, 1), "block"), ((4, 130, 300), (4, 2, 3), "block"),
     ((64, 64), (1, 1), "block"), ((256, 256), (), "tensor"), ((256, 256), (256, 1), "channel")],
)  # fmt: skip
def test_without_a_config_only_what_is_certain_is_inferred(shape: Any, grid: Any, strategy: str) -> None:
    found = {"weight": ("F8_E4M3", shape), INV: ("F32", grid)}
    settings = fp8.settings({}, "q.weight", found, lambda part: np.empty(0))
    assert settings["strategy"] == strategy
    assert settings.get("inferred", False) is (strategy == "block")


W, S = ("F8_E4M3", (256, 256)), ("F32", (2, 2))


@pytest.mark.parametrize(
    ("config", "found", "said"),
    [
        (BLOCKS, {"weight": W}, "has neither of q.weight_scale_inv and q.weight_scale"),
        (BLOCKS, {"weight": W, INV: S, PLAIN: S}, "has both"),
        (BLOCKS, {"weight": ("I8", (256, 128)), INV: S}, "is I8"),
        (BLOCKS, {"weight": ("F8_E4M3FNUZ", (256, 256)), INV: S}, "is F8_E4M3FNUZ"),
        ({**BLOCKS, "fmt": "e5m2"}, {"weight": W, INV: S}, "says fmt 'e5m2'"),
        ({**BLOCKS, "scale_fmt": "e4m3"}, {"weight": W, INV: S}, "scale_fmt 'e4m3'"),
        ({**BLOCKS, "weight_block_size": [128]}, {"weight": W, INV: S}, "two positive integers"),
        ({**BLOCKS, "weight_block_size": [128, 0]}, {"weight": W, INV: S}, "two positive integers"),
        (BLOCKS, {"weight": W, INV: S}, r"weight_block_size \[8, 16\] makes it \[32, 16\]"),
        (BLOCKS, {"weight": W, INV: ("F32", ())}, "makes it"),
        (WHOLE, {"weight": W, INV: S}, "with weight_block_size null"),
        ({}, {"weight": W, INV: ("F32", (4, 4))}, "blocks of 128 do not make"),
        ({}, {"weight": W, PLAIN: ("F32", (3,))}, "blocks of 128 do not make"),
        (BLOCKS, {"weight": W, INV: ("I64", (2, 2))}, "scales of FP8 are"),
        (BLOCKS, {"weight": ("F8_E4M3", (8, 8, 3, 3)), INV: S}, "FP8 weights are"),
        ({"quant_method": "fbgemm_fp8"}, {"weight": ("F8_E4M3", (2, 8, 8)), PLAIN: ("F32", (2, 8, 1))}, "transposed"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(config: Any, found: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fp8.settings(config, "q.weight", found, lambda part: np.empty(0))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"bits": 8}, "no option bits"), ({"strategy": "group"}, "strategy 'group'"), ({"fmt": "e3m4"}, "fmt 'e3m4'"),
     ({"strategy": "tensor", "scale_fmt": "ue8m0"}, "belong to strategy block"), ({"weight_block_size": 128}, "two positive"),
     ({"scale_fmt": "e8m0"}, "scale_fmt 'e8m0'")],
)  # fmt: skip
def test_options_that_are_not_known_are_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fp8.fresh((8, 8), options)


def test_weights_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be FP8"):
        fp8.fresh((8, 8, 3, 3), {})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        fp8.encode(np.full((8, 8), value, np.float32), fp8.fresh((8, 8), {}), 0, {})


@pytest.mark.skipif(not REAL.is_dir(), reason="real checkpoints are not here")
def test_a_real_checkpoint_is_near_its_base() -> None:
    """Within half a step, 2^-4 of the value, and half of the rounding to bfloat16 of the base."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    stored = safetensors.load_file(REAL / "fp8-block-deepseek-style" / "model.safetensors")
    base = safetensors.load_file(REAL / "base-bf16" / "model.safetensors")
    config = json.loads((REAL / "fp8-block-deepseek-style" / "config.json").read_text())["quantization_config"]
    names = [name for name in stored if str(stored[name].dtype) == "torch.float8_e4m3fn"]
    assert len(names) == 28
    for name in names:
        parts = {
            "weight": stored[name].view(torch.uint8).numpy(),
            INV: stored[name + "_scale_inv"].numpy(),
        }
        found = {"weight": ("F8_E4M3", parts["weight"].shape), INV: ("F32", parts[INV].shape)}
        for said in (config, {}):
            settings = fp8.settings(said, name, found, lambda part: np.empty(0))
            want, got = base[name].float().numpy(), decoded(parts, settings)
            scale = wide_scales(parts, settings)
            assert (np.abs(got - want) <= np.maximum(np.abs(want) / 16, scale * 2**-10) * 1.01).all()
