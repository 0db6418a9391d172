"""bitsandbytes nf4, fp4 and int8: the golden file of the library, the laws of a codec, and what does not fit.

The arithmetic is float32 in the library too, so decoded values and codes are compared bit for bit.
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

from inlay.codecs import bnb4, bnb8
from inlay.dtypes import DTYPES

GOLDEN = Path(__file__).parent / "golden" / "bnb.npz"
REAL = Path(__file__).parents[2] / "shared" / "data" / "quantised"  # beside the repository, where there are any
BY_STORAGE = {torch: stored for stored, torch in bnb4.STORAGE.items()}
NAMES = (
    "nf4", "fp4", "nf4-ragged", "fp4-nested-ragged", "nf4-nested", "nf4-nested-bf16", "fp4-nested-f16",
    "fp4-large-block", "nf4-row", "nf4-as-bf16", "fp4-as-f16", "nf4-as-f32",
)  # fmt: skip
every_case = pytest.mark.parametrize("name", NAMES)
nested_cases = pytest.mark.parametrize("name", [name for name in NAMES if name == "nf4-row" or "nested" in name])
PLAIN = ("nf4", "fp4", "nf4-ragged", "fp4-large-block", "fp4-as-f16", "nf4-as-f32")  # without double quantisation
GAPS = {"nf4": 0.30380719900131226, "fp4": 1 / 3}  # the widest step between two values: half of it is the largest error


@cache
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return {key: file[key] for key in file.files}


class Case:
    """One weight of the golden file: `parts` by our names, `found` as a header would have it."""

    def __init__(self, name: str) -> None:
        self.codec = bnb8 if name == "int8" else bnb4
        held = {key.partition("/")[2]: value for key, value in golden().items() if key.startswith(f"{name}/")}
        self.parts = {
            part: held[suffix[1:]]
            for part, suffix in (self.codec.PARTS | self.codec.OPTIONAL).items()
            if suffix[1:] in held
        }
        kinds = {"uint8": "U8", "int8": "I8", "float32": "F32"}
        self.found = {part: (kinds.get(value.dtype.name, "?"), value.shape) for part, value in self.parts.items()}
        if "storage" in held:
            self.found["weight"] = BY_STORAGE[str(held["storage"])], self.parts["weight"].shape
        self.decoded = held["decoded"]
        self.weight = held["integers"].astype(np.float32) / 32768

    def settings(self, **changed: Any) -> dict[str, Any]:
        found = {part: (kind, shape) for part, (kind, shape) in {**self.found, **changed}.items() if kind}
        return json.loads(json.dumps(self.codec.settings({}, "m", found, self.parts.__getitem__)))

    def state(self, **changed: Any) -> dict[str, Any]:
        """Settings where the text of quant_state has other fields; those that are `...` are left out."""
        key = next(part for part in self.parts if part.startswith("state_"))
        state = {**json.loads(bytes(self.parts[key])), **changed}
        text = json.dumps({name: value for name, value in state.items() if value is not ...}).encode()
        self.parts[key] = np.frombuffer(text, np.uint8)
        return self.settings(**{key: ("U8", (len(text),))})


def sliced(case: Case, settings: Mapping[str, Any], first: int, last: int, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What `spans` names, at an address that no vector instruction likes."""
    taken = {}
    for part, span in case.codec.spans(settings, first, last).items():
        if part not in parts:
            continue
        assert span is None or span[0] == 0 <= span[1] < span[2] <= len(parts[part])
        values = parts[part] if span is None else parts[part][span[1] : span[2]]
        memory = np.empty(values.nbytes + 1, np.uint8)[1:]
        memory[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        taken[part] = memory.view(values.dtype).reshape(values.shape)
    return taken


def rows(case: Case, first: int, last: int) -> Any:
    settings = case.settings()
    found = case.codec.decode(sliced(case, settings, first, last, case.parts), settings, first, last)
    assert (found.dtype, found.shape) == (np.float32, (last - first, case.weight.shape[1]))
    return found


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_decodes_as_bitsandbytes(name: str) -> None:
    case = Case(name)
    assert rows(case, 0, len(case.weight)).tobytes() == case.decoded.tobytes()


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_blocks_of_rows_may_be_cut_anywhere(name: str) -> None:
    case, count = Case(name), len(Case(name).weight)
    for first in range(0, count, 1 if count < 20 else 5):
        for last in range(first + 1, count + 1):
            assert rows(case, first, last).tobytes() == case.decoded[first:last].tobytes(), (first, last)


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_layout_is_what_was_found(name: str) -> None:
    case = Case(name)
    assert case.codec.layout(case.settings()) == case.found


def encoded(case: Case, settings: Mapping[str, Any], weight: Any, known: Mapping[str, Any] | None = None) -> Any:
    """All parts of a weight, encoded in the smallest blocks."""
    step, count = case.codec.align(settings), len(weight)
    cuts = [*range(0, count, step), count]
    blocks = []
    for first, last in pairwise(cuts):
        kept = sliced(case, settings, first, last, known) if known else {}
        blocks.append(case.codec.encode(weight[first:last], settings, first, kept))
        spans = case.codec.spans(settings, first, last)
        assert all(len(part) == spans[name][2] - spans[name][1] for name, part in blocks[-1].items())
    whole = {part: np.concatenate([block[part] for block in blocks]) for part in blocks[0]}
    return {**whole, **case.codec.finish(whole, settings)}


@every_case
def test_encodes_as_bitsandbytes(name: str) -> None:
    case = Case(name)
    made = encoded(case, case.settings(), case.weight)
    assert made["weight"].tobytes() == case.parts["weight"].tobytes()
    if "nested" not in name:
        assert made.keys() == case.parts.keys()
        assert all(made[part].tobytes() == case.parts[part].tobytes() for part in made)


def test_compresses_absmax_as_bitsandbytes() -> None:
    """Its CPU kernel finds codes in a table of 65536 places: one that lies so near a middle may be its neighbour."""
    case = Case("nf4-nested")
    made = encoded(case, case.settings(), case.weight)
    assert len(made["nested_absmax"]) > 1
    assert all(made[p].tobytes() == case.parts[p].tobytes() for p in ("nested_absmax", "nested_quant_map", "state_nf4"))
    apart = made["absmax"] != case.parts["absmax"]
    table = golden()["dynamic_map"]
    absmax = np.abs(np.pad(case.weight.reshape(-1), (0, -case.weight.size % 32)).reshape(-1, 32)).max(axis=1)
    centred = (absmax - np.float32(case.settings()["nested"]["offset"]))[apart]
    scaled = centred / np.repeat(made["nested_absmax"], 256)[: len(absmax)][apart]
    near = np.abs(scaled - table[made["absmax"][apart]]) <= np.abs(scaled - table[case.parts["absmax"][apart]])
    assert near.all()
    assert np.all(np.abs(made["absmax"][apart].astype(int) - case.parts["absmax"][apart]) == 1)
    assert apart.mean() < 0.02


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert bnb4.dynamic_map().tobytes() == golden()["dynamic_map"].tobytes()


@every_case
def test_stored_scales_give_the_same_codes(name: str) -> None:
    """fp4 has two codes of zero, and a block of zeros has one value for all; there the values are the same."""
    case, settings = Case(name), Case(name).settings()
    known = {part: value for part, value in case.parts.items() if part != "weight"}
    made = encoded(case, settings, case.decoded, known)
    assert made.keys() == {"weight"}
    again = case.codec.decode({**case.parts, **made}, settings, 0, len(case.weight))
    assert np.array_equal(again, case.decoded)
    one_code_each = settings["quant_type"] == "nf4" and bnb4._scales(case.parts, settings, 0).all()
    assert one_code_each == (name in ("nf4-row", "nf4-nested", "nf4-nested-bf16", "nf4-as-bf16"))
    if one_code_each:
        assert made["weight"].tobytes() == case.parts["weight"].tobytes()


@pytest.mark.parametrize(
    ("name", "absmax"),
    [(name, kind) for name in NAMES for kind in ("F32", "BF16", "F16") if kind == "F32" or name in PLAIN],
)
def test_new_scales_err_at_most_half_a_step(name: str, absmax: str) -> None:
    case = Case(name)
    settings = case.settings()
    assert (name in PLAIN) == (settings["nested"] is None)
    if name in PLAIN:
        settings["absmax"] = absmax
    made = encoded(case, settings, case.weight)
    block = settings["blocksize"]
    flat = case.weight.reshape(-1)
    exact = np.array([np.abs(flat[at : at + block]).max() for at in range(0, flat.size, block)])
    read = case.codec.settings({}, "m", case.codec.layout(settings), made.__getitem__)  # nested_offset is a new one
    stored = bnb4._scales(made, read, 0)
    error = np.abs(case.codec.decode(made, read, 0, len(case.weight)) - case.weight).reshape(-1)
    # Half the widest step of the scale that codes are chosen with, and by what the largest value is moved after;
    # half a unit of 8 bits is above all roundings to float32 and of absmax to 16 bits.
    moved = np.abs(stored - exact)
    bound = (exact * (GAPS[settings["quant_type"]] / 2 + 1e-6) + moved).repeat(block)[: flat.size]
    assert np.all(error <= bound)
    if settings["nested"]:  # the dynamic map has steps of 1/64 of the largest at most, but 0.0071 at its end
        assert np.all(moved <= np.repeat(made["nested_absmax"], 256)[: len(exact)] * 0.0071 + 1e-7)


@nested_cases
def test_a_shorter_text_keeps_its_length(name: str) -> None:
    """The spaces of a text with the offset 0.0 leave room for another; a text without any takes fewer digits."""
    case = Case(name)
    for offset, separators in ((0.0, (", ", ": ")), (0.25, (",", ":"))):
        settings = case.state(nested_offset=offset, nested_dtype="float32")
        state = json.loads(settings["state"])
        settings["state"] = json.dumps(state, separators=separators)
        made = encoded(case, settings, case.weight)
        text = bytes(made[f"state_{settings['quant_type']}"])
        assert len(text) == len(settings["state"])
        mean = Case(name).settings()["nested"]["offset"]
        assert json.loads(text)["nested_offset"] == pytest.approx(mean, rel=5e-2)
        again = bnb4.settings({}, "m", bnb4.layout(settings), made.__getitem__)
        assert (
            np.abs(bnb4.decode(made, again, 0, len(case.weight)) - case.weight).max() < 0.2 * np.abs(case.weight).max()
        )


def test_int8_encodes_as_bitsandbytes() -> None:
    case = Case("int8")
    made = encoded(case, case.settings(), case.weight)
    assert made.keys() == case.parts.keys()
    assert all(made[part].tobytes() == case.parts[part].tobytes() for part in made)
    again = encoded(case, case.settings(), case.decoded, {"SCB": case.parts["SCB"], "weight": made["weight"]})
    assert again["weight"].tobytes() == made["weight"].tobytes()
    # Half a step, and three roundings of at most 127 steps.
    half = made["SCB"][:, None] / 254 * (1 + 5e-5)
    assert np.all(np.abs(case.decoded - case.weight) <= half)
    beyond = bnb8.encode(case.weight * 2, case.settings(), 0, {"SCB": case.parts["SCB"]})["weight"]
    assert (beyond.min(), beyond.max()) == (-127, 127)


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (3, 64)), ({"quant_type": "fp4", "blocksize": 32, "double_quant": False}, (5, 7)),
     ({"storage": "bfloat16", "dtype": "float16"}, (4, 10)), ({"blocksize": 4096}, (2, 3, 5))],
)  # fmt: skip
def test_a_fresh_weight_reads_back(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    settings = json.loads(json.dumps(bnb4.fresh(shape, options)))
    weight = np.random.default_rng(3).standard_normal((shape[0], int(np.prod(shape[1:])))).astype(np.float32)
    made = bnb4.encode(weight, settings, 0, {})
    made |= bnb4.finish(made, settings)
    layout = bnb4.layout(settings)
    assert {part: value.shape for part, value in made.items()} == {part: shape for part, (_, shape) in layout.items()}
    assert all(value.dtype.itemsize == DTYPES[layout[part][0]].bits // 8 for part, value in made.items())
    read = bnb4.settings(bnb4.config(settings, []), "m", layout, made.__getitem__)
    changed = {"nested", "state"} if settings["nested"] else set()
    assert {name for name in read if read[name] != settings[name]} == changed
    assert np.abs(bnb4.decode(made, read, 0, shape[0]) - weight).max() < 0.18 * np.abs(weight).max()


def test_config_is_what_transformers_writes() -> None:
    transformers = pytest.importorskip("transformers")
    for given in (bnb4.config(bnb4.fresh((2, 64), {"storage": "float16"}), ["lm_head"]), bnb8.config({}, [])):
        assert transformers.BitsAndBytesConfig.from_dict(given).to_dict() == given


def test_blocks_of_zeros_are_zeros_again() -> None:
    """bitsandbytes stores 1e-38 for the last block if it is not full, and 0 for others."""
    settings = bnb4.fresh((5, 32), {"double_quant": False})
    made = bnb4.encode(np.zeros((5, 32), np.float32), settings, 0, {})
    assert made["absmax"].tolist() == [0, 0, np.float32(1e-38)]
    assert made["weight"].tobytes() == bytes([0x77]) * 80
    assert not bnb4.decode({**made, **bnb4.finish(made, settings)}, settings, 0, 5).any()


def test_odd_blocks_are_refused() -> None:
    case = Case("nf4")
    assert bnb4.align(case.settings()) == 2
    with pytest.raises(ValueError, match="row 1 does not begin at a block of 64: cut at multiples of 2"):
        bnb4.encode(case.weight[1:3], case.settings(), 1, {})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    case = Case(name)
    case.weight[4, 7] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        case.codec.encode(case.weight, case.settings(), 0, {})


NONE = (None, None)
FOUND: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("nf4", {"absmax": NONE}, r"no \.weight\.absmax: not a complete"),
    ("nf4", {"state_nf4": NONE}, "0 tensors quant_state"),
    ("nf4", {"state_fp4": ("U8", (80,))}, "2 tensors quant_state"),
    ("nf4", {"weight": ("I32", (240, 1))}, "weight is I32, which"),
    ("nf4", {"weight": ("U8", (1, 960))}, r"weight is U8 \[1, 960\], but .* has U8 \[960, 1\]"),
    ("nf4", {"absmax": ("U8", (30,))}, "absmax is U8, and quant_state has no double"),
    ("nf4-nested", {"absmax": ("F32", (266,))}, "absmax is F32, and quant_state has double"),
    ("nf4", {"absmax": ("BF16", (160 // 64, 12))}, r"absmax is BF16 \[2, 12\], but"),
    ("nf4", {"nested_absmax": ("F32", (1,))}, r"nested_absmax is F32 \[1\], but .* has no such tensor"),
    ("nf4-nested", {"nested_quant_map": NONE}, r"nested_quant_map is no such tensor, but .* has F32 \[256\]"),
    ("int8", {"SCB": NONE}, r"no \.SCB: not a complete"),
    ("int8", {"weight": ("U8", (24, 200))}, "must be an I8 matrix"),
    ("int8", {"SCB": ("F32", (200,))}, r"SCB is F32 \[200\], but the weight's rows need F32 \[24\]"),
    ("int8", {"weight_format": ("U8", (1,))}, "must be one U8"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "message"), FOUND)
def test_parts_that_do_not_fit_are_refused(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(name).settings(**changed)


STATES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("nf4", {"shape": None}, "shape None, which is not that of a matrix"),
    ("nf4", {"shape": [1920]}, "not that of a matrix"),
    ("nf4", {"shape": [12, 161]}, r"absmax is F32 \[30\], but a weight \[12, 161\] in blocks of 64 has F32 \[31\]"),
    ("nf4", {"quant_type": "fp4"}, "quant_type 'fp4', which is not that of its name"),
    ("nf4", {"blocksize": 48}, "blocksize 48"),
    ("nf4", {"blocksize": 128}, r"absmax is F32 \[30\]"),
    ("nf4", {"dtype": "float64"}, "dtype 'float64'"),
    ("nf4", {"dtype": ...}, "must have blocksize, dtype"),
    ("nf4", {"packed": "cpu"}, "must have blocksize, dtype"),
    ("nf4-nested", {"nested_offset": ...}, "all of nested_… or none"),
    ("nf4-nested", {"nested_offset": float("nan")}, "double quantisation with"),
    ("nf4-nested", {"nested_dtype": "int8"}, "double quantisation with"),
    ("nf4-nested", {"nested_blocksize": 0}, "double quantisation with"),
    ("nf4-nested", {"nested_blocksize": 64}, r"nested_absmax is F32 \[2\]"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "message"), STATES)
def test_states_that_do_not_fit_are_refused(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(name).state(**changed)


def test_other_texts_tables_and_layouts_are_refused() -> None:
    case = Case("nf4")
    case.parts["state_nf4"] = np.frombuffer(b"{'shape'", np.uint8)
    with pytest.raises(ValueError, match="is not JSON"):
        case.settings(state_nf4=("U8", (8,)))
    case = Case("nf4")
    case.parts["quant_map"] = Case("fp4").parts["quant_map"]
    with pytest.raises(ValueError, match="quant_map is not the table of nf4"):
        case.settings()
    for number, layout in ((1, "col32"), (2, "col_turing"), (3, "col_ampere"), (7, "number 7")):
        case = Case("int8")
        case.parts["weight_format"] = np.array(number, np.uint8)
        with pytest.raises(ValueError, match=f"weight_format is {layout}, a layout for one kind of GPU"):
            case.settings()


def test_configs_of_the_other_form_are_refused() -> None:
    for name, config, other in (
        ("nf4", {"load_in_8bit": True}, "load_in_8bit"),
        ("int8", {"load_in_4bit": True}, "load_in_4bit"),
    ):
        case = Case(name)
        with pytest.raises(ValueError, match=f"but quantization_config has {other}"):
            case.codec.settings(config, "m", case.found, case.parts.__getitem__)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [((4, 4), {"bits": 4}, "has no option bits"), ((4, 4), {"quant_type": "af4"}, "quant_type 'af4'"),
     ((4, 4), {"blocksize": 16}, "blocksize 16"), ((4, 4), {"storage": "int32"}, "storage 'int32'"),
     ((4, 4), {"dtype": "float64"}, "not to 'float64'"), ((4,), {}, "not a matrix"), ((0, 4), {}, "not a matrix"),
     ((3, 3), {"storage": "bfloat16"}, "use storage uint8")],
)  # fmt: skip
def test_a_fresh_weight_of_no_form_is_refused(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bnb4.fresh(shape, options)
    for other, given, said in (((4, 4), {"threshold": 6.0}, "no options"), ((4,), {}, "not a matrix")):
        with pytest.raises(ValueError, match=said):
            bnb8.fresh(other, given)


def real(name: str) -> dict[str, tuple[str, Any]]:
    """Every tensor of a checkpoint: dtype and stored bits."""
    with open(REAL / name / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    header.pop("__metadata__", None)
    raw = {"BF16": np.uint16, "F32": np.float32, "U8": np.uint8, "I8": np.int8}
    return {
        key: (
            held["dtype"],
            np.frombuffer(data[slice(*held["data_offsets"])], raw[held["dtype"]]).reshape(held["shape"]),
        )
        for key, held in header.items()
    }


@pytest.mark.skipif(not REAL.exists(), reason="no real checkpoints here")
@pytest.mark.parametrize(
    ("name", "codec", "mark"), [("bnb-nf4-double", bnb4, ".weight.absmax"), ("bnb-int8", bnb8, ".SCB")]
)
def test_a_real_checkpoint_is_near_its_base(name: str, codec: Any, mark: str) -> None:
    tensors, base = real(name), real("base-bf16")
    config = json.loads((REAL / name / "config.json").read_text())["quantization_config"]
    modules = [key.removesuffix(mark) for key in tensors if key.endswith(mark)]
    assert len(modules) == 28
    for module in modules:
        held = {
            part: tensors[module + end]
            for part, end in (codec.PARTS | codec.OPTIONAL).items()
            if module + end in tensors
        }
        parts, found = {p: v for p, (_, v) in held.items()}, {p: (kind, v.shape) for p, (kind, v) in held.items()}
        settings = codec.settings(config, module, found, parts.__getitem__)
        assert codec.layout(settings) == found
        weight = (base[f"{module}.weight"][1].astype(np.uint32) << 16).view(np.float32)
        error = np.abs(codec.decode(parts, settings, 0, len(weight)) - weight)
        # Half a step of the largest value of a row, and 2 % of it: absmax in 8 bits, thrice rounded to bfloat16.
        step = GAPS["nf4"] / 2 + 0.02 if codec is bnb4 else 1 / 254 * (1 + 5e-5)
        assert np.all(error <= step * np.abs(weight).max(axis=1, keepdims=True)), module
