"""PVeRA, GLoRA, OSF, PEANuT, Super-Tuning, Uni-LoRA and WaveFT, file by file: rows, neutral parts, and parts that do not fit.

`test_tuners` compares them with PEFT; here are the laws of the protocol, on parts with random numbers.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import inlay
from cases import MODELS, Kit, save_adapter, third_party
from inlay.adapters.peft_config import COMMON, COMMON_REFUSED
from inlay.errors import AdapterError, InputError, PlanError
from inlay.tuners import glora, osf, peanut, supertuning, waveft

SHAPE = (7, 9)
CONFIGS = {
    "pvera": "PveraConfig", "glora": "GloraConfig", "osf": "OSFConfig", "peanut": "PeanutConfig",
    "supertuning": "SupertuningConfig", "unilora": "UniLoraConfig", "waveft": "WaveFTConfig",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file with the shapes of its parts on a weight (7, 9), fields of its config, and parts that are zero if neutral."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    neutral: tuple[str, ...]
    raw: Mapping[str, Any] = field(default_factory=dict)
    larger: tuple[str, ...] = ()  # parts that may be larger along some axis

    @property
    def file(self) -> ModuleType:
        return import_module(f"inlay.tuners.{self.name.partition('-')[0]}")

    @property
    def settings(self) -> Any:
        return self.file.settings(self.raw, int(self.raw.get("r") or 8), self.raw.get("lora_alpha"))

    @property
    def parts(self) -> dict[str, Any]:
        random = np.random.default_rng(7)
        parts = {name: random.standard_normal(shape) for name, shape in self.shapes.items()}
        if "supertuning_indices" in parts:
            parts["supertuning_indices"] = random.permutation(63)[: len(parts["supertuning_indices"])]
        for name in parts.keys() & {"unilora_indices_A", "unilora_indices_B"}:
            parts[name] = random.integers(0, len(parts["unilora_theta_d"]), self.shapes[name])
        return {name: 0 * part if name.endswith(".zeros") else part for name, part in parts.items()}


PAIR = {"glora_A.Xd": (7, 2), "glora_A.Xu": (2, 9), "glora_B.Xd": (7, 3), "glora_B.Xu": (3, 9)}
COLUMN = {"glora_A.X": (7, 1), "glora_B.X": (7, 1)}
NO_C, NO_BIAS = {"glora_C.zeros": (9, 1)}, {"glora_D.zeros": (7,), "glora_E.zeros": (7,)}
EACH, ONE = {"glora_D.X": (7,), "glora_E.X": (7,)}, {"glora_D.X": (1,), "glora_E.X": (1,)}
SPARSE = {"supertuning_values": (12,), "supertuning_indices": (12,)}
SUPRA = {"supertuning_lora_A": (2, 9), "supertuning_lora_B": (7, 2)}
DEEP = {
    "peanut_A": (2, 7),
    "peanut_B": (7, 2),
    **{f"peanut_{x}coders.{i}": (2, 2) for x in ("en", "de") for i in (0, 1)},
}
UNILORA = {
    "unilora_theta_d": (11,), "unilora_indices_A": (2, 9), "unilora_indices_B": (7, 2), "unilora_scales_A": (2, 9),
    "unilora_scales_B": (7, 2),
}  # fmt: skip
CASES = (
    Case(
        "pvera", {"pvera_A": (6, 11), "pvera_B": (10, 3), "pvera_lambda_b": (7,), "pvera_lambda_d": (6,)},
        ("pvera_lambda_b",), larger=("pvera_A", "pvera_B"),
    ),
    Case("glora-pair", {**PAIR, **NO_C, **EACH}, ("glora_A.Xd", "glora_B.Xu", "glora_D.X", "glora_E.X")),
    Case("glora-column", {**COLUMN, **NO_C, **ONE}, ("glora_A.X", "glora_B.X", "glora_D.X", "glora_E.X")),
    Case("glora-one", {"glora_A.X": (1,), "glora_B.X": (1,), **NO_C, **NO_BIAS}, ("glora_A.X", "glora_B.X")),
    Case("glora-bias", {"glora_A.zeros": (7, 9), "glora_B.zeros": (7, 9), **NO_C, **EACH}, ("glora_D.X", "glora_E.X")),
    Case("glora-coupled", {**COLUMN, "glora_C.X": (9, 1), **NO_BIAS}, ("glora_A.X", "glora_B.X", "glora_C.X")),
    Case("glora-coupled-pair", {**COLUMN, "glora_C.Xd": (9, 2), "glora_C.Xu": (2, 1), **ONE}, ("glora_A.X", "glora_B.X", "glora_C.Xu", "glora_D.X", "glora_E.X")),
    Case("peanut", {"peanut_A": (2, 7), "peanut_B": (7, 2)}, ("peanut_B",), {"scaling": 0.5}),
    Case("peanut-deep", DEEP, ("peanut_B",), {"depth": 2, "act_fn": "silu"}),
    Case("unilora", UNILORA, ("unilora_scales_A",), larger=("unilora_theta_d",)),
    Case("supertuning", SPARSE, ("supertuning_values",)),
    Case("supertuning-pair", {**SPARSE, **SUPRA}, ("supertuning_values", "supertuning_lora_B"), {"r": 2, "lora_alpha": 3.0}),
    Case("waveft", {"waveft_spectrum": (20,)}, ("waveft_spectrum",), larger=("waveft_spectrum",)),
    Case("waveft-sym4", {"waveft_spectrum": (20,)}, ("waveft_spectrum",), {"wavelet_family": "sym4"}, ("waveft_spectrum",)),
    Case("waveft-direct", {"waveft_spectrum": (20,)}, ("waveft_spectrum",), {"use_idwt": False}, ("waveft_spectrum",)),
)  # fmt: skip
every_case = pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])


def merged(case: Case, parts: Mapping[str, Any], first: int = 0, last: int = SHAPE[0]) -> Any:
    """Rows `[first, last)` of a weight with zeros of both signs, on a base that differs from it."""
    file, settings = case.file, case.settings
    weight, base = weights()
    prepared = file.prepare(parts, settings, SHAPE)
    if not file.ADDITIVE:
        return file.merge(weight[first:last], base[first:last], prepared, settings, SHAPE, first)
    delta = file.delta(prepared, settings, SHAPE, first, last)
    assert delta.shape == (last - first, SHAPE[1])
    return np.where(delta == 0, weight[first:last], weight[first:last] + delta)


def weights() -> tuple[Any, Any]:
    random = np.random.default_rng(2)
    weight = random.standard_normal(SHAPE)
    weight[1, 1:4] = -0.0, 0.0, -0.0
    return weight, weight + random.standard_normal(SHAPE)


@every_case
def test_rows_do_not_depend_on_the_cut(case: Case) -> None:
    parts = case.parts
    assert case.file.check(case.shapes, case.settings, SHAPE) is None
    whole = merged(case, parts)
    if case.file.WHOLE:
        with pytest.raises(AssertionError):
            merged(case, parts, 0, 3)
        return
    for cut in (range(8), (0, 3, 7), (0, 1, 6, 7)):
        pieces = np.concatenate([merged(case, parts, a, b) for a, b in pairwise(cut)])
        np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-14)


@every_case
def test_neutral_parts_return_the_same_bytes(case: Case) -> None:
    weight, _ = weights()
    bias = np.array([-0.0, 1.0, 0.0, 2.0, -3.0, 4.0, 5.0])
    neutral = {name: 0 * part if name in case.neutral else part for name, part in case.parts.items()}
    assert merged(case, neutral).tobytes() == weight.tobytes()
    acts = merged(case, case.parts).tobytes() != weight.tobytes()
    if hasattr(case.file, "touches_bias") and case.file.touches_bias(case.shapes, case.settings):
        assert case.file.merge_bias(bias, bias, neutral, case.settings).tobytes() == bias.tobytes()
        acts |= case.file.merge_bias(bias, bias, case.parts, case.settings).tobytes() != bias.tobytes()
    assert acts, "neutral and random parts do the same"


@every_case
def test_check_reports_parts_of_other_shapes(case: Case) -> None:
    for part, shape in case.shapes.items():
        longer = [tuple(n + (i == axis) for i, n in enumerate(shape)) for axis in range(len(shape))]
        wrong = [*([] if part in case.larger else longer), shape[:-1], (*shape, 2)]
        for other in wrong:
            assert case.file.check({**case.shapes, part: other}, case.settings, SHAPE), (part, other)


@every_case
def test_check_reports_weights_of_other_shapes(case: Case) -> None:
    for other in ((7,), (7, 9, 1), (1, 2), (200, 300)):
        fits_any = case.name.startswith(("waveft", "supertuning")) and other == (200, 300)
        if not fits_any or "supertuning_lora_A" in case.shapes:
            assert case.file.check(case.shapes, case.settings, other), other


@every_case
def test_check_reports_what_is_lost(case: Case) -> None:
    for part in case.shapes.keys() - set(case.file.REQUIRED):
        rest = {name: shape for name, shape in case.shapes.items() if name != part}
        assert case.file.check(rest, case.settings, SHAPE), part


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_are_all_of_the_config(name: str) -> None:
    import peft

    file = import_module(f"inlay.tuners.{name}")
    known = [*file.FIELDS, *file.IGNORED, *file.REFUSED]
    assert len(known) == len(set(known))
    fields = {f.name for f in dataclasses.fields(getattr(peft, CONFIGS[name]))}
    assert fields - COMMON - COMMON_REFUSED.keys() == set(known)


Make = Callable[..., Path]


@pytest.fixture
def make(kit: Kit, tmp_path: Path) -> Make:
    """An adapter of PEFT on the tiny Qwen2, as PEFT starts it."""

    def get(config: str, **fields: Any) -> Path:
        import peft

        with third_party():
            adapted = peft.get_peft_model(MODELS["qwen2"].load(kit.base("qwen2")), getattr(peft, config)(**fields))
        return save_adapter(adapted, tmp_path / "adapter", copies=False)

    return get


@pytest.mark.parametrize(("c", "d"), [("lora", "none"), ("vector", "none"), ("none", "constant")])
def test_glora_for_a_bias_that_the_base_has_not_is_refused(
    kit: Kit, make: Make, c: str, d: str, tmp_path: Path
) -> None:
    """PEFT gives such parts to layers with a bias only."""
    from safetensors.torch import load_file, save_file

    path = make("GloraConfig", target_modules=["q_proj"], r=3, config_C=c, config_D_E=d)
    base, lost = kit.copy_of(kit.base("qwen2"), tmp_path), "model.layers.1.self_attn.q_proj.bias"
    for file in base.glob("*.safetensors"):
        save_file({k: t for k, t in load_file(file).items() if k != lost}, file, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    del names["weight_map"][lost]
    index.write_text(json.dumps(names))
    with pytest.raises(PlanError, match=f"changes the layer's bias, and the base has no {lost}"):
        inlay.make_plan(base, [path])


def test_glora_zeros_that_are_none_are_refused() -> None:
    parts = {"glora_A.X": np.ones(1), "glora_B.X": np.ones(1), "glora_C.zeros": np.ones((9, 1))}
    with pytest.raises(InputError, match=r"glora_C\.zeros"):
        glora.prepare(parts, {}, SHAPE)


def test_glora_scales_the_unmerged_base() -> None:
    weight, base = weights()
    parts = {"glora_A.X": np.full(1, 0.5), "glora_B.X": np.full(1, 2.0)}
    assert np.array_equal(glora.merge(weight, base, parts, {}, SHAPE, 0), weight + (0.5 * base + 2.0))


@pytest.mark.parametrize("config", ["PveraConfig", "RandLoraConfig"])
def test_projections_that_are_lost_are_not_drawn_again(kit: Kit, make: Make, config: str) -> None:
    """The config says that they were saved, so the file is not the one that PEFT wrote."""
    path = make(config, target_modules=["q_proj"], r=3, save_projection=False)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "save_projection": True}))
    with pytest.raises(PlanError, match="save_projection=True"):
        inlay.make_plan(kit.base("qwen2"), [path])


def test_pvera_that_samples_is_refused(make: Make) -> None:
    path = make("PveraConfig", target_modules=["q_proj"], r=3, sample_at_inference=True)
    with pytest.raises(AdapterError, match="sample_at_inference"):
        inlay.read_adapter(path)


@pytest.mark.parametrize(
    ("config", "fields", "advice"),
    [
        ("SupertuningConfig", {"save_precomputed_indices": False}, "save_precomputed_indices=True"),
        ("WaveFTConfig", {"wavelet_family": "coif5", "n_frequency": 9}, "48 numbers where its layer makes room for 30"),
        ("WaveFTConfig", {"wavelet_family": "db38", "n_frequency": 9}, "db38"),
    ],
)
def test_what_is_not_determined_is_refused(
    kit: Kit, make: Make, config: str, fields: Mapping[str, Any], advice: str
) -> None:
    path = make(config, target_modules=["q_proj"], **fields)
    with pytest.raises(PlanError, match=advice):
        inlay.make_plan(kit.base("qwen2"), [path])


@pytest.mark.parametrize("place", [63, -1])
def test_supertuning_refuses_places_outside_of_the_weight(place: int) -> None:
    parts = {"supertuning_values": np.ones(1), "supertuning_indices": np.array([place])}
    with pytest.raises(InputError, match="outside"):
        supertuning.prepare(parts, {"rank": 0}, SHAPE)


def test_supertuning_adds_up_what_is_named_twice() -> None:
    parts: Any = {"supertuning_values": np.array([1.0, 2.0, 4.0]), "supertuning_indices": np.array([5, 0, 5])}
    prepared = supertuning.prepare(parts, {"rank": 0}, (2, 3))
    assert supertuning.delta(prepared, {"rank": 0}, (2, 3), 0, 2).tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]]


def test_supertuning_with_a_pair_that_the_config_does_not_have_is_reported() -> None:
    assert supertuning.check({**SPARSE, **SUPRA}, supertuning.settings({"r": None}, 8, None), SHAPE)


def test_supertuning_scales_by_two_without_an_alpha() -> None:
    assert supertuning.settings({"r": 4}, 4, None) == {"rank": 4, "scaling": 2.0}


def test_osf_with_the_components_of_the_base_keeps_the_weight() -> None:
    """Whatever sign a library gave them, and only what was trained is replaced."""
    weight, base = weights()
    left, size, right = np.linalg.svd(base, full_matrices=False)
    signs = np.array([1.0, -1.0, -1.0])
    parts = {
        "osf_svd_params.U_low": left[:, 4:] * signs,
        "osf_svd_params.S_low": size[4:],
        "osf_svd_params.V_low": signs[:, None] * right[4:],
    }
    assert osf.check({k: p.shape for k, p in parts.items()}, {}, SHAPE) is None
    np.testing.assert_allclose(osf.merge(weight, base, parts, {}, SHAPE, 0), weight, rtol=0, atol=1e-13)
    parts["osf_svd_params.S_low"] = 0 * size[4:]
    only_large = (left[:, :4] * size[:4]) @ right[:4]
    np.testing.assert_allclose(osf.merge(base, base, parts, {}, SHAPE, 0), only_large, rtol=0, atol=1e-13)
    with pytest.raises(AssertionError):
        osf.merge(weight[:3], base[:3], parts, {}, SHAPE, 0)


@pytest.mark.parametrize(
    ("left", "size", "right"),
    [
        ((7, 3), (3,), (3, 8)),
        ((6, 3), (3,), (3, 9)),
        ((7, 3), (2,), (3, 9)),
        ((7, 8), (8,), (8, 9)),
        ((7, 3), (), (3, 9)),
    ],
)
def test_osf_reports_components_of_another_weight(left: Any, size: Any, right: Any) -> None:
    shapes = dict(zip(osf.REQUIRED, (left, size, right), strict=True))
    assert "no components" in (osf.check(shapes, {}, SHAPE) or "")


@pytest.mark.parametrize("name", sorted(peanut.ACTIVATIONS))
def test_an_activation_is_that_of_transformers(name: str) -> None:
    import torch
    from transformers.activations import ACT2FN

    at = np.concatenate([np.linspace(-30, 30, 601), [-1e3, 1e3, -1e-9, 0.0]])
    expected = ACT2FN[name](torch.from_numpy(at)).numpy()
    np.testing.assert_allclose(peanut.ACTIVATIONS[name](at), expected, rtol=1e-13, atol=1e-13)


def test_the_activations_are_all_that_have_no_parameters() -> None:
    from transformers.activations import ACT2CLS

    assert ACT2CLS.keys() - peanut.ACTIVATIONS.keys() == {"prelu", "xielu"}


def test_peanut_of_another_depth_or_activation_is_reported() -> None:
    shapes = {"peanut_A": (2, 7), "peanut_B": (7, 2)}
    assert "depth is 1" in (peanut.check(shapes, peanut.settings({"depth": 1}, 2, None), SHAPE) or "")
    assert "depth is 0" in (peanut.check(DEEP, peanut.settings({}, 2, None), SHAPE) or "")
    assert "'prelu'" in (peanut.check(shapes, peanut.settings({"act_fn": "prelu"}, 2, None), SHAPE) or "")


def test_unilora_without_its_indices_is_refused(kit: Kit, make: Make) -> None:
    """The file then has one vector, and names no layer."""
    path = make("UniLoraConfig", target_modules=["q_proj"], r=3)
    with pytest.raises(PlanError, match=r"has no parts of any module.*save_indices=True"):
        inlay.make_plan(kit.base("qwen2"), [path])


@pytest.mark.parametrize("index", [11, -1])
def test_unilora_refuses_numbers_that_the_vector_does_not_have(index: int) -> None:
    case = next(c for c in CASES if c.name == "unilora")
    parts = case.parts
    parts["unilora_indices_B"][3, 1] = index
    with pytest.raises(InputError, match="point outside a vector of 11"):
        case.file.prepare(parts, {}, SHAPE)


@pytest.mark.parametrize("wavelet", waveft.TANGENTS)
def test_a_wavelet_is_orthogonal_and_has_its_vanishing_moments(wavelet: str) -> None:
    low, high = waveft._filters(wavelet)
    taps = len(low)
    for shift in range(taps // 2):
        wanted = float(shift == 0)
        assert abs(low[2 * shift :] @ low[: taps - 2 * shift] - wanted) < 1e-14
        assert abs(high[2 * shift :] @ low[: taps - 2 * shift]) < 1e-14
    moments = taps // 3 if wavelet.startswith("coif") else taps // 2
    at = np.linspace(-1, 1, taps)
    for power in range(moments):
        assert abs(high @ at**power) < 1e-13, power


@pytest.mark.parametrize("wavelet", waveft.WAVELETS)
@pytest.mark.parametrize("shape", [(7, 9), (8, 5), (1, 3), (20, 12)])
def test_waveft_is_pefts_transform(wavelet: str, shape: tuple[int, int]) -> None:
    """PEFT's own numbers have 12 digits for some wavelets, and all of those of float64 for the rest."""
    from peft import WaveFTConfig
    from peft.tuners.waveft.layer import WaveFTLinear
    from torch import nn

    raw = {"wavelet_family": wavelet, "scaling": 3.0, "random_loc_seed": 4}
    with third_party():
        config = WaveFTConfig(**raw, init_weights=False)
        layer = WaveFTLinear(nn.Linear(shape[1], shape[0]), "default", config, shape[0] * shape[1] // 2).double()
        expected = layer.get_delta_weight("default").detach().numpy()
    settings = waveft.settings(raw, 8, None)
    parts = {"waveft_spectrum": layer.waveft_spectrum["default"].detach().numpy()}
    found = waveft.delta(waveft.prepare(parts, settings, shape), settings, shape, 0, shape[0])
    inexact = wavelet == "db3" or wavelet.startswith("sym")
    np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-10 if inexact else 1e-13) * np.abs(expected).max())


def test_the_wavelets_are_all_that_peft_can_use() -> None:
    """One of PEFT's own makes a change that is smaller than the weight, which fails in training and in merging."""
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet, wavelist

    fits = {name for name in wavelist() if WAVELET_REDUCTIONS.get(name) == (len(Wavelet(name).rec_lo) - 2,) * 2}
    assert {*waveft.WAVELETS} == fits
    assert {*wavelist()} - fits <= {"coif5", "haar"}


def test_waveft_says_how_to_get_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'inlay\[torch\]'"):
        waveft.prepare({"waveft_spectrum": np.ones(3)}, waveft.settings({}, 8, None), SHAPE)


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_settings_are_json(case: Case) -> None:
    assert json.loads(json.dumps(case.settings)) == case.settings
