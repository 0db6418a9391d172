"""Presets resolve to the modules of the model at hand, on any architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import families
from cases import MODELS
from inlay.errors import InputError
from inlay.train.anatomy import ALIGNER, TEXT, VISION, Anatomy
from inlay.train.targets import Asked, Targets, resolve

assert families.FAMILIES

QKVO = ("k_proj", "o_proj", "q_proj", "v_proj")
GATED = ("down_proj", "gate_proj", "up_proj")
# model -> preset -> listed names, and the number of modules; from the papers and the models' own code.
EXPECTED: dict[str, dict[str, tuple[tuple[str, ...], int]]] = {
    "qwen2": {
        "all-linear": (tuple(sorted(QKVO + GATED)), 14),
        "attention": (QKVO, 8),
        "mlp": (GATED, 6),
        "all-embedding": (("embed_tokens",), 1),
    },
    "llama": {
        "all-linear": (tuple(sorted(QKVO + GATED)), 14),
        "attention": (QKVO, 8),
        "mlp": (GATED, 6),
        "all-embedding": (("embed_tokens",), 1),
    },
    # c_proj stands in both; its name alone would not do
    "gpt2": {
        "all-linear": (("c_attn", "c_fc", "c_proj"), 8),
        "attention": (("attn.c_proj", "c_attn"), 4),
        "mlp": (("c_fc", "mlp.c_proj"), 4),
        "all-embedding": (("wpe", "wte"), 2),
    },
    "neox": {
        "all-linear": (("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"), 8),
        "attention": (("dense", "query_key_value"), 4),
        "mlp": (("dense_4h_to_h", "dense_h_to_4h"), 4),
    },
    # routed experts are bare tensors; the shared expert has linear layers
    "qwen2moe": {
        "all-linear": (tuple(sorted((*QKVO, *GATED, "shared_expert_gate"))), 16),
        "attention": (QKVO, 8),
        "mlp": (tuple(sorted((*GATED, "shared_expert_gate"))), 8),
    },
    "qwen3moe": {"all-linear": (QKVO, 8), "attention": (QKVO, 8)},
    # the first of two layers is dense, the second has shared experts
    "deepseek3": {
        "attention": (("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"), 10),
        "mlp": (GATED, 6),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def on_meta() -> Callable[[str], Any]:
    """Models of the table without weights, each built once."""
    import torch

    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            with torch.device("meta"):
                built[name] = MODELS[name].build()
        return built[name]

    return get


@pytest.mark.parametrize(("model", "preset"), [(m, p) for m, presets in EXPECTED.items() for p in presets])
def test_a_preset_is_the_modules_of_this_architecture(on_meta: Callable[[str], Any], model: str, preset: str) -> None:
    found = resolve(on_meta(model), Asked((preset,)))
    assert (found.listed, len(found.modules)) == EXPECTED[model][preset]


@pytest.mark.parametrize("model", ["qwen25vl", "gemma3", "llava", "qwen3vlmoe"])
def test_of_a_vision_language_model_only_the_language_part_is_trained_until_more_is_unfrozen(
    on_meta: Callable[[str], Any], model: str
) -> None:
    net = on_meta(model)
    text = resolve(net, Asked()).modules
    assert text and all("language_model" in name for name in text)
    vision = resolve(net, Asked(frozen=frozenset({TEXT, ALIGNER}))).modules
    assert vision and all("visual" in name or "vision_tower" in name for name in vision)
    every = resolve(net, Asked(frozen=frozenset())).modules
    assert set(text) | set(vision) <= set(every) and not set(text) & set(vision)
    assert "lm_head" not in every
    left = set(every) - set(text) - set(vision)
    assert all("merger" in name or "projector" in name for name in left)


@pytest.mark.parametrize("model", [*EXPECTED, "qwen25vl", "gemma3", "llava"])
@pytest.mark.parametrize("preset", ["all-linear", "attention"])
def test_what_is_listed_makes_peft_train_just_these_modules(
    on_meta: Callable[[str], Any], model: str, preset: str
) -> None:
    """The oracle is PEFT's own rule for `target_modules`."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    net = on_meta(model)
    found = resolve(net, Asked((preset,)))
    config = LoraConfig(target_modules=list(found.listed))
    hit = [name for name, _ in net.named_modules() if name and check_target_module_exists(config, name)]
    assert hit == list(found.modules)


