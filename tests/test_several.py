"""Several adapters at once: summed exactly and rounded once; where order or contradiction matters, said so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from cases import DTYPES, LINEAR, MODELS, Kit, new_peft_model, save_adapter, third_party
from oracle import (
    bits,
    correctly_rounded,
    differing,
    exact_sum,
    float64,
    logits_tolerance,
    peft_merged,
    reach,
    read,
    round_exactly,
    rounded,
    same_bytes,
)


def lora(*targets: str, r: int = 4, alpha: float = 6, **more: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), "r": r, "lora_alpha": alpha, **more}


def build(kit: Kit, model: str, root: Path, *configs: Mapping[str, Any], seed: int = 40) -> list[Path]:
    """Each adapter trained (as it were) on its own; named a, b, c."""
    paths = []
    for i, config in enumerate(configs):
        peft_model = new_peft_model(MODELS[model].load(kit.base(model)), config, seed + i)
        paths.append(save_adapter(peft_model, root / "abc"[i], copies=config.get("save_embedding_layers", "auto")))
    return paths


def merge(base: Path, adapters: Sequence[Path], out: Path, **options: Any) -> Path:
    inlay.run_plan(inlay.make_plan(base, adapters, **options), out)
    return out


THREE = (
    lora(*LINEAR, r=4, alpha=6),
    lora("q_proj", "down_proj", r=7, alpha=3, use_rslora=True, rank_pattern={"down_proj": 2}),
    lora("q_proj", "lm_head", r=1, alpha=5, save_embedding_layers=False),
)


def lora_part(adapter: Path, module: str, s: float) -> tuple[np.ndarray, np.ndarray, float] | None:
    """(B, A, scaling) of a module, if the adapter has it."""
    tensors = read(adapter / "adapter_model.safetensors")
    keys = [f"base_model.model.{module}.lora_{x}.weight" for x in "BA"]
    return (float64(tensors[keys[0]]), float64(tensors[keys[1]]), s) if keys[0] in tensors else None


def scaling(i: int, module: str) -> float:
    if i == 1:
        return 3 / np.sqrt(2 if module.endswith("down_proj") else 7)
    return (6 / 4, 0, 5 / 1)[i]


# --- sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (1.0, -0.5, 0.3)], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_all_is_rounded_once(
    kit: Kit, dtype: str, weights: tuple[float, ...] | None, tmp_path: Path, path_of_arithmetic: str
) -> None:
    """Three LoRAs of different rank, alpha, scaling rule and targets: the exact sum, by factors if given."""
    del path_of_arithmetic
    adapters, base = build(kit, "qwen2", tmp_path, *THREE), kit.base("qwen2", dtype)
    before, after = read(base), read(merge(base, adapters, tmp_path / "out", weights=weights))
    assert before.keys() == after.keys()
    acting = set()
    for key, tensor in after.items():
        module = key.removesuffix(".weight")
        factors = weights or (1.0, 1.0, 1.0)
        found = [lora_part(a, module, scaling(i, module) * factors[i]) for i, a in enumerate(adapters)]
        pairs = [pair for pair in found if pair is not None]
        if not pairs:
            assert np.array_equal(bits(tensor), bits(before[key]))
            continue
        acting.add(len(pairs))
        assert np.array_equal(float64(tensor), round_exactly(*exact_sum(float64(before[key]), pairs), dtype)), key
    assert acting == {1, 2, 3}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_that_of_peft_in_float64(kit: Kit, dtype: str, tmp_path: Path) -> None:
    """The same three against PEFT: its formulas for each adapter, without its rounding in between."""
    adapters, base = build(kit, "qwen2", tmp_path, *THREE), kit.base("qwen2", dtype)
    expected = peft_merged("qwen2", base, adapters, "F64")
    before = read(base)
    for key, tensor in read(merge(base, adapters, tmp_path / "out")).items():
        exact, weight = float64(expected[key]), float64(before[key])
        assert correctly_rounded(float64(tensor), exact, reach(exact, weight), dtype).all(), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_loras_changes_no_byte(kit: Kit, dtype: str, tmp_path: Path, path_of_arithmetic: str) -> None:
    del path_of_arithmetic
    adapters, base = build(kit, "qwen2", tmp_path, *THREE), kit.base("qwen2", dtype)
    results = []
    for i, order in enumerate(itertools.permutations(range(3))):
        plan = inlay.make_plan(base, [adapters[j] for j in order], weights=[(1.0, -0.5, 0.3)[j] for j in order])
        assert not plan.order_matters
        inlay.run_plan(plan, tmp_path / f"out{i}")
        results.append(tmp_path / f"out{i}")
    assert all(same_bytes(results[0], other) for other in results[1:])


def test_opposite_adapters_cancel_to_the_base(kit: Kit, tmp_path: Path) -> None:
    """The same adapter with weights 1 and −1: nothing is left, not even a rounding."""
    (adapter,) = build(kit, "qwen2", tmp_path, lora(*LINEAR))
    base = kit.base("qwen2", "BF16")
    merged = merge(base, [adapter, adapter], tmp_path / "out", weights=[1.0, -1.0])
    assert same_bytes(base, merged)


def test_a_weight_of_zero_returns_the_base_bit_for_bit(kit: Kit, tmp_path: Path) -> None:
    (adapter,) = build(kit, "qwen2", tmp_path, lora(*LINEAR))
    base = kit.base("qwen2", "BF16")
    assert same_bytes(base, merge(base, [adapter], tmp_path / "out", weights=[0.0]))


def test_a_weight_is_a_factor_on_the_delta(kit: Kit, tmp_path: Path) -> None:
    """In float32 the doubled delta minus the single one is the delta, up to three roundings."""
    (adapter,) = build(kit, "qwen2", tmp_path, lora("q_proj"))
    base = kit.base("qwen2")
    one = read(merge(base, [adapter], tmp_path / "one"))
    two = read(merge(base, [adapter], tmp_path / "two", weights=[2.0]))
    before = read(base)
    for key in differing(before, one):
        delta, doubled = float64(one[key]) - float64(before[key]), float64(two[key]) - float64(before[key])
        assert np.abs(delta).max() > 0.1
        assert np.abs(doubled - 2 * delta).max() <= 3 * 2.0**-24 * np.abs(float64(two[key])).max() * 2


def test_each_adapter_keeps_its_own_scaling_on_a_bias(kit: Kit, tmp_path: Path) -> None:
    """lora_bias of two adapters on one bias: both are added, each scaled by its own."""
    configs = [lora("q_proj", r=4, alpha=6, lora_bias=True), lora("q_proj", r=2, alpha=5, lora_bias=True)]
    adapters, base = build(kit, "qwen2", tmp_path, *configs), kit.base("qwen2", "BF16")
    key = "model.layers.1.self_attn.q_proj.bias"
    b = [
        float64(read(a / "adapter_model.safetensors")["base_model.model.model.layers.1.self_attn.q_proj.lora_B.bias"])
        for a in adapters
    ]
    exact = float64(read(base)[key]) + 1.5 * b[0] + 2.5 * b[1]
    for i, order in enumerate((adapters, adapters[::-1])):
        found = float64(read(merge(base, order, tmp_path / f"out{i}"))[key])
        assert np.array_equal(found, rounded(exact, "BF16"))


# --- DoRA among others --------------------------------------------------------------------------------

MIXES = {
    "dora, lora": (lora("q_proj", "o_proj", use_dora=True), lora("q_proj", "v_proj", r=2)),
    "lora, dora": (lora("q_proj", "v_proj", r=2), lora("q_proj", "o_proj", use_dora=True)),
    "dora, dora": (lora("q_proj", use_dora=True), lora("q_proj", "v_proj", r=2, use_dora=True)),
    "lora, dora, lora": (lora("q_proj"), lora("q_proj", r=2, use_dora=True), lora("q_proj", r=3)),
    "dora, lora, dora": (lora("q_proj", use_dora=True), lora("q_proj", r=3), lora("q_proj", r=2, use_dora=True)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MIXES)
def test_dora_and_lora_in_turn_equal_peft(kit: Kit, name: str, dtype: str, tmp_path: Path) -> None:
    """PEFT 0.21: each DoRA takes its norm over the unmerged base, and scales all that came before it."""
    adapters, base = build(kit, "qwen2", tmp_path, *MIXES[name]), kit.base("qwen2", dtype)
    expected = peft_merged("qwen2", base, adapters, "F64")
    before = read(base)
    for key, tensor in read(merge(base, adapters, tmp_path / "out")).items():
        exact, weight = float64(expected[key]), float64(before[key])
        assert correctly_rounded(float64(tensor), exact, reach(exact, weight), dtype).all(), key


@pytest.mark.parametrize(
    ("model", "configs"),
    [
        (
            "gpt2",
            (lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True), lora("c_attn", r=2, fan_in_fan_out=True)),
        ),
        (
            "gpt2",
            (lora("c_attn", r=2, fan_in_fan_out=True), lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True)),
        ),
        ("qwen2", (lora("embed_tokens", use_dora=True), lora("embed_tokens", r=2))),
        ("conv", (lora("conv2d", "conv1d"), lora("conv2d", r=2))),
        ("conv", (lora("conv2d", "point", use_dora=True), lora("conv2d", r=2))),
    ],
)
def test_other_layouts_equal_peft_in_turn(kit: Kit, model: str, configs: Sequence[Any], tmp_path: Path) -> None:
    adapters, base = build(kit, model, tmp_path, *configs), kit.base(model, "BF16")
    expected = peft_merged(model, base, adapters, "F64")
    before = read(base)
    for key, tensor in read(merge(base, adapters, tmp_path / "out")).items():
        exact, weight = float64(expected[key]), float64(before[key])
        assert correctly_rounded(float64(tensor), exact, reach(exact, weight), "BF16").all(), key


@pytest.mark.parametrize("name", MIXES)
def test_the_plan_says_that_order_matters_and_it_does(kit: Kit, name: str, tmp_path: Path) -> None:
    adapters, base = build(kit, "qwen2", tmp_path, *MIXES[name]), kit.base("qwen2", "BF16")
    plan = inlay.make_plan(base, adapters)
    assert plan.order_matters
    assert any("q_proj" in key for key in plan.overlaps)
    turned = merge(base, adapters[::-1], tmp_path / "turned")
    inlay.run_plan(plan, tmp_path / "out")
    assert not same_bytes(tmp_path / "out", turned)


def test_order_does_not_matter_for_a_dora_on_other_modules(kit: Kit, tmp_path: Path) -> None:
    adapters = build(kit, "qwen2", tmp_path, lora("q_proj", use_dora=True), lora("v_proj", r=2))
    base = kit.base("qwen2", "BF16")
    plan = inlay.make_plan(base, adapters)
    assert not plan.order_matters
    assert not plan.overlaps
    inlay.run_plan(plan, tmp_path / "out")
    assert same_bytes(tmp_path / "out", merge(base, adapters[::-1], tmp_path / "turned"))


def test_a_weight_on_a_dora_is_refused(kit: Kit, tmp_path: Path) -> None:
    adapters = build(kit, "qwen2", tmp_path, lora("q_proj", use_dora=True), lora("v_proj", r=2))
    with pytest.raises(inlay.InlayError, match=r"a\s+weight 0\.5 has no meaning for DoRA"):
        inlay.make_plan(kit.base("qwen2"), adapters, weights=[0.5, 1.0])
    inlay.make_plan(kit.base("qwen2"), adapters, weights=[1.0, 0.5])


# --- contradictions -----------------------------------------------------------------------------------

CONFLICTS = {
    "saved module": (
        lora("q_proj", modules_to_save=["lm_head"]),
        lora("v_proj", modules_to_save=["lm_head"]),
        "lm_head.weight",
    ),
    "saved norm": (
        lora("q_proj", modules_to_save=["norm"]),
        lora("v_proj", modules_to_save=["norm"]),
        "model.norm.weight",
    ),
    "bias": (lora("q_proj", bias="all"), lora("v_proj", bias="all"), "model.layers.0.self_attn.k_proj.bias"),
    "bias of one target": (
        lora("q_proj", "v_proj", bias="lora_only"),
        lora("q_proj", bias="lora_only"),
        "model.layers.1.self_attn.q_proj.bias",
    ),
    "token row": (
        lora("q_proj", trainable_token_indices=[3, 9, 5]),
        lora("v_proj", trainable_token_indices=[5, 1, 9]),
        "model.embed_tokens.weight",
    ),
    "saved module over a lora": (
        lora("lm_head", "q_proj"),
        lora("v_proj", modules_to_save=["lm_head"]),
        "lm_head.weight",
    ),
    "saved embedding over token rows": (
        lora("q_proj", trainable_token_indices=[3]),
        lora("v_proj", modules_to_save=["embed_tokens"]),
        "model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_contradiction_is_refused_by_the_names_of_both(kit: Kit, name: str, tmp_path: Path) -> None:
    first, second, key = CONFLICTS[name]
    adapters = build(kit, "qwen2", tmp_path, first, second)
    with pytest.raises(inlay.InlayError) as error:
        inlay.make_plan(kit.base("qwen2"), adapters)
    problems = {p.where: p.what for p in error.value.problems}  # type: ignore[attr-defined]
    assert key in problems
    words = problems[key].replace(",", " ").replace(";", " ").split()
    assert "a" in words
    assert "b" in words
    assert list(tmp_path.iterdir()) == [*sorted(adapters)] or {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("name", CONFLICTS)
def test_override_lets_the_later_adapter_win(kit: Kit, name: str, tmp_path: Path) -> None:
    """With `override` the key is what the later adapter alone gives; what only the earlier one touches stays."""
    first, second, key = CONFLICTS[name]
    adapters, base = build(kit, "qwen2", tmp_path, first, second), kit.base("qwen2")
    plan = inlay.make_plan(base, adapters, combine_by="override")
    assert any(key in note and "b overrides a" in note for note in plan.notes)
    inlay.run_plan(plan, tmp_path / "out")
    both, later = read(tmp_path / "out"), read(merge(base, adapters[1:], tmp_path / "later"))
    earlier = read(merge(base, adapters[:1], tmp_path / "earlier"))
    before = read(base)
    if name == "token row":  # row 3 is the earlier adapter's alone
        wanted = float64(later[key]).copy()
        wanted[3] = float64(earlier[key])[3]
        assert np.array_equal(float64(both[key]), wanted)
        assert not np.array_equal(wanted[3], float64(before[key])[3])
    else:
        assert np.array_equal(bits(both[key]), bits(later[key]))
    alone = set(differing(before, earlier)) - set(differing(before, later))
    assert alone
    assert not [k for k in alone if not np.array_equal(bits(both[k]), bits(earlier[k]))]


def test_equal_copies_do_not_contradict_each_other(kit: Kit, tmp_path: Path) -> None:
    """Two adapters with an embedding saved unchanged (PEFT does so when it is targeted) sum as usual."""
    adapters, base = build(kit, "qwen2", tmp_path, lora("embed_tokens"), lora("embed_tokens", r=2)), kit.base("qwen2")
    for adapter in adapters:
        assert any(k.endswith("base_layer.weight") for k in read(adapter / "adapter_model.safetensors"))
    key = "model.embed_tokens.weight"
    expected = float64(peft_merged("qwen2", base, adapters, "F64")[key])
    found = [
        float64(read(merge(base, order, tmp_path / f"{i}"))[key]) for i, order in enumerate((adapters, adapters[::-1]))
    ]
    assert np.array_equal(*found)
    assert correctly_rounded(found[0], expected, reach(expected, float64(read(base)[key])), "F32").all()


def test_a_saved_copy_of_the_base_itself_does_not_replace_what_came_before(kit: Kit, tmp_path: Path) -> None:
    """PEFT saves the untouched weight of a targeted head (`base_layer.weight`). It is the base, so the LoRA of an
    adapter without such a copy is added to the same weight, in either order."""
    configs = [lora("lm_head", save_embedding_layers=False), lora("lm_head", r=2)]
    adapters, base = build(kit, "qwen2", tmp_path, *configs), kit.base("qwen2")
    expected = float64(peft_merged("qwen2", base, adapters, "F64")["lm_head.weight"])
    for i, order in enumerate((adapters, adapters[::-1])):
        found = float64(read(merge(base, order, tmp_path / f"out{i}"))["lm_head.weight"])
        assert correctly_rounded(found, expected, reach(expected, float64(read(base)["lm_head.weight"])), "F32").all()


def test_a_weight_has_its_meaning_beside_a_saved_copy_of_the_base_itself(kit: Kit, tmp_path: Path) -> None:
    """The copy that PEFT adds for a targeted embedding is no change, so a factor on the LoRA is as meant."""
    (with_copy,) = build(kit, "qwen2", tmp_path / "with", lora("embed_tokens"))
    (without,) = build(kit, "qwen2", tmp_path / "without", lora("embed_tokens", save_embedding_layers=False))
    base = kit.base("qwen2")
    results = [merge(base, [a], tmp_path / f"out{i}", weights=[0.5]) for i, a in enumerate((with_copy, without))]
    assert same_bytes(*results)


def test_rows_of_different_tokens_go_together(kit: Kit, tmp_path: Path) -> None:
    configs = [lora("q_proj", trainable_token_indices=[3, 9]), lora("q_proj", r=2, trainable_token_indices=[0, 39])]
    adapters, base = build(kit, "qwen2", tmp_path, *configs), kit.base("qwen2", "BF16")
    key = "model.embed_tokens.weight"
    alone = [float64(read(merge(base, [a], tmp_path / f"alone{i}"))[key]) for i, a in enumerate(adapters)]
    wanted = float64(read(base)[key]).copy()
    for rows, values in zip(([3, 9], [0, 39]), alone, strict=True):
        assert not np.array_equal(wanted[rows], values[rows])
        wanted[rows] = values[rows]
    for i, order in enumerate((adapters, adapters[::-1])):
        assert np.array_equal(float64(read(merge(base, order, tmp_path / f"out{i}"))[key]), wanted)


def test_a_lora_is_added_to_trained_rows_when_it_comes_after(kit: Kit, tmp_path: Path) -> None:
    """Rows first, LoRA second: the LoRA acts on the trained rows, as when merged in turn. The other way round
    would throw the sum away, and is refused."""
    configs = [lora("q_proj", trainable_token_indices=[3, 9]), lora("embed_tokens", save_embedding_layers=False)]
    adapters, base = build(kit, "qwen2", tmp_path, *configs), kit.base("qwen2")
    key = "model.embed_tokens.weight"
    in_turn = merge(merge(base, adapters[:1], tmp_path / "first"), adapters[1:], tmp_path / "second")
    assert differing(read(in_turn), read(merge(base, adapters, tmp_path / "out"))) == []
    with pytest.raises(inlay.InlayError) as error:
        inlay.make_plan(base, adapters[::-1])
    assert key in str(error.value)
    assert "a before b" in str(error.value)


def test_token_rows_and_another_lora_compute_what_merging_in_turn_does(kit: Kit, tmp_path: Path) -> None:
    """On a tied model (where PEFT 0.21.2 cannot load the second adapter): rows on both ends, the tie kept."""
    configs = [lora("q_proj", trainable_token_indices=[3, 1]), lora("q_proj", "v_proj", r=2)]
    adapters, base = build(kit, "qwen2-tied", tmp_path, *configs), kit.base("qwen2-tied")
    model = MODELS["qwen2-tied"]
    with third_party():
        from peft import PeftModel

        module = model.load(base)
        for adapter in adapters:
            module = PeftModel.from_pretrained(module, adapter).merge_and_unload()
    merged = merge(base, adapters, tmp_path / "out")
    assert read(merged).keys() == read(base).keys()
    wanted = model(module.eval())
    assert (model(model.load(merged)) - wanted).abs().max() <= logits_tolerance(wanted)


def test_the_number_of_weights_must_be_that_of_the_adapters(kit: Kit, tmp_path: Path) -> None:
    adapters = build(kit, "qwen2", tmp_path, lora("q_proj"), lora("v_proj"))
    with pytest.raises(inlay.InlayError, match="3 for 2 adapters"):
        inlay.make_plan(kit.base("qwen2"), adapters, weights=[1, 1, 1])


def test_an_adapter_given_twice_acts_twice_and_is_warned_of(kit: Kit, tmp_path: Path) -> None:
    (adapter,) = build(kit, "qwen2", tmp_path, lora("q_proj"))
    base = kit.base("qwen2", "BF16")
    plan = inlay.make_plan(base, [adapter, adapter])
    assert any("given twice" in warning for warning in plan.warnings)
    inlay.run_plan(plan, tmp_path / "out")
    assert same_bytes(tmp_path / "out", merge(base, [adapter], tmp_path / "doubled", weights=[2.0]))
