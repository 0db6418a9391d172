"""Tuners whose result is the weight plus a delta, against PEFT's own merge.

Every adapter is made by PEFT on a tiny model in float64, has only random numbers, and is read back from the file
that `save_pretrained` wrote. The laws: the delta is what PEFT merges, its rows do not depend on how they are cut,
neutral parts give exactly zero, and parts of other shapes are reported.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cases import third_party
from inlay.errors import InputError
from inlay.tuners import c3a, fourierft, shira, vblora

PREFIX = "base_model.model."
# n·eps for sums of n < 1000 products of float64, and as much again for PEFT's sum with the weight.
FLOAT64 = 1e-12
# PEFT transforms C3A and FourierFT in float32, whatever the model is: eps of float32 times a few steps of an FFT.
FLOAT32 = 2e-6


def _network() -> Any:
    """Each kind of layer, none of them square but one; keys are module names."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(12, 8)
            self.tall = nn.Linear(8, 20)
            self.square = nn.Linear(12, 12)
            self.turned = Conv1D(8, 12)  # stored (in, out) = (12, 8)
            self.conv2d = nn.Conv2d(4, 6, (3, 2))
            self.grouped = nn.Conv2d(4, 8, 3, groups=2)
            self.point = nn.Conv2d(4, 10, 1)
            self.conv1d = nn.Conv1d(6, 32, 3)
            self.point1d = nn.Conv1d(6, 8, 1)

    return Network()


LINEAR = ("wide", "tall", "square")
MATRICES = (*LINEAR, "turned")
CONVOLUTIONS = ("conv2d", "grouped", "point", "conv1d", "point1d")


@dataclass(frozen=True)
class Case:
    """An adapter: the file of its tuner, PEFT's config, where it goes, and what is changed before it is saved."""

    name: str
    tuner: str
    config: str
    fields: Mapping[str, Any]
    targets: tuple[str, ...] = LINEAR
    edit: Callable[[Any], None] = lambda model: None
    tolerance: float = FLOAT64

    @property
    def file(self) -> ModuleType:
        return importlib.import_module(f"inlay.tuners.{self.tuner}")


def _prune_adalora(model: Any) -> None:
    """Ends AdaLoRA as its allocator does: components that are out have weight zero, and are not saved."""
    import torch

    kept = {"wide": [True, False, True, True, False], "tall": [False, True, True, False, True]}
    kept["square"] = [True, False, False, False, False]
    model.peft_config["default"].rank_pattern = {f"{m}.lora_E.default": k for m, k in kept.items()}
    with torch.no_grad():
        for module, keep in kept.items():
            model.get_submodule(f"base_model.model.{module}").lora_E["default"][~torch.tensor(keep)] = 0


def _shrink_delora(model: Any) -> None:
    """Some lengths below those that PEFT still divides by, on either side of the pair."""
    import torch

    with torch.no_grad():
        for module in LINEAR:
            layer = model.get_submodule(f"base_model.model.{module}")
            layer.delora_A["default"][0] *= 1e-6
            layer.delora_B["default"][:, 1] *= 1e-6


ADALORA = {"init_r": 5, "lora_alpha": 3, "total_step": 10}
LOHA = {"r": 4, "alpha": 5}  # alpha / r is exact in float32, to which PEFT rounds it in LoHa
LOKR = {"r": 2, "alpha": 5}
VBLORA = {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3}
GRALORA = {"r": 4, "alpha": 7, "gralora_k": 2}
RANDLORA = {"r": 3, "randlora_alpha": 5}
FOURIER = {"n_frequency": 30, "scaling": 40.0}
PATTERNS = {"rank_pattern": {"tall": 2, "conv2d": 8}, "alpha_pattern": {"wide": 9}}