@pytest.mark.parametrize("model", ["qwen2", "gpt2", "llama", "qwen2moe", "deepseek3"])
def test_all_linear_is_what_peft_takes_for_it(on_meta: Callable[[str], Any], model: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    net = on_meta(model)
    theirs = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), net).target_modules
    assert set(resolve(net, Asked()).modules) == set(theirs)


def _modules(targets: Targets) -> set[str]:
    return set(targets.modules)


def test_attention_and_mlp_together_are_all_linear(on_meta: Callable[[str], Any]) -> None:
    for model in ("qwen2", "llama", "gpt2", "neox", "qwen2moe", "deepseek3"):
        net = on_meta(model)
        assert _modules(resolve(net, Asked(("attention", "mlp")))) == _modules(resolve(net, Asked()))


def test_names_and_ends_of_names_reach_what_they_name(on_meta: Callable[[str], Any]) -> None:
    net = on_meta("qwen2")
    assert _modules(resolve(net, Asked(("layers.1.self_attn.q_proj",)))) == {"model.layers.1.self_attn.q_proj"}
    one = resolve(net, Asked(("layers.1.self_attn.q_proj",)))
    assert one.listed == ("layers.1.self_attn.q_proj",)
    both = resolve(net, Asked(("q_proj", "lm_head")))
    assert both.listed == ("lm_head", "q_proj")
    less = resolve(net, Asked(excluded=("mlp", "k_proj", r".*\.0\.self_attn\.v_proj")))
    assert len(less.modules) == 14 - 6 - 2 - 1
    pattern = resolve(net, Asked(regex=r"model\.layers\.\d+\.mlp\.(up|gate)_proj"))
    assert pattern.listed == ("gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(("q_projj",)), r"no module of this name; near it are q_proj"),
        (Asked(("attn",)), r"near it are .*attention"),
        (Asked(("self_attn",)), r"a Qwen2Attention, which this method cannot train; name layers of it: .*q_proj"),
        (Asked(regex=r"q_proj"), r"matches the whole name of no layer"),
        (Asked(regex=r"("), r"not a regular expression"),
        (Asked(excluded=("wte",)), r"takes away nothing"),
        (Asked(("q_proj",), excluded=("q_proj",)), r"nothing is left"),
        (Asked(("all-linear",), frozen=frozenset({TEXT})), r"no such layers outside of what is frozen \(text\)"),
        (Asked(parameters=("mlp.experts.down_proj",)), r"no such parameter"),
    ],
)  # fmt: skip
def test_what_reaches_nothing_is_refused_with_what_is_near(
    on_meta: Callable[[str], Any], asked: Asked, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve(on_meta("qwen2"), asked)


def test_experts_are_bare_tensors_and_the_way_to_train_them_is_said(on_meta: Callable[[str], Any]) -> None:
    net = on_meta("qwen3moe")
    way = "--target_parameters mlp.experts.down_proj mlp.experts.gate_up_proj"
    assert way in resolve(net, Asked()).notes[0]
    with pytest.raises(InputError, match=way):
        resolve(net, Asked(("mlp",)))
    found = resolve(net, Asked(parameters=("mlp.experts.down_proj",)))
    assert found.modules == () and found.parameters == ("mlp.experts.down_proj",) and not found.notes


def test_a_method_without_embeddings_says_so(on_meta: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="Embedding, which this method cannot train"):
        resolve(on_meta("qwen2"), Asked(("embed_tokens",)), ("linear",))


def test_parts_of_a_model_without_vision_are_all_text(on_meta: Callable[[str], Any]) -> None:
    anatomy = Anatomy(on_meta("gpt2"))
    assert {anatomy.part(name) for name in anatomy.linear} == {TEXT}
    assert VISION in {Anatomy(on_meta("gemma3")).part(n) for n in Anatomy(on_meta("gemma3")).linear}
