"""Combining and the newer methods under hostile input: refused with one message, or right; never another result."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
import test_torchtune as tune
from build import (
    BF16,
    CONFIG,
    F32,
    F64,
    PREFIX,
    adapter_tensors,
    base_tensors,
    modules_of,
    normal,
    read_arrays,
    within,
    write_adapter,
    write_base,
    write_json,
    write_model,
    write_tensors,
)
from inlay.errors import AdapterError, InputError, PlanError
from inlay.plan.combination import METHODS, Options
from inlay.tuners import combining, mixing

PRUNING = {name: m for name, m in {**combining.METHODS, **mixing.METHODS}.items() if m.prunes}
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def options(name: str) -> Options:
    return Options(density=0.5) if name in PRUNING else Options()


def two(place: Path, **more: Any) -> list[Path]:
    return [write_adapter(place / name, seed=i, **more) for i, name in enumerate("ab")]


def merge(base: Path, adapters: list[Path], out: Path, name: str = "sum") -> dict[str, np.ndarray]:
    inlay.run_plan(inlay.make_plan(base, adapters, combine_by=name, options=options(name)), out)
    return read_arrays(out)


# --- values out of range --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("sum", "override")])
def test_deltas_that_leave_float64_are_refused(tmp_path: Path, name: str) -> None:
    """Factors of 1e200 are finite and their products are not: no NaN may be voted away, no warning be shown."""
    huge = {key: x.astype(F64) * 1e200 for key, x in adapter_tensors(modules_of()).items()}
    base = write_base(tmp_path / "base")
    with warnings.catch_warnings(), pytest.raises(InputError, match=r"too large for float32|hold Inf or NaN"):
        warnings.simplefilter("error")
        merge(base, two(tmp_path, tensors=huge), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_weights_of_slerp_have_a_sum(tmp_path: Path) -> None:
    """1e308 + 1e308 is no number, and the second adapter would have no part in the result."""
    with pytest.raises(PlanError, match="a sum that is a number"):
        inlay.make_plan(
            write_base(tmp_path / "base"), two(tmp_path), combine_by="slerp", weights=[1e308, 1e308]
        )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("sum", "override")])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_weight_without_elements_is_refused(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    base = write_model(tmp_path / "base", {"m.a.weight": np.zeros(shape, BF16)})
    with pytest.raises(PlanError, match=r"are no pair|has no elements"):
        inlay.make_plan(base, two(tmp_path, modules={"m.a": shape}), combine_by=name, options=options(name))


def test_thousands_of_modules_of_two_ranks_are_combined_and_read_again(tmp_path: Path) -> None:
    """Each module has its rank, in one pattern for all of a rank; the names are those of experts one by one."""
    every = {f"m.{i // 64}.experts.{i % 64}.{word}": (2, 3) for i in range(400) for word in ("up", "down")}
    some = {name: shape for i, (name, shape) in enumerate(every.items()) if i % 3}
    adapters = [write_adapter(tmp_path / "a", every, r=1), write_adapter(tmp_path / "b", some, r=2)]
    base = write_model(tmp_path / "base", {f"{name}.weight": np.ones(shape, BF16) for name, shape in every.items()})
    with within(60):
        inlay.combine_adapters(adapters, tmp_path / "both")
        once = inlay.make_plan(base, adapters, combine_by="cat")
        again = inlay.make_plan(base, [tmp_path / "both"])
    assert len(json.loads((tmp_path / "both" / "adapter_config.json").read_text())["rank_pattern"]) == 1
    ranks = {key: entry.low_rank[0].rank for key, entry in once.entries.items()}
    assert ranks == {f"{name}.weight": 3 if name in some else 1 for name in every}
    assert ranks == {key: entry.low_rank[0].rank for key, entry in again.entries.items()}


# --- torchtune ------------------------------------------------------------------------------------------


def torchtune_pair(place: Path) -> tuple[list[Path], list[tune.Tensors]]:
    tensors = [tune.draw({k: tuple(t.shape) for k, t in tune.adapter_tensors().items()}, seed) for seed in (5, 6)]
    return [tune.write_adapter(place / name, t) for name, t in zip("ab", tensors, strict=True)], tensors


@pytest.mark.parametrize("name", ["slerp", "model_stock", "breadcrumbs"])
def test_a_module_whose_rows_are_reordered_is_mixed_as_one(tmp_path: Path, name: str) -> None:
    """Angles and thresholds are those of the module, although its rows are added half a head at a time."""
    base = tune.write_base(tmp_path / "base")
    adapters, tensors = torchtune_pair(tmp_path)
    merged, before = merge(base, adapters, tmp_path / "out", name), read_arrays(base)
    for module, hf in (("attn.q_proj", "self_attn.q_proj"), ("attn.v_proj", "self_attn.v_proj")):
        d = [tune.delta(t, f"layers.1.{module}") for t in tensors]
        if module == "attn.q_proj":
            d = [tune.tune_to_hf(x) for x in d]
        mix = mixing.Mix(name, "w", (0, 1), (1.0, 1.0), 0.5)
        terms = [[mixing.Pair(1.0, np.eye(x.shape[1]), lambda first, last, x=x: x[first:last])] for x in d]  # type: ignore[misc]
        wanted = mixing.Mixer(mix, terms, d[0].shape).rows(0, len(d[0]))
        key = f"model.layers.1.{hf}.weight"
        assert np.allclose(merged[key].astype(F64) - before[key], wanted, atol=1e-5), key
    assert inlay.verify(base, adapters, tmp_path / "out").exact


def test_an_adapter_of_peft_and_one_of_torchtune_are_mixed(tmp_path: Path) -> None:
    """The same adapter in both formats: what slerp makes of it and itself is the adapter."""
    base = tune.write_base(tmp_path / "base")
    tensors = tune.adapter_tensors(("attn.q_proj",), output=False)
    own = tune.write_adapter(tmp_path / "own", tensors)
    parts = {}
    for i in (0, 1):
        a, b = (tensors[f"layers.{i}.attn.q_proj.lora_{x}.weight"].numpy() for x in "ab")
        module = f"{PREFIX}model.layers.{i}.self_attn.q_proj"
        parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": tune.tune_to_hf(b).astype(F32)}
    peft = write_adapter(tmp_path / "peft", tensors=parts, r=3, alpha=6)
    assert merge(base, [own, peft], tmp_path / "out", "slerp")
    mixed, alone = read_arrays(tmp_path / "out"), merge(base, [peft], tmp_path / "alone")
    assert all(np.allclose(mixed[key], alone[key], atol=1e-6) for key in alone)


@pytest.mark.parametrize("field", [{"head_dim": -2}, {"head_dim": None, "hidden_size": -24}, {"head_dim": True}])
def test_heads_of_no_width_are_refused(tmp_path: Path, field: dict[str, Any]) -> None:
    """There would be no rows to add to, and q_proj would be left out without a word."""
    base = tune.write_base(tmp_path / "base", **field)
    adapter = tune.write_adapter(tmp_path / "a", tune.adapter_tensors(("attn.q_proj", "attn.v_proj")))
    with pytest.raises(PlanError, match="no heads of None"):
        inlay.make_plan(base, [adapter])


@pytest.mark.parametrize(
    "field",
    [{"num_attention_heads": 3}, {"num_attention_heads": -4}, {"num_key_value_heads": 0}, {"head_dim": 3}],
    ids=str,
)
def test_a_fused_tensor_that_is_not_as_the_config_says_is_refused(tmp_path: Path, field: dict[str, Any]) -> None:
    """A part of the rows of q_proj would land where k_proj's are."""
    base = tune.write_base(tmp_path / "base", model_type="phi3", architectures=["Phi3ForCausalLM"], **field)
    adapter = tune.write_adapter(tmp_path / "a", tune.adapter_tensors(("attn.q_proj", "attn.v_proj"), output=False))
    with pytest.raises(PlanError, match="reaches nothing"):
        inlay.make_plan(base, [adapter])