CASES = [
    Case("adalora", "adalora", "AdaLoraConfig", ADALORA, MATRICES),
    Case("adalora-no-alpha", "adalora", "AdaLoraConfig", {**ADALORA, "lora_alpha": 0}),
    Case("adalora-pruned", "adalora", "AdaLoraConfig", ADALORA, edit=_prune_adalora),
    Case("adalora-conv", "adalora", "AdaLoraConfig", ADALORA, ("conv2d", "point")),
    Case("loha", "loha", "LoHaConfig", {**LOHA, **PATTERNS}),
    Case("loha-conv", "loha", "LoHaConfig", {**LOHA, **PATTERNS}, CONVOLUTIONS),
    Case("loha-core", "loha", "LoHaConfig", {**LOHA, "use_effective_conv2d": True}, ("conv2d", "grouped", "point")),
    Case("loha-core-1d", "loha", "LoHaConfig", {**LOHA, "use_effective_conv2d": True}, ("conv1d", "point1d")),
    Case("lokr", "lokr", "LoKrConfig", {**LOKR, **PATTERNS}),
    Case("lokr-full", "lokr", "LoKrConfig", {"r": 32, "alpha": 5}),
    Case("lokr-both", "lokr", "LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}),
    Case("lokr-factor", "lokr", "LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4}),
    Case("lokr-conv", "lokr", "LoKrConfig", {"r": 1, "alpha": 5}, CONVOLUTIONS),
    Case("lokr-conv-full", "lokr", "LoKrConfig", {"r": 32, "alpha": 5}, ("conv2d", "grouped", "point")),
    Case("lokr-conv1d-full", "lokr", "LoKrConfig", {"r": 32, "alpha": 5}, ("conv1d", "point1d")),
    Case("lokr-core", "lokr", "LoKrConfig", {"r": 1, "alpha": 5, "use_effective_conv2d": True}, ("conv2d", "grouped")),
    Case("lokr-core-1d", "lokr", "LoKrConfig", {"r": 3, "alpha": 5, "use_effective_conv2d": True}, ("conv1d",)),
    Case("vera", "vera", "VeraConfig", {"r": 5, "save_projection": True}, MATRICES),
    Case("fourierft", "fourierft", "FourierFTConfig", FOURIER, MATRICES, tolerance=FLOAT32),
    Case(
        "fourierft-pattern", "fourierft", "FourierFTConfig",
        {**FOURIER, "n_frequency_pattern": {"tall": 70, "square": 144}, "random_loc_seed": 5, "scaling": 9.0},
        tolerance=FLOAT32,
    ),
    Case("vblora", "vblora", "VBLoRAConfig", VBLORA, MATRICES),
    Case("vblora-topk", "vblora", "VBLoRAConfig", {**VBLORA, "save_only_topk_weights": True}, MATRICES),
    Case("vblora-one", "vblora", "VBLoRAConfig", {**VBLORA, "topk": 1, "save_only_topk_weights": True}),
    Case("c3a", "c3a", "C3AConfig", {"block_size": 4, "block_size_pattern": {"tall": 2}}, tolerance=FLOAT32),
    Case("shira", "shira", "ShiraConfig", {"r": 2, "random_seed": 3}),
    Case("gralora", "gralora", "GraloraConfig", GRALORA, MATRICES),
    Case("gralora-hybrid", "gralora", "GraloraConfig", {**GRALORA, "hybrid_r": 3, "gralora_k": 4}, MATRICES),
    Case("delora", "delora", "DeloraConfig", {"r": 3, "rank_pattern": {"tall": 2}, "lambda_pattern": {"wide": 3.0}}),
    Case("delora-short", "delora", "DeloraConfig", {"r": 3}, edit=_shrink_delora),
    Case("randlora", "randlora", "RandLoraConfig", RANDLORA, MATRICES),
    Case("randlora-sparse", "randlora", "RandLoraConfig", {**RANDLORA, "r": 4, "sparse": True}, MATRICES),
]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One module as the protocol sees it, and what PEFT added to it: (out, everything else)."""

    file: ModuleType
    parts: Mapping[str, Any]
    settings: Mapping[str, Any]
    shape: tuple[int, ...]
    expected: Any
    weight: Any

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {k: v.shape for k, v in self.parts.items()}

    def delta(self, first: int = 0, last: int | None = None) -> Any:
        prepared = self.file.prepare(self.parts, self.settings, self.shape)
        return self.file.delta(prepared, self.settings, self.shape, first, self.shape[0] if last is None else last)

    def with_parts(self, **parts: Any) -> Layer:
        changed = {**self.parts, **parts}
        return Layer(self.file, changed, self.settings, self.shape, self.expected, self.weight)


def _randomise(model: Any) -> None:
    """Random numbers in place of everything the adapter has; all of them fit float32, where PEFT computes there."""
    import torch

    generator = torch.Generator().manual_seed(11)
    norms = [(n, t) for n, t in model.named_buffers() if "delora_w_norm" in n]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    with torch.no_grad():
        for _, tensor in [*trained, *norms]:
            tensor.copy_(0.1 + torch.randn(tensor.shape, generator=generator))


def _read(directory: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """Config, parts by module, and parts that stand for all modules; floats as float64, integers as int64."""
    from safetensors.numpy import load_file

    raw = json.loads((directory / "adapter_config.json").read_text())
    modules: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for key, value in load_file(directory / "adapter_model.safetensors").items():
        value = value.astype(np.float64 if value.dtype.kind == "f" else np.int64)
        if key.startswith(PREFIX):
            module, _, part = key[len(PREFIX) :].removesuffix(".weight").rpartition(".")
            modules.setdefault(module, {})[part] = value
        else:
            shared[key.removeprefix("base_model.")] = value
    return raw, modules, shared


def _settings(case: Case, raw: dict[str, Any], module: str) -> dict[str, Any]:
    """Settings with rank and alpha of the module, looked up by its plain name."""
    ranks = raw.get("rank_pattern") or {}
    rank = raw.get("r", 0) if case.tuner == "adalora" else ranks.get(module, raw.get("r", 0))
    alphas = [raw[n] for n in ("lora_alpha", "alpha", "randlora_alpha") if raw.get(n) is not None]
    alpha = (raw.get("alpha_pattern") or {}).get(module, alphas[0]) if alphas else None
    return dict(case.file.settings(raw, rank, alpha))


def _build(case: Case, directory: Any) -> dict[str, Layer]:
    import peft
    import torch

    with third_party():
        torch.manual_seed(5)
        network = _network().double()
        base = {m: network.get_submodule(m).weight.detach().numpy().copy() for m in case.targets}
        config = getattr(peft, case.config)(target_modules=list(case.targets), **case.fields)
        model = peft.get_peft_model(network, config).double()
        _randomise(model)
        case.edit(model)
        model.save_pretrained(directory)
        merged = model.merge_and_unload()
    raw, modules, shared = _read(directory)
    assert set(modules) == set(case.targets)
    assert raw["peft_type"] == case.file.PEFT_TYPE
    layers = {}
    for module in case.targets:
        after = merged.get_submodule(module).weight.detach().numpy()
        assert after.dtype == np.float64
        added = (after - base[module]).T if module == "turned" else after - base[module]
        parts = {**{k: v for k, v in shared.items() if k in case.file.SHARED}, **modules[module]}
        assert parts.keys() <= {*case.file.REQUIRED, *case.file.OPTIONAL, *case.file.SHARED}
        assert parts.keys() >= {*case.file.REQUIRED, *case.file.SHARED}
        expected = added.reshape(len(added), -1)
        layers[module] = Layer(case.file, parts, _settings(case, raw, module), added.shape, expected, base[module])
    return layers


Build = Callable[[Case], dict[str, Layer]]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Layers of a case, made once a session. Change nothing in them."""
    made: dict[str, dict[str, Layer]] = {}

    def get(case: Case) -> dict[str, Layer]:
        if case.name not in made:
            made[case.name] = _build(case, tmp_path_factory.mktemp(case.name))
        return made[case.name]

    return get


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


every_case = pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])


