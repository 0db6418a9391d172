"""Tuners that change a weight by more than a sum, file by file, against PEFT's merge in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import inlay.tuners
from cases import third_party
from inlay.dtypes import F64Array
from inlay.tuners.refused import REFUSED_TYPES

# Sums of at most a few hundred products, in two orders: some 10^2 roundings of 2^-53, relative to the largest number.
FLOAT64 = 1e-13
PREFIX = "base_model.model."
COMMON = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "rank_pattern", "alpha_pattern",
    "peft_version", "fan_in_fan_out", "r", "trainable_token_indices",
}  # fmt: skip
NAMES = ("ia3", "oft", "hra", "miss", "boft", "road", "hira", "deft", "beft")


@dataclass(frozen=True)
class Case:
    """A tuner on some layers of `Layers`: PEFT's config class and the fields that change the formula."""

    name: str
    tuner: str
    config: str
    layers: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    oracle: str = ""

    @property
    def file(self) -> ModuleType:
        return import_module(f"inlay.tuners.{self.tuner}")


BOTH = ("wide", "plain")
CONVS = ("conv2d", "point", "conv1d", "conv3d")
IA3_CONVS = ("conv2d", "point", "conv3d", "grouped")
CASES = (
    Case("ia3", "ia3", "IA3Config", (*BOTH, "turned"), {"feedforward_modules": []}),
    Case("ia3-feedforward", "ia3", "IA3Config", (*BOTH, "turned"), {"feedforward_modules": ["wide", "turned"]}),
    Case("ia3-conv", "ia3", "IA3Config", IA3_CONVS, {"feedforward_modules": []}),
    Case("ia3-conv-inputs", "ia3", "IA3Config", IA3_CONVS, {"feedforward_modules": list(IA3_CONVS)}),
    Case("oft", "oft", "OFTConfig", ("wide", "table", "point"), {"oft_block_size": 4, "use_cayley_neumann": False}),
    *(
        Case(f"oft-neumann-{n}", "oft", "OFTConfig", ("wide", "table"), {"oft_block_size": 4, "num_cayley_neumann_terms": n})
        for n in (1, 2, 3, 4, 5, 7)
    ),
    Case("oft-blocks", "oft", "OFTConfig", BOTH, {"r": 6, "oft_block_size": 0}),
    Case("oft-shared", "oft", "OFTConfig", (*BOTH, "table"), {"oft_block_size": 6, "block_share": True}),
    # PEFT computes eps/√blocks in float32: 0.25/√4 is exact there.
    Case("oft-coft", "oft", "OFTConfig", ("wide",), {"oft_block_size": 6, "coft": True, "eps": 0.25, "use_cayley_neumann": False}),
    Case("hra", "hra", "HRAConfig", (*BOTH, "conv2d", "point"), {"r": 4}),
    Case("hra-odd", "hra", "HRAConfig", BOTH, {"r": 3}),
    Case("hra-orthogonal", "hra", "HRAConfig", (*BOTH, "conv2d"), {"r": 4, "apply_GS": True}),
    Case("miss", "miss", "MissConfig", BOTH, {"r": 6}),
    Case("miss-remainder", "miss", "MissConfig", BOTH, {"r": 5}),
    Case("miss-random", "miss", "MissConfig", BOTH, {"r": 6, "init_weights": False}),
    Case("miss-mini", "miss", "MissConfig", BOTH, {"r": 6, "init_weights": "mini", "mini_r": 4}),
    Case("miss-mini-remainder", "miss", "MissConfig", BOTH, {"r": 5, "init_weights": "mini", "mini_r": 2}),
    Case("miss-bat", "miss", "MissConfig", ("wide",), {"r": 4, "init_weights": "bat"}),
    Case("miss-bat-2", "miss", "MissConfig", BOTH, {"r": 2, "init_weights": "bat"}),
    Case("boft", "boft", "BOFTConfig", ("wide", "conv2d"), {"boft_block_size": 4}),
    Case("boft-odd", "boft", "BOFTConfig", (*BOTH, "point"), {"boft_block_size": 3}),
    Case("boft-blocks", "boft", "BOFTConfig", BOTH, {"boft_block_size": 0, "boft_block_num": 3}),
    Case("boft-butterfly-2", "boft", "BOFTConfig", ("wide", "conv2d"), {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, "butterfly"),
    Case("boft-butterfly-2-wide", "boft", "BOFTConfig", ("wide",), {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, "butterfly"),
    Case("boft-butterfly-3", "boft", "BOFTConfig", ("wide",), {"boft_block_size": 2, "boft_n_butterfly_factor": 3}, "butterfly"),
    *(Case(f"{v}", "road", "RoadConfig", BOTH, {"variant": v, "group_size": 4}) for v in ("road_1", "road_2", "road_4")),
    *(Case(f"{v}-pairs", "road", "RoadConfig", ("wide",), {"variant": v, "group_size": 10}) for v in ("road_1", "road_2", "road_4")),
    Case("hira", "hira", "HiraConfig", (*BOTH, "table", *CONVS, "turned"), {"r": 3}),
    Case("hira-pattern", "hira", "HiraConfig", BOTH, {"r": 3, "rank_pattern": {"plain": 2}}),
    Case("deft", "deft", "DeftConfig", (*BOTH, "turned"), {"r": 3}, "wide"),
    Case("deft-alpha", "deft", "DeftConfig", BOTH, {"r": 3, "alpha": 8}, "wide"),
    Case("deft-capped", "deft", "DeftConfig", BOTH, {"r": 16, "alpha": 8}, "wide"),
    Case("deft-qr", "deft", "DeftConfig", (*BOTH, "turned"), {"r": 3, "decomposition_method": "qr"}, "wide"),
    Case("deft-qr-alpha", "deft", "DeftConfig", BOTH, {"r": 3, "decomposition_method": "qr", "alpha": 8}, "wide"),
    Case("deft-para", "deft", "DeftConfig", BOTH, {"r": 3, "para": True}, "wide"),
    Case("deft-para-qr", "deft", "DeftConfig", BOTH, {"r": 3, "para": True, "decomposition_method": "qr"}, "wide"),
    Case("beft", "beft", "BeftConfig", ("wide", "out")),
)  # fmt: skip
by_name = {case.name: case for case in CASES}


def layers() -> Any:
    """One layer of each kind, none of them square."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(24, 20)
            self.plain = nn.Linear(18, 8, bias=False)
            self.out = nn.Linear(6, 9)
            self.turned = Conv1D(20, 12)
            self.table = nn.Embedding(11, 12)
            self.conv2d = nn.Conv2d(4, 6, 3)
            self.point = nn.Conv2d(12, 10, 1)
            self.conv1d = nn.Conv1d(4, 5, 3)
            self.conv3d = nn.Conv3d(2, 4, (2, 1, 3))
            self.grouped = nn.Conv2d(9, 6, (1, 2), groups=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.manual_seed(5)
    model = Layers().double()
    torch.nn.init.normal_(model.turned.bias)  # transformers starts it at zero, which any scale keeps
    return model


@contextlib.contextmanager
def float64_oracle(kind: str) -> Iterator[None]:
    """PEFT with what it cannot do on a CPU, or forces to float32, put right.

    butterfly: its CUDA extension, which only makes block-diagonal matrices, is stood in for by torch.block_diag.
    wide: DEFT casts to `torch.float32` whatever the weights are; that name gives float64 here.
    """
    import torch
    from peft.tuners.boft import layer as boft
    from peft.tuners.deft import layer as deft

    class Wide:
        def __getattr__(self, name: str) -> Any:
            return torch.float64 if name == "float32" else getattr(torch, name)

    def block_diagonals(factors: Any) -> list[Any]:
        return [torch.stack([torch.block_diag(*blocks) for blocks in factors])]

    with pytest.MonkeyPatch.context() as patch:
        extension = SimpleNamespace(forward=block_diagonals) if kind == "butterfly" else None
        patch.setattr(boft, "get_fbd_cuda", lambda: extension)
        if kind == "wide":
            patch.setattr(deft, "torch", Wide())
        yield


def adapted(case: Case, model: Any) -> Any:
    """The model with an adapter of the case in float64, no parameter of it neutral."""
    import peft

    with third_party():
        config = getattr(peft, case.config)(target_modules=list(case.layers), **case.fields)
        wrapped = peft.get_peft_model(model, config).double()
    return randomise(wrapped, 11)


def randomise(wrapped: Any, seed: int, only: str = "") -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad and only in name:
                p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return wrapped


def read_parts(path: Path, layer: str) -> dict[str, F64Array]:
    from safetensors.numpy import load_file

    start = f"{PREFIX}{layer}."
    tensors = load_file(path / "adapter_model.safetensors")
    parts = {k[len(start) :].removesuffix(".weight"): t for k, t in tensors.items() if k.startswith(start)}
    assert parts and all(t.dtype == np.float64 for t in parts.values())
    return parts


def tensors_of(model: Any) -> dict[str, F64Array]:
    """Weights as the layer sees them, (out, in …): a Conv1D stores the transpose."""
    state = {k: t.detach().numpy().copy() for k, t in model.state_dict().items()}
    return {k: t.T if k == "turned.weight" else t for k, t in state.items()}


def settings_of(case: Case, path: Path) -> dict[str, Any]:
    raw = json.loads((path / "adapter_config.json").read_text())
    settings = case.file.settings(raw, raw.get("r") or 1, raw.get("alpha"))
    if hasattr(case.file, "LISTED_IN"):  # the planner sets it; in these cases it is all layers or none
        settings["listed"] = bool(raw[case.file.LISTED_IN])
    assert json.loads(json.dumps(settings)) == settings
    return dict(settings)


def matrix(weight: F64Array) -> F64Array:
    return weight.reshape(len(weight), -1)


def shapes_of(parts: Mapping[str, F64Array]) -> dict[str, tuple[int, ...]]:
    return {name: part.shape for name, part in parts.items()}


def close(found: F64Array, wanted: F64Array, *terms: F64Array) -> bool:
    """Equal up to rounding, relative to the largest element of all that takes part."""
    largest = max(float(np.abs(x).max()) for x in (wanted, *terms))
    return found.shape == wanted.shape and float(np.abs(found - wanted).max()) <= FLOAT64 * largest


@dataclass(frozen=True)
class Made:
    """An adapter in its directory, the model's tensors before it, and after PEFT's merge."""

    path: Path
    before: dict[str, F64Array]
    after: dict[str, F64Array]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            case, path, model = by_name[name], tmp_path_factory.mktemp(name), layers()
            before = tensors_of(model)
            with float64_oracle(case.oracle):
                wrapped = adapted(case, model)
                with third_party():
                    wrapped.save_pretrained(path, save_embedding_layers=False)
                    after = tensors_of(wrapped.merge_and_unload())
            known[name] = Made(path, before, after)
        return known[name]

    return get


@pytest.mark.parametrize("name", by_name)
def test_a_merge_is_pefts_in_float64(made: Callable[[str], Made], name: str) -> None:
    case, it = by_name[name], made(name)
    settings = settings_of(case, it.path)
    for layer in case.layers:
        parts, weight, bias = read_parts(it.path, layer), it.before[layer + ".weight"], it.before.get(layer + ".bias")
        assert {*case.file.REQUIRED} <= parts.keys() <= {*case.file.REQUIRED, *case.file.OPTIONAL}
        assert case.file.check(shapes_of(parts), settings, weight.shape) is None
        rows = matrix(weight)
        prepared = case.file.prepare(parts, settings, weight.shape)
        merged = case.file.merge(rows, rows, prepared, settings, weight.shape, 0)
        wanted = matrix(it.after[layer + ".weight"])
        assert close(merged, wanted, rows, *parts.values()), layer
        neutral = case.tuner == "beft" or name == "oft-neumann-1"  # one term of the series is I
        assert np.array_equal(wanted, rows) == neutral, "no change, so this test could not fail"
        if bias is not None:
            acts = hasattr(case.file, "touches_bias") and case.file.touches_bias(shapes_of(parts), settings)
            changed = case.file.merge_bias(bias, bias, parts, settings) if acts else bias
            assert close(changed, it.after[layer + ".bias"], bias), layer
            assert acts != np.array_equal(bias, changed)


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.file.WHOLE])
def test_rows_merged_apart_are_rows_of_the_whole(made: Callable[[str], Made], name: str) -> None:
    case, it = by_name[name], made(name)
    settings = settings_of(case, it.path)
    for layer in case.layers:
        parts, weight = read_parts(it.path, layer), it.before[layer + ".weight"]
        rows, shape = matrix(weight), weight.shape
        base = np.random.default_rng(3).standard_normal(rows.shape)  # not the weight: its rows must be the same ones
        prepared = case.file.prepare(parts, settings, shape)
        whole = case.file.merge(rows, base, prepared, settings, shape, 0)
        for cuts in (range(len(rows) + 1), (0, 1, len(rows)), (0, 3, 5, len(rows)), (0, len(rows) - 1, len(rows))):
            blocks = [
                case.file.merge(rows[first:last], base[first:last], prepared, settings, shape, first)
                for first, last in pairwise(cuts)
            ]
            assert close(np.concatenate(blocks), whole, rows), (layer, tuple(cuts))


@pytest.mark.parametrize("name", ["road_1", "road_4-pairs", "deft", "deft-para-qr"])
def test_what_needs_the_whole_weight_does_not_take_a_part(made: Callable[[str], Made], name: str) -> None:
    case, it = by_name[name], made(name)
    settings, parts, weight = settings_of(case, it.path), read_parts(it.path, "wide"), it.before["wide.weight"]
    prepared = case.file.prepare(parts, settings, weight.shape)
    with pytest.raises(AssertionError):
        case.file.merge(weight[4:], weight[4:], prepared, settings, weight.shape, 4)


@pytest.mark.parametrize("name", ["hira", "deft-alpha", "deft-qr-alpha"])
def test_the_second_of_two_adapters_acts_on_the_unmerged_base(name: str, tmp_path: Path) -> None:
    """HiRA and DEFT take their change from the weight before any adapter, as PEFT's forward and merge do."""
    import peft

    case, model = by_name[name], layers()
    before = tensors_of(model)
    with float64_oracle(case.oracle), third_party():
        wrapped = adapted(case, model)
        wrapped.add_adapter("two", getattr(peft, case.config)(target_modules=list(case.layers), **case.fields))
        wrapped.double().base_model.set_adapter(["default", "two"])
        randomise(wrapped, 23, only="two")
        wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
        after = tensors_of(wrapped.merge_and_unload(adapter_names=["default", "two"]))
    settings = settings_of(case, tmp_path)
    for layer in case.layers:
        base = matrix(before[layer + ".weight"])
        shape, rows = before[layer + ".weight"].shape, base
        in_turn = base
        for path in (tmp_path, tmp_path / "two"):
            prepared = case.file.prepare(read_parts(path, layer), settings, shape)
            rows = case.file.merge(rows, base, prepared, settings, shape, 0)
            in_turn = case.file.merge(in_turn, in_turn, prepared, settings, shape, 0)
        wanted = matrix(after[layer + ".weight"])
        assert close(rows, wanted, base), layer
        assert not close(in_turn, wanted, base), "the base plays no role, so this test could not fail"


@pytest.mark.parametrize("tuner", ["boft", "hra", "oft"])
def test_a_rotation_keeps_the_length_of_every_row(made: Callable[[str], Made], tuner: str) -> None:
    """An oracle of its own: what PEFT does plays no role."""
    name = {"boft": "boft-butterfly-3", "hra": "hra", "oft": "oft"}[tuner]
    case, it = by_name[name], made(name)
    parts, weight, settings = read_parts(it.path, "wide"), it.before["wide.weight"], settings_of(case, it.path)
    scale = np.abs(parts["boft_s"][:, 0]) if tuner == "boft" else 1.0
    merged = case.file.merge(
        weight, weight, case.file.prepare(parts, settings, weight.shape), settings, weight.shape, 0
    )
    assert np.allclose(np.linalg.norm(merged, axis=1), scale * np.linalg.norm(weight, axis=1), rtol=1e-13, atol=0)


SHAPE = (6, 8)
WEIGHT: F64Array = np.random.default_rng(1).standard_normal(SHAPE)
RANDOM: F64Array = np.random.default_rng(2).standard_normal((8, 6))


@dataclass(frozen=True)
class Neutral:
    """Parts that change nothing, up to rounding where `exact` is false."""

    tuner: str
    parts: Mapping[str, F64Array]
    raw: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True


SYMMETRIC = np.ones((2, 2, 4, 4)) + np.eye(4)
PAIRS = np.repeat(RANDOM[:, :2], 2, axis=1)  # each reflection twice
FROM = np.linalg.qr(RANDOM[:6, :3])[0]
NEUTRAL = (
    Neutral("ia3", {"ia3_l": np.ones((6, 1))}),
    Neutral("ia3", {"ia3_l": np.ones((1, 8))}),
    Neutral("oft", {"oft_R": np.zeros((2, 6))}, {"oft_block_size": 4}),
    Neutral("oft", {"oft_embedding_R": np.zeros((2, 6))}, {"oft_block_size": 4, "use_cayley_neumann": True}),
    Neutral("hra", {"hra_u": PAIRS}, exact=False),
    Neutral("miss", {"miss_block": np.zeros((3, 6))}),
    Neutral("miss", {"miss_block": np.zeros((3, 2))}, {"init_weights": "mini", "mini_r": 2}),
    Neutral("miss", {"miss_block": np.zeros((3, 2, 2))}, {"init_weights": "bat"}),
    Neutral("boft", {"boft_R": SYMMETRIC[:1], "boft_s": np.ones((6, 1))}),
    Neutral("boft", {"boft_R": SYMMETRIC, "boft_s": np.ones((6, 1))}),
    Neutral("road", {"road_theta": np.zeros(3), "road_alpha": np.ones(3)}, {"group_size": 6}),
    Neutral("road", {"road_theta": np.zeros(12), "road_alpha": np.ones(12)}, {"group_size": 2, "variant": "road_4"}),
    Neutral("hira", {"hira_A": RANDOM.T[:2], "hira_B": np.zeros((6, 2))}),
    Neutral("hira", {"hira_embedding_A": np.zeros((2, 6)), "hira_embedding_B": RANDOM[:, :2]}),
    Neutral("deft", {"deft_P": RANDOM[:6, :3], "deft_R": FROM.T @ WEIGHT / 2}, {"decomposition_method": "qr", "alpha": 6}, exact=False),
    Neutral("deft", {"deft_P": -np.abs(RANDOM[:6, :3])}, {"para": True}),
    Neutral("beft", {"beft_bias": np.zeros((1, 6))}),
)  # fmt: skip


@pytest.mark.parametrize("version", [None, "0.17.1", "0.16.0", "0.18.0", "0.18.0.dev0@abc", "0.21.2", "1.0"])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
def test_the_series_of_oft_is_that_of_the_peft_that_trained(version: str | None, terms: int) -> None:
    """By powers; before 0.18 the last term was doubled too, and no file had its version."""
    oft = import_module("inlay.tuners.oft")
    raw = {"oft_block_size": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": terms, "peft_version": version}
    vectors = 0.3 * RANDOM[:2, :6]
    turn = oft.prepare({"oft_R": vectors}, oft.settings(raw, 3, None), SHAPE)["turn"]
    old = version is None or version.startswith(("0.16", "0.17"))
    for vector, found in zip(vectors, turn, strict=True):
        skew = np.zeros((4, 4))
        skew[np.triu_indices(4, 1)] = vector
        skew -= skew.T
        powers = [np.linalg.matrix_power(skew, n) for n in range(9)]
        wanted = powers[0] + 2 * sum((powers[n] for n in range(1, terms)), np.zeros((4, 4)))
        if not old and terms > 2:
            wanted += powers[3] if terms == 3 else -powers[terms - 1]
        assert np.allclose(found, wanted.T, rtol=0, atol=1e-14)
    assert (oft.remark(raw) is not None) == old
    assert oft.remark({**raw, "use_cayley_neumann": False}) is None


LISTED = {"listed": True}
NOT_LISTED = {"listed": False}


@pytest.mark.parametrize(
    ("found", "settings", "shape", "says"),
    [
        ((1, 4, 1, 1), NOT_LISTED, (6, 4, 3, 3), "4 numbers for 6 outputs"),
        ((1, 6, 1, 1), LISTED, (6, 4, 3, 3), "inputs in groups of 4"),
        ((1, 16, 1, 1), LISTED, (6, 4, 3, 3), "inputs in groups of 4"),  # four groups of six outputs
        ((1, 0, 1, 1), LISTED, (6, 4, 3, 3), "inputs in groups of 4"),
        ((1, 4, 1), LISTED, (6, 4, 3, 3), "no row of channels"),
        ((4, 1, 1, 1), LISTED, (6, 4, 3, 3), "no row of channels"),
        ((1, 4, 3, 3), LISTED, (6, 4, 3, 3), "no row of channels"),
    ],
)
def test_ia3_on_a_convolution_that_it_does_not_fit_is_reported(
    found: tuple[int, ...], settings: dict[str, Any], shape: tuple[int, ...], says: str
) -> None:
    ia3 = import_module("inlay.tuners.ia3")
    assert says in (ia3.check({"ia3_l": found}, settings, shape) or "")
    assert ia3.check({"ia3_l": (1, 6, 1, 1)}, NOT_LISTED, (6, 4, 3, 3)) is None
    assert ia3.check({"ia3_l": (1, 12, 1, 1)}, LISTED, (6, 4, 3, 3)) is None


@pytest.mark.parametrize("case", NEUTRAL, ids=lambda case: case.tuner)
def test_neutral_parts_keep_the_weight(case: Neutral) -> None:
    file = import_module(f"inlay.tuners.{case.tuner}")
    settings = file.settings(case.raw, 3, case.raw.get("alpha"))
    assert file.check(shapes_of(case.parts), settings, SHAPE) is None
    merged = file.merge(WEIGHT, WEIGHT, file.prepare(case.parts, settings, SHAPE), settings, SHAPE, 0)
    assert close(merged, WEIGHT)
    assert not case.exact or np.array_equal(merged, WEIGHT)
    if hasattr(file, "touches_bias") and file.touches_bias(shapes_of(case.parts), settings):
        assert np.array_equal(file.merge_bias(WEIGHT[:, 0], WEIGHT[:, 0], case.parts, settings), WEIGHT[:, 0])


# tuner, fields, shapes of the parts, shape of the weight, what the answer says
WRONG: tuple[tuple[str, dict[str, Any], dict[str, tuple[int, ...]], tuple[int, ...], str], ...] = (
    ("ia3", {}, {"ia3_l": (8, 1)}, (6, 8), "(8, 1)"),
    ("ia3", {}, {"ia3_l": (1, 6)}, (6, 8), "(1, 6)"),
    ("ia3", {}, {"ia3_l": (1, 4, 1, 1)}, (6, 4, 3, 3), "feedforward_modules"),
    ("ia3", {}, {"ia3_l": (1, 4, 1)}, (6, 4, 3), "Conv2d and Conv3d"),
    ("oft", {"oft_block_size": 4}, {"oft_R": (3, 6)}, (6, 8), "(3, 6)"),
    ("oft", {"oft_block_size": 4}, {"oft_R": (2, 7)}, (6, 8), "(2, 7)"),
    ("oft", {"oft_block_size": 4}, {"oft_R": (9, 6)}, (6, 4, 3, 3), "differs from its forward"),
    ("oft", {}, {"oft_R": (2, 6)}, (6, 8), "oft_block_size"),
    ("hra", {}, {"hra_u": (6, 2)}, (6, 8), "(6, 2)"),
    ("hra", {}, {"hra_u": (8,)}, (6, 8), "(8,)"),
    ("hra", {}, {"hra_u": (72, 2)}, (6, 4, 3, 3), "36 inputs"),  # two groups
    ("miss", {}, {"miss_block": (2, 8)}, (6, 8), "(2, 6)"),
    ("miss", {}, {"miss_block": (9, 6)}, (6, 8), "(9, 6)"),
    ("miss", {}, {"miss_block": (2, 6)}, (6, 4, 3, 3), "matrices"),
    ("miss", {"init_weights": "bat"}, {"miss_block": (3, 2, 3)}, (6, 8), "3 × 3"),
    ("miss", {"init_weights": "bat"}, {"miss_block": (2, 2, 2)}, (6, 8), "(3, 2, 2)"),
    ("miss", {"init_weights": "mini", "mini_r": 4}, {"miss_block": (2, 4)}, (6, 8), "mini_r 4"),
    ("miss", {"init_weights": "mini", "mini_r": 3}, {"miss_block": (2, 2)}, (6, 8), "(2, 3)"),
    ("miss", {"init_weights": "cat"}, {"miss_block": (2, 6)}, (6, 8), "'cat'"),
    ("boft", {}, {"boft_R": (1, 2, 4, 4), "boft_s": (8, 1)}, (6, 8), "boft_s is (8, 1)"),
    ("boft", {}, {"boft_R": (1, 2, 4, 4), "boft_s": (1, 6)}, (6, 8), "boft_s is (1, 6)"),
    ("boft", {}, {"boft_R": (1, 3, 4, 4), "boft_s": (6, 1)}, (6, 8), "(1, 3, 4, 4)"),
    ("boft", {}, {"boft_R": (1, 2, 4, 2), "boft_s": (6, 1)}, (6, 8), "(1, 2, 4, 2)"),
    ("boft", {}, {"boft_R": (3, 2, 4, 4), "boft_s": (6, 1)}, (6, 8), "no butterfly"),
    ("boft", {}, {"boft_R": (2, 2, 3, 3), "boft_s": (4, 1)}, (4, 6), "no butterfly"),
    ("road", {"group_size": 6}, {"road_theta": (3,), "road_alpha": (6,)}, (6, 8), "road_alpha is (6,)"),
    ("road", {"group_size": 6, "variant": "road_2"}, {"road_theta": (3,), "road_alpha": (3,)}, (6, 8), "(6,)"),
    ("road", {"group_size": 4}, {"road_theta": (3,), "road_alpha": (3,)}, (6, 8), "groups of 4"),
    ("road", {"group_size": 3}, {"road_theta": (3,), "road_alpha": (3,)}, (6, 8), "groups of 3"),
    ("road", {}, {"road_theta": (3,), "road_alpha": (3,)}, (6, 8), "groups of 64"),
    ("road", {"group_size": 6, "variant": "road_3"}, {"road_theta": (3,), "road_alpha": (3,)}, (6, 8), "road_3"),
    ("hira", {}, {"hira_A": (2, 8), "hira_B": (8, 2)}, (6, 8), "(8, 2)"),
    ("hira", {}, {"hira_A": (2, 8), "hira_B": (6, 3)}, (6, 8), "(6, 2)"),
    ("hira", {}, {"hira_A": (2, 8)}, (6, 8), "hira_B"),
    ("hira", {}, {"hira_A": (2, 8), "hira_embedding_B": (8, 2)}, (6, 8), "needed"),
    ("hira", {}, {"hira_embedding_A": (2, 8), "hira_embedding_B": (6, 2)}, (6, 8), "(2, 6)"),
    ("hira", {}, {"hira_A": (2, 8, 3, 3), "hira_B": (6, 2, 1, 1)}, (6, 4, 3, 3), "(2, 4, 3, 3)"),  # two groups
    ("deft", {}, {"deft_P": (8, 2), "deft_R": (2, 8)}, (6, 8), "(8, 2)"),
    ("deft", {}, {"deft_P": (6, 2), "deft_R": (3, 8)}, (6, 8), "(2, 8)"),
    ("deft", {}, {"deft_P": (6, 2)}, (6, 8), "missing"),
    ("deft", {"para": True}, {"deft_P": (6, 2), "deft_R": (2, 8)}, (6, 8), "para"),
    ("deft", {}, {"deft_P": (6, 7), "deft_R": (7, 8)}, (6, 8), "(6, 7)"),
    ("deft", {}, {"deft_P": (6, 0), "deft_R": (0, 8)}, (6, 8), "(6, 0)"),
    ("deft", {"decomposition_method": "svd"}, {"deft_P": (6, 2), "deft_R": (2, 8)}, (6, 8), "'svd'"),
    ("beft", {}, {"beft_bias": (1, 8)}, (6, 8), "(1, 6)"),
    ("beft", {}, {"beft_bias": (6,)}, (6, 8), "(1, 6)"),
)  # fmt: skip


@pytest.mark.parametrize("row", WRONG, ids=lambda row: f"{row[0]}-{row[4]}")
def test_what_does_not_fit_is_said(row: tuple[str, dict[str, Any], dict[str, tuple[int, ...]], tuple[int, ...], str]) -> None:  # fmt: skip
    tuner, raw, shapes, shape, says = row
    file = import_module(f"inlay.tuners.{tuner}")
    assert says in str(file.check(shapes, file.settings(raw, 2, None), shape))


@pytest.mark.parametrize("name", by_name)
def test_a_part_of_any_other_shape_raises_nothing(made: Callable[[str], Made], name: str) -> None:
    """Shapes come from a file that may be anything: each is answered with a phrase, or is merged."""
    case, it = by_name[name], made(name)
    settings, layer = settings_of(case, it.path), case.layers[0]
    shapes, shape = shapes_of(read_parts(it.path, layer)), it.before[layer + ".weight"].shape
    for part, true in shapes.items():
        for other in ((), (0,), (0, *true[1:]), (*true[:-1], 0), true[1:], (*true, 1), (1, *true), true[::-1]):
            answer = case.file.check({**shapes, part: other}, settings, shape)
            if answer is None:
                file, parts = case.file, {k: np.ones(s) for k, s in {**shapes, part: other}.items()}
                weight = np.ones(matrix(it.before[layer + ".weight"]).shape)
                assert file.merge(weight, weight, file.prepare(parts, settings, shape), settings, shape, 0).shape == weight.shape  # fmt: skip


def test_beft_changes_only_a_bias_and_says_so() -> None:
    from inlay.tuners import beft

    assert not beft.CHANGES_WEIGHT and beft.touches_bias({"beft_bias": (1, 6)}, {})
    others = [import_module(f"inlay.tuners.{name}") for name in NAMES if name != "beft"]
    assert all(getattr(file, "CHANGES_WEIGHT", True) for file in others)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_pefts_config_is_used_or_known_to_change_nothing(name: str) -> None:
    import peft

    file = import_module(f"inlay.tuners.{name}")
    config = getattr(peft, next(case.config for case in CASES if case.tuner == name))
    fields = {f.name for f in dataclasses.fields(config)} - COMMON
    assert fields <= file.FIELDS | file.IGNORED | file.REFUSED.keys()
    assert not file.FIELDS & file.IGNORED
    with third_party():
        assert config(**({"oft_block_size": 4} if name == "oft" else {})).peft_type.value == file.PEFT_TYPE


def test_every_method_of_peft_has_a_file_or_a_reason() -> None:
    from peft.utils.peft_types import PeftType

    found = (import_module(f"inlay.tuners.{m.name}") for m in pkgutil.iter_modules(inlay.tuners.__path__))
    merged = {file.PEFT_TYPE for file in found if hasattr(file, "PEFT_TYPE")} | {
        "LORA",
        "LN_TUNING",
        "TRAINABLE_TOKENS",
    }
    assert {t.value for t in PeftType} <= merged | REFUSED_TYPES.keys()
    assert not merged & REFUSED_TYPES.keys()
    assert all(len(reason) > 30 for reason in REFUSED_TYPES.values())