def test_torchtune_trains_no_pissa(tmp_path: Path) -> None:
    adapter = tune.write_adapter(tmp_path / "a", tune.adapter_tensors(), init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="asks for pissa"):
        inlay.read_adapter(adapter)


def test_the_format_is_named_where_only_peft_can_be_combined(tmp_path: Path) -> None:
    adapters, _ = torchtune_pair(tmp_path)
    with pytest.raises(PlanError, match="peft_type None, torchtune"):
        inlay.make_plan(tune.write_base(tmp_path / "base"), adapters, combine_by="cat")


# --- image models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("modules_to_save", ["conv_in"]),
        ("target_parameters", ["proj_in.weight"]),
        ("trainable_token_indices", [1]),
    ],
)
def test_more_than_a_pair_in_the_header_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    """PiSSA and OLoRA would have to shift the base; the others name tensors that such files do not have."""
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4, f"unet.{field}": value})}
    rng = np.random.default_rng(0)
    tensors = {
        "unet.conv_in.lora_A.weight": normal(rng, (2, 4, 3, 3), F32),
        "unet.conv_in.lora_B.weight": normal(rng, (8, 2, 1, 1), F32),
    }
    path = write_tensors(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(AdapterError, match="in a LoRA for an image model is not supported"):
        inlay.read_adapter(path)


# --- methods --------------------------------------------------------------------------------------------


def other(place: Path, kind: str, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """An adapter of another method."""
    write_tensors(place / "adapter_model.safetensors", tensors)
    write_json(place / "adapter_config.json", {"peft_type": kind, "target_modules": ["q_proj"], **config})
    return place


def parts(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Parts of the first q_proj, (16, 16)."""
    rng = np.random.default_rng(3)
    return {f"{PREFIX}{QUERY}.{name.replace('__', '.')}": normal(rng, s, F32) for name, s in shapes.items()}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_osf_on_a_base_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    """numpy's decomposition raises for NaN, and does not end for Inf."""
    tensors = base_tensors()
    tensors[f"{QUERY}.weight"][2, 3] = value
    base = write_model(tmp_path / "base", tensors)
    shapes = {"osf_svd_params__U_low": (16, 4), "osf_svd_params__S_low": (4,), "osf_svd_params__V_low": (4, 16)}
    with pytest.raises(InputError, match="hold Inf or NaN"):
        merge(base, [other(tmp_path / "a", "OSF", parts(**shapes))], tmp_path / "out")


PEANUT: dict[str, tuple[int, ...]] = {
    "peanut_A": (3, 16), "peanut_B": (16, 3), "peanut_encoders__0": (3, 3), "peanut_decoders__0": (3, 3)
}  # fmt: skip


@pytest.mark.parametrize("depth", [1.5, True, "1", "x", [1]])
def test_a_depth_that_is_no_whole_number_is_refused(tmp_path: Path, depth: Any) -> None:
    adapter = other(tmp_path / "a", "PEANUT", parts(**PEANUT), r=3, depth=depth)
    with pytest.raises(InputError, match="depth must be a whole number"):
        inlay.make_plan(write_base(tmp_path / "base"), [adapter])


def test_a_network_that_overflows_shows_no_warning(tmp_path: Path) -> None:
    huge = {key: (x * 1e30).astype(F32) for key, x in parts(**PEANUT).items()}
    adapter = other(tmp_path / "a", "PEANUT", huge, r=3, depth=1, act_fn="relu2")
    with warnings.catch_warnings(), pytest.raises(InputError, match="hold Inf or NaN"):
        warnings.simplefilter("error")
        merge(write_base(tmp_path / "base"), [adapter], tmp_path / "out")


def test_a_rank_that_randlora_contradicts_is_refused(tmp_path: Path) -> None:
    """The strength is alpha / r: with the rank of the config it would be another one."""
    tensors = parts(randlora_lambda=(3, 6), randlora_gamma=(6, 16))
    rng = np.random.default_rng(4)
    tensors |= {"base_model.randlora_A": normal(rng, (3, 1, 16), F32)}
    tensors |= {"base_model.randlora_B": normal(rng, (16, 6, 3), F32)}
    base = write_base(tmp_path / "base")
    for rank in (3, 4):
        adapter = other(tmp_path / str(rank), "RANDLORA", tensors, r=rank, randlora_alpha=6)
        if rank == 3:
            assert inlay.make_plan(base, [adapter])
            continue
        with pytest.raises(PlanError, match="rank 3 in the file, 4 in the config"):
            inlay.make_plan(base, [adapter])


def test_ranks_of_zero_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    pvera = parts(pvera_lambda_b=(16,), pvera_lambda_d=(0,))
    pvera |= {"base_model.pvera_A": np.zeros((0, 16), F32), "base_model.pvera_B": np.zeros((16, 0), F32)}
    uni = parts(unilora_scales_A=(0, 16), unilora_scales_B=(16, 0))
    uni |= {f"{PREFIX}{QUERY}.unilora_indices_A": np.zeros((0, 16), np.int64)}
    uni |= {f"{PREFIX}{QUERY}.unilora_indices_B": np.zeros((16, 0), np.int64)}
    uni |= {"base_model.unilora_theta_d": np.ones(5, F32)}
    for kind, tensors in (("PVERA", pvera), ("UNILORA", uni)):
        with pytest.raises(PlanError, match="do not make"):
            inlay.make_plan(base, [other(tmp_path / kind, kind, tensors, r=3)])


def test_the_config_of_the_base_is_read_with_line_ends_of_windows(tmp_path: Path) -> None:
    """The same plan, with a byte order mark too."""
    base, adapters = write_base(tmp_path / "base"), two(tmp_path)
    before = inlay.make_plan(base, adapters, combine_by="slerp")
    text = json.dumps(CONFIG, indent=2).replace("\n", "\r\n")
    (base / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert inlay.make_plan(base, adapters, combine_by="slerp").digest == before.digest