def close(found: Any, expected: Any, tolerance: float, *others: Any) -> None:
    """Equal to `tolerance` of the largest magnitude that took part in the sums."""
    largest = max(float(np.abs(x).max()) for x in (expected, *others))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


@every_case
def test_delta_is_what_peft_adds(case: Case, build: Build) -> None:
    for layer in build(case).values():
        assert layer.file.check(layer.shapes, layer.settings, layer.shape) is None
        assert np.abs(layer.expected).max() > 1e-3
        delta = layer.delta()
        assert delta.dtype == np.float64
        close(delta, layer.expected, case.tolerance, layer.weight)


@every_case
def test_rows_do_not_depend_on_the_cut(case: Case, build: Build) -> None:
    random = np.random.default_rng(3)
    for layer in build(case).values():
        whole, out = layer.delta(), layer.shape[0]
        cuts = [range(out + 1), sorted({0, *random.integers(1, out, 3).tolist(), out}), [0, out // 2 + 1, out]]
        for cut in cuts:
            pieces = [layer.delta(a, b) for a, b in pairwise(cut)]
            # A product of fewer rows may be summed in another order.
            close(np.concatenate(pieces), whole, 1e-14)


NEUTRAL = {
    "adalora": ("lora_E",), "loha": ("hada_w2_b",), "lokr": ("lokr_w1", "lokr_w1_a"), "vera": ("vera_lambda_b",),
    "fourierft": ("fourierft_spectrum",), "vblora": ("vblora_vector_bank",), "c3a": ("c3a_kernel",),
    "shira": ("shira_weight",), "gralora": ("gralora_B", "gralora_B_general"), "delora": ("delora_B",),
    "randlora": ("randlora_lambda",),
}  # fmt: skip


@every_case
def test_neutral_parts_give_zero(case: Case, build: Build) -> None:
    for layer in build(case).values():
        zero = {k: np.zeros_like(layer.parts[k]) for k in NEUTRAL[case.tuner] if k in layer.parts}
        assert zero
        assert not layer.with_parts(**zero).delta().any()
        assert layer.delta().any()


# Parts from which a layer takes what it needs, and the axes along which they may be larger.
TAKEN_FROM = {
    "vera_A": (1,), "vera_B": (0,), "randlora_A": (2,), "randlora_B": (0, 1),
    "fourierft_spectrum": (0,), "vblora_vector_bank": (0,),
}  # fmt: skip


@every_case
def test_check_reports_parts_of_other_shapes(case: Case, build: Build) -> None:
    for module, layer in build(case).items():
        for part, shape in layer.shapes.items():
            fixed = [axis for axis in range(len(shape)) if axis not in TAKEN_FROM.get(part, ())]
            wrong = [tuple(n + (i == axis) for i, n in enumerate(shape)) for axis in fixed]
            for other in [*wrong, shape[:-1]]:
                problem = layer.file.check({**layer.shapes, part: other}, layer.settings, layer.shape)
                assert problem, f"{module}: {part} {other} was {shape}"


@every_case
def test_check_reports_weights_of_other_shapes(case: Case, build: Build) -> None:
    for layer in build(case).values():
        more = (layer.shape[0] + 100, *layer.shape[1:])
        others = [(*layer.shape, 2), *([more] if case.tuner not in ("fourierft", "shira") else [])]
        for other in others:
            assert layer.file.check(layer.shapes, layer.settings, other)


def test_fields_are_all_of_the_config(build: Build) -> None:
    """What PEFT's config has is used, ignored with intent, or refused; nothing is in two of these."""
    import dataclasses

    import peft

    common = {
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
        "rank_pattern", "alpha_pattern", "peft_version", "fan_in_fan_out", "r", "trainable_token_indices",
        "layer_replication", "ensure_weight_tying",
    }  # fmt: skip
    for case in {c.tuner: c for c in CASES}.values():
        known = [*case.file.FIELDS, *case.file.IGNORED, *case.file.REFUSED]
        assert len(known) == len(set(known))
        fields = {f.name for f in dataclasses.fields(getattr(peft, case.config))}
        assert fields - common <= set(known), case.tuner


def test_fourierft_is_the_transform_in_float64(build: Build) -> None:
    """PEFT's places, and torch's inverse transform of the whole spectrum in double precision."""
    import torch

    for layer in build(named("fourierft-pattern")).values():
        spectrum = torch.from_numpy(layer.parts["fourierft_spectrum"])
        places = torch.randperm(layer.shape[0] * layer.shape[1], generator=torch.Generator().manual_seed(5))
        dense = torch.zeros(layer.shape, dtype=torch.float64)
        dense.view(-1)[places[: len(spectrum)]] = spectrum
        close(layer.delta(), (torch.fft.ifft2(dense).real * 9.0).numpy(), FLOAT64)


def test_fourierft_says_how_to_get_torch(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(named("fourierft"))["wide"]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'inlay\[torch\]'"):
        fourierft.prepare(layer.parts, layer.settings, layer.shape)


def test_fourierft_reports_more_frequencies_than_there_are() -> None:
    assert fourierft.check({"fourierft_spectrum": (7,)}, {}, (2, 3))
    assert fourierft.check({"fourierft_spectrum": (6,)}, {}, (2, 3)) is None


def test_c3a_is_the_circulant_matrix_in_float64(build: Build) -> None:
    import torch
    from peft.tuners.c3a.utils import get_circulant_fast

    for layer in build(named("c3a")).values():
        matrix = get_circulant_fast(torch.from_numpy(layer.parts["c3a_kernel"])) / layer.shape[1]
        close(layer.delta(), matrix.numpy(), FLOAT64)


def test_c3a_copies_the_kernel() -> None:
    kernel = np.array([[[3.0, 6.0, 9.0]]])
    found = c3a.delta({"c3a_kernel": kernel}, {}, (3, 3), 0, 3)
    assert found.tolist() == [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]]


def test_shira_adds_up_what_is_named_twice() -> None:
    parts = {"shira_weight": np.array([1.0, 2.0, 4.0]), "shira_indices": np.array([[1, 0, 1], [2, 0, 2]])}
    prepared = shira.prepare(parts, {}, (2, 3))
    assert shira.delta(prepared, {}, (2, 3), 0, 2).tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]]


def test_shira_takes_the_float_indices_of_windows(build: Build) -> None:
    layer = build(named("shira"))["wide"]
    floats = layer.with_parts(shira_indices=layer.parts["shira_indices"].astype(np.float64))
    assert np.array_equal(floats.delta(), layer.delta())


@pytest.mark.parametrize("place", [(2, 0), (0, 3), (-1, 0)])
def test_shira_refuses_places_outside_of_the_weight(place: tuple[int, int]) -> None:
    parts = {"shira_weight": np.ones(1), "shira_indices": np.array(place).reshape(2, 1)}
    with pytest.raises(InputError, match="outside"):
        shira.prepare(parts, {}, (2, 3))


def test_vblora_reports_another_topk_than_was_saved(build: Build) -> None:
    layer = build(named("vblora-topk"))["wide"]
    assert vblora.check(layer.shapes, {"topk": 2}, layer.shape)
    assert vblora.check(layer.shapes, {"topk": 10}, layer.shape)


@pytest.mark.parametrize("part", ["vblora_logits_A", "vblora_logits_B"])
def test_vblora_reports_half_a_form(build: Build, part: str) -> None:
    layer = build(named("vblora-topk"))["wide"]
    for lost in ("_topk_indices", "_topk_weights"):
        assert vblora.check({k: v for k, v in layer.shapes.items() if k != part + lost}, layer.settings, layer.shape)


def test_delora_keeps_its_own_norms(build: Build) -> None:
    """The lengths in the file are used, not those of the weight."""
    layer = build(named("delora"))["wide"]
    doubled = layer.with_parts(delora_w_norm=2 * layer.parts["delora_w_norm"])
    close(doubled.delta(), 2 * layer.delta(), 1e-15)


@pytest.mark.parametrize(
    ("config", "tuner"), [("VeraConfig", "vera"), ("RandLoraConfig", "randlora")], ids=["vera", "randlora"]
)
def test_projections_that_were_not_saved_are_missed(config: str, tuner: str, tmp_path: Any) -> None:
    """PEFT leaves them out; the planner then says what `MISSING` says."""
    import peft

    file = importlib.import_module(f"inlay.tuners.{tuner}")
    with third_party():
        fields = {"target_modules": ["wide"], "r": 3, "save_projection": False}
        peft.get_peft_model(_network(), getattr(peft, config)(**fields)).save_pretrained(tmp_path)
    _, modules, shared = _read(tmp_path)
    assert not set(file.SHARED) & {*modules["wide"], *shared}
    assert "projections are not in the file" in file.MISSING


@pytest.mark.parametrize("tuner", ["vera", "randlora"])
def test_check_says_that_projections_are_missing(build: Build, tuner: str) -> None:
    layer = build(named(tuner))["wide"]
    bare = {k: v for k, v in layer.shapes.items() if k not in layer.file.SHARED}
    assert layer.file.check(bare, layer.settings, layer.shape) == layer.file.MISSING
