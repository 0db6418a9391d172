"""The layout in memory rebuilds what transformers loads, bit for bit, and refuses what is not whole rows."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cases import MODELS, randomise, third_party
from families import EXPERTS, FAMILIES, TEXT, VISION
from inlay.errors import InputError
from inlay.keys import stacks
from inlay.keys.memory import MemoryLayout, Slice, memory_layout
from inlay.keys.stacks import names_stack, stacked_experts

pytestmark = pytest.mark.usefixtures("kit")  # one thread, no progress bars


def _qwen2vl() -> Any:
    import transformers

    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
        vision_config=vision, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def _ernie() -> Any:
    import transformers

    text = {
        **{k: v for k, v in TEXT.items() if k != "pad_token_id"}, "moe_intermediate_size": [12, 8], "moe_k": 2,
        "moe_num_experts": 4, "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e4},
        "head_dim": 16,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


def _molmo2() -> Any:
    import transformers

    vision = {**VISION, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8, "image_size": [16, 16]}
    adapter = {
        "vision_feature_layer": [0], "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 24, "text_hidden_size": 16,
    }  # fmt: skip
    text = {**{k: v for k, v in TEXT.items() if v is not None}, "head_dim": 4, "additional_vocab_size": 4}
    config = transformers.Molmo2Config(
        vision_config=vision, adapter_config=adapter, text_config=text, tie_word_embeddings=False
    )
    return transformers.Molmo2ForConditionalGeneration(config)


def _deepseek2() -> Any:
    import transformers

    config = transformers.DeepseekV2Config(
        **{**TEXT, "num_key_value_heads": 4}, moe_intermediate_size=12, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        v_head_dim=4, qk_nope_head_dim=4,
    )  # fmt: skip
    return transformers.DeepseekV2ForCausalLM(config)


def _glm4moe() -> Any:
    import transformers

    config = transformers.Glm4MoeConfig(
        **TEXT, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, head_dim=4
    )
    return transformers.Glm4MoeForCausalLM(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    **{name: MODELS[name].build for name in ("qwen2", "qwen2-tied", "gpt2", "gpt2-tied", "resnet", *FAMILIES)},
    "qwen2vl": _qwen2vl,
    "ernie": _ernie,
    "molmo2": _molmo2,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4moe,
}
# Ends of the names that must be refused, and the reason; every other parameter must have its slices. Of the names
# in memory none is refused.
REFUSED = {
    "ernie": ("experts.gate_up_proj", "experts.down_proj"),
}


@dataclass(frozen=True)
class Saved:
    """A directory that transformers wrote: its config, its tensors, and the parameters of the model that it loads."""

    config: dict[str, Any]
    disk: dict[str, Any]
    memory: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self.disk)

    @property
    def layout(self) -> MemoryLayout:
        layout = memory_layout(self.config, self.shapes)
        assert layout is not None
        return layout


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in tensors.items()}


def read(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {k: t for file in sorted(path.glob("*.safetensors")) for k, t in load_file(file).items()}


def save(model: Any, path: Path, original: bool = True) -> Saved:
    """Random weights, saved as from a model that was loaded: some renamings are undone only then."""
    randomise(model, 3)
    with third_party():
        model.save_pretrained(path / "first")
        loaded = type(model).from_pretrained(path / "first")
        loaded.save_pretrained(path / "second", save_original_format=original, max_shard_size="8KB")
    return saved_in(path / "second", type(model))


def saved_in(path: Path, cls: Any) -> Saved:
    config = json.loads((path / "config.json").read_text())
    with third_party():
        model = cls.from_pretrained(path)
    return Saved({**config, "architectures": [cls.__name__]}, read(path), dict(model.state_dict()))


def assembled(parts: tuple[Slice, ...], shape: tuple[int, ...], disk: Mapping[str, Any]) -> tuple[Any, Any]:
    """A parameter made of its slices, and how often each of its elements was written."""
    import torch

    first = disk[parts[0].key]
    built, times = torch.zeros(shape or (1,), dtype=first.dtype), torch.zeros(shape or (1,), dtype=torch.int64)
    for part in parts:
        tensor = disk[part.key].reshape(disk[part.key].shape or (1,))
        if part.transposed:  # whole tensors only
            assert part.disk_rows == (0, len(tensor))
            tensor = tensor.transpose(-1, -2)
            rows = tensor
        else:
            rows = tensor[slice(*part.disk_rows)]
        where = (slice(*part.rows),) if part.expert is None else (part.expert, slice(*part.rows))
        assert part.rows[1] <= built[where[:-1]].shape[0], part
        built[where] = rows.reshape(built[where].shape)
        times[where] += 1
    return built.reshape(shape), times


def holds(saved: Saved, layout: MemoryLayout) -> None:
    """Law: the slices of a parameter tile it exactly, and are its values."""
    import torch

    for name, parts in layout.slices.items():
        assert layout.shapes[name] == tuple(saved.memory[name].shape), name
        built, times = assembled(parts, layout.shapes[name], saved.disk)
        assert bool((times == 1).all()), name
        assert torch.equal(built, saved.memory[name]), name


def share_nothing(layout: MemoryLayout) -> None:
    """Law: no two slices hold the same row of the same tensor."""
    rows = Counter(
        (part.key, row) for parts in layout.slices.values() for part in parts for row in range(*part.disk_rows)
    )
    assert not {k: n for k, n in rows.items() if n > 1}


# ─── what transformers writes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("original", [True, False], ids=["disk-names", "memory-names"])
@pytest.mark.parametrize("name", BUILDERS)
def test_slices_rebuild_every_parameter(name: str, original: bool, tmp_path: Path) -> None:
    saved = save(BUILDERS[name](), tmp_path, original)
    layout = saved.layout
    holds(saved, layout)
    share_nothing(layout)
    assert layout.unplaced == ()
    refused = {n for n in saved.memory if original and n.endswith(REFUSED.get(name, ("\0",)))}
    assert layout.refused.keys() == refused
    # a tied parameter that is not stored has no slices, and is the storage of one that has
    stored = {saved.memory[n].data_ptr() for n in layout.slices}
    absent = saved.memory.keys() - layout.slices.keys() - refused
    assert all(saved.memory[n].data_ptr() in stored for n in absent), absent


@pytest.mark.parametrize("name", ["qwen3moe", "nomicbert", "gemma3"])
def test_parameters_come_in_the_order_of_registration(name: str, tmp_path: Path) -> None:
    saved = save(BUILDERS[name](), tmp_path)
    layout = saved.layout
    assert list(layout.shapes) == list(saved.memory)
    assert list(layout.slices) == [n for n in saved.memory if n in layout.slices]


def test_the_order_of_the_keys_does_not_matter(tmp_path: Path) -> None:
    saved = save(BUILDERS["qwen3moe"](), tmp_path)
    backwards = dict(reversed(saved.shapes.items()))
    assert memory_layout(saved.config, backwards) == saved.layout


def test_more_than_ten_experts_keep_their_numbers(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen3MoeConfig(**TEXT, **{**EXPERTS, "num_experts": 12}, head_dim=8)
    saved = save(transformers.Qwen3MoeForCausalLM(config), tmp_path)
    layout = saved.layout
    holds(saved, layout)
    gate_up = layout.slices["model.layers.1.mlp.experts.gate_up_proj"]
    assert gate_up == tuple(
        Slice(f"model.layers.1.mlp.experts.{e}.{part}_proj.weight", e, rows, (0, 12))
        for e in range(12)
        for part, rows in (("gate", (0, 12)), ("up", (12, 24)))
    )


def test_a_fused_tensor_is_cut_by_rows(tmp_path: Path) -> None:
    layout = save(BUILDERS["nomicbert"](), tmp_path).layout
    assert [layout.slices[f"layers.0.self_attn.{part}_proj.weight"] for part in "qkv"] == [
        (Slice("encoder.layers.0.attn.Wqkv.weight", None, (0, 16), (16 * at, 16 * at + 16)),) for at in range(3)
    ]


# ─── headless and headed ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "read_by"),
    [
        ("GPT2Model", "GPT2LMHeadModel"),
        ("GPT2LMHeadModel", "GPT2Model"),
        ("Qwen3MoeModel", "Qwen3MoeForCausalLM"),
        ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
        ("GPTNeoXModel", "GPTNeoXForCausalLM"),
        ("Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration"),
    ],
)
def test_a_head_more_or_less_is_found_through_the_prefix(written: str, read_by: str, tmp_path: Path) -> None:
    import transformers

    family = {"GPT2": "gpt2", "Qwen3Moe": "qwen3moe", "GPTNeoX": "neox", "Qwen2_5_VL": "qwen25vl"}
    built = BUILDERS[next(v for k, v in family.items() if written.startswith(k))]()
    writer, reader = getattr(transformers, written), getattr(transformers, read_by)
    save(writer(built.config), tmp_path)
    saved = saved_in(tmp_path / "second", reader)
    layout = saved.layout
    head = {"lm_head.weight"} & saved.memory.keys()  # new, or tied
    holds(saved, layout)
    share_nothing(layout)
    assert not layout.refused and saved.memory.keys() - layout.slices.keys() == head
    assert set(layout.unplaced) == {k for k in saved.disk if k == "lm_head.weight"}


# ─── transposed ──────────────────────────────────────────────────────────────────────────────────────────────────────


def hub_layout(saved: Saved) -> Saved:
    """As on the hub: the experts of Qwen3-VL-MoE lie (in, out)."""
    turned = {
        k: t.transpose(-1, -2).contiguous() if k.endswith(("gate_up_proj", "down_proj")) else t
        for k, t in saved.disk.items()
    }
    return Saved(saved.config, turned, saved.memory)


def test_experts_of_another_orientation_are_transposed(tmp_path: Path) -> None:
    saved = hub_layout(save(BUILDERS["qwen3vlmoe"](), tmp_path))
    layout = saved.layout
    holds(saved, layout)
    assert not layout.refused
    turned = {n for n, parts in layout.slices.items() if any(p.transposed for p in parts)}
    assert turned == {n for n in saved.memory if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert len(turned) == 4


def test_square_experts_that_may_be_transposed_are_refused(tmp_path: Path) -> None:
    built = BUILDERS["qwen3vlmoe"]().config
    built.text_config.moe_intermediate_size = 16  # down_proj is 16 × 16
    import transformers

    layout = save(transformers.Qwen3VLMoeForConditionalGeneration(built), tmp_path).layout
    assert sorted(layout.refused) == [f"model.language_model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    assert all("square" in why for why in layout.refused.values())


def test_modules_that_declare_is_transposed_are_named(tmp_path: Path) -> None:
    for name, expected in (("gptoss", 2), ("llama4", 0), ("qwen3moe", 0)):
        layout = save(BUILDERS[name](), tmp_path / name).layout
        assert len(layout.transposed_experts) == expected
        assert all(n.endswith("mlp.experts") for n in layout.transposed_experts)


# ─── what cannot be expressed ────────────────────────────────────────────────────────────────────────────────────────

QKV = [f"self_attn.{part}_proj.weight" for part in "qkv"]


def converted(monkeypatch: pytest.MonkeyPatch, sources: Any, targets: Any, operations: list[Any]) -> None:
    """Let transformers load Qwen2 through one conversion."""
    import transformers.conversion_mapping as mapping
    from transformers.core_model_loading import WeightConverter

    def table(*_: Any, **__: Any) -> list[Any]:
        return [WeightConverter(sources, targets, operations)]

    monkeypatch.setattr(mapping, "get_model_conversion_mapping", table)


def fused_qwen2(heads: int = 4) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    import transformers

    config = transformers.Qwen2Config(**{**TEXT, "num_key_value_heads": heads}, tie_word_embeddings=False)
    model = transformers.Qwen2ForCausalLM(config)
    shapes = {k: s for k, s in shapes_of(model.state_dict()).items() if not k.endswith(tuple(QKV))}
    kv = 16 * heads // 4
    shapes |= {f"model.layers.{i}.self_attn.qkv.weight": (16 + 2 * kv, 16) for i in (0, 1)}
    return {**json.loads(config.to_json_string()), "architectures": ["Qwen2ForCausalLM"]}, shapes


OPERATIONS = ("Interleave", "PermuteForRope")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_permuted_rows_are_refused_for_all_parameters_made_of_them(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.core_model_loading as loading

    config, shapes = fused_qwen2()
    chain = [loading.Chunk(dim=0), loading.PermuteForRope()]
    if operation == "Interleave":
        chain = [loading.Interleave(dim=0), loading.Chunk(dim=0)]
    converted(monkeypatch, "self_attn.qkv.weight", QKV, chain)
    layout = memory_layout(config, shapes)
    assert layout is not None
    assert layout.refused.keys() == {f"model.layers.{i}.{name}" for i in (0, 1) for name in QKV}
    assert all(operation in why for why in layout.refused.values())
    assert not layout.refused.keys() & layout.slices.keys()


def test_a_fused_tensor_of_unequal_parts_is_cut_by_the_sizes_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Split

    config, shapes = fused_qwen2(heads=2)
    converted(monkeypatch, "self_attn.qkv.weight", QKV, [Split(dim=0)])
    layout = memory_layout(config, shapes)
    assert layout is not None and not layout.refused
    found = [layout.slices[f"model.layers.1.{name}"][0].disk_rows for name in QKV]
    assert found == [(0, 16), (16, 24), (24, 32)]


@pytest.mark.parametrize(
    "lost", [r".up_proj.weight", r"experts.2.gate_proj.weight", r"experts.2.", r"experts."], ids=lambda s: s.strip(".")
)
def test_incomplete_experts_are_refused_or_absent(lost: str, tmp_path: Path) -> None:
    saved = save(BUILDERS["qwen3moe"](), tmp_path)
    shapes = {k: s for k, s in saved.shapes.items() if not ("experts" in k and lost in k)}
    layout = memory_layout(saved.config, shapes)
    assert layout is not None
    holds(saved, layout)
    stacks = {n for n in saved.memory if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    gone = {n for n in stacks if lost.startswith("experts.") and not lost.endswith("weight")} or {
        n for n in stacks if n.endswith("gate_up_proj")
    }
    assert saved.memory.keys() - layout.slices.keys() == gone
    assert layout.refused.keys() == (set() if lost == "experts." else gone)


def test_another_shape_than_in_memory_is_refused(tmp_path: Path) -> None:
    saved = save(BUILDERS["qwen2"](), tmp_path)
    layout = memory_layout(saved.config, {**saved.shapes, "lm_head.weight": (44, 16)})
    assert layout is not None
    assert list(layout.refused) == ["lm_head.weight"]
    assert "(44, 16)" in layout.refused["lm_head.weight"] and "(40, 16)" in layout.refused["lm_head.weight"]


def test_keys_without_a_place_are_named_and_change_nothing(tmp_path: Path) -> None:
    saved = save(BUILDERS["qwen2"](), tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,), "mtp.head.weight": (3, 4)}
    layout = memory_layout(saved.config, {**saved.shapes, **more})
    assert layout is not None and layout.slices == saved.layout.slices
    assert sorted(layout.unplaced) == sorted(more)


def test_the_first_key_in_order_wins_where_two_are_one_parameter(tmp_path: Path) -> None:
    """transformers keeps the first that it meets: `experts.0.…` comes before `experts.gate_up_proj`."""
    saved = save(BUILDERS["qwen3moe"](), tmp_path)
    twice = {f"model.layers.{i}.mlp.experts.gate_up_proj": (4, 24, 16) for i in (0, 1)}
    layout = memory_layout(saved.config, {**saved.shapes, **twice})
    assert layout is not None and layout.slices == saved.layout.slices


# ─── configs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def qwen3moe(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(BUILDERS["qwen3moe"](), tmp_path_factory.mktemp("qwen3moe"))


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": {"quant_method": "never heard of"}},
        {"auto_map": {"AutoModelForCausalLM": "somebody/else--modeling.Model"}},
        {"torch_dtype": "bfloat16"},
        {"dtype": "float16", "transformers_version": "4.30.0"},
    ],
    ids=lambda f: next(iter(f)),
)
def test_fields_that_do_not_change_the_class_do_not_matter(fields: dict[str, Any], qwen3moe: Saved) -> None:
    assert memory_layout({**qwen3moe.config, **fields}, qwen3moe.shapes) == qwen3moe.layout


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
def test_the_kernels_a_config_asks_for_are_not_looked_for(key: str, qwen3moe: Saved) -> None:
    """An implementation may name a repository on the hub, whose code would be fetched and run."""
    config = {**qwen3moe.config, key: "somebody/else"}
    assert memory_layout(config, qwen3moe.shapes) == qwen3moe.layout


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "never heard of"},
        {"model_type": None},
        {"architectures": ["NeverHeardOf"]},
        {"architectures": []},
        {"architectures": None},
        {"architectures": ["AutoConfig"]},
        {"architectures": ["Qwen3MoeConfig"]},
        {"architectures": ["PreTrainedModel"]},
        {"architectures": ["pipeline"]},
        {"architectures": ["__version__"]},
    ],
    ids=str,
)
def test_what_is_no_class_of_a_model_has_no_layout(fields: dict[str, Any], qwen3moe: Saved) -> None:
    assert memory_layout({**qwen3moe.config, **fields}, qwen3moe.shapes) is None


def test_a_config_that_the_class_rejects_is_an_input_error(qwen3moe: Saved) -> None:
    with pytest.raises(InputError, match="cannot build Qwen3MoeForCausalLM"):
        memory_layout({**qwen3moe.config, "hidden_size": "wide"}, qwen3moe.shapes)


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_without_transformers_the_error_says_what_to_install(
    package: str, qwen3moe: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'inlay\[transformers\]'"):
        memory_layout(qwen3moe.config, qwen3moe.shapes)


# ─── experts whose layout is declared ────────────────────────────────────────────────────────────────────────────────

DECLARED = ("qwen2moe", "qwen3moe", "qwen3moe-square", "olmoe", "mixtral", "deepseek2", "deepseek3", "glm4moe")


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {name: save(BUILDERS[name](), tmp_path_factory.mktemp(name)) for name in DECLARED}


def agrees(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the table settles the experts; if so, it is held against transformers."""
    found = stacked_experts(config, shapes)
    if found is None:
        return False
    layout = memory_layout(config, shapes)
    assert layout is not None
    names = [n for n in layout.shapes if ".experts." in n]
    assert names == [n for n in layout.shapes if names_stack(n)], "no other parameter is called as a stack is"
    assert list(found.shapes) == names == list(found.slices), "all of them, in the order of registration"
    assert found.slices == {n: layout.slices[n] for n in names}
    assert found.shapes == {n: layout.shapes[n] for n in names}
    assert not layout.refused.keys() & set(names)
    assert not layout.transposed_experts and not found.transposed_experts
    return True


def test_every_declared_class_is_laid_out_as_transformers_does(declared: dict[str, Saved]) -> None:
    for saved in declared.values():
        assert agrees(saved.config, saved.shapes)
    assert {saved.config["architectures"][0] for saved in declared.values()} == set(stacks.FAMILIES)


@pytest.mark.parametrize("original", [True, False], ids=["disk-names", "memory-names"])
@pytest.mark.parametrize("name", BUILDERS)
def test_no_other_class_is_declared(name: str, original: bool, tmp_path: Path) -> None:
    saved = save(BUILDERS[name](), tmp_path, original)
    assert agrees(saved.config, saved.shapes) == (name in DECLARED and original)


CHANGES: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("qwen3moe", {"decoder_sparse_step": 2}, False),
    ("qwen3moe", {"mlp_only_layers": [0]}, False),
    ("qwen3moe", {"mlp_only_layers": None}, True),
    ("qwen3moe", {"num_hidden_layers": 1}, True),  # as with layers for the prediction of further tokens
    ("qwen3moe", {"num_hidden_layers": 3}, False),
    ("qwen3moe", {"moe_intermediate_size": 16}, False),
    ("qwen3moe", {"hidden_size": 32}, False),
    ("qwen3moe", {"num_experts": 3, "num_local_experts": 3}, False),
    ("qwen3moe", {"num_experts": 3, "num_local_experts": 4}, False),
    ("qwen3moe", {"num_experts": 0, "num_local_experts": 0}, False),
    ("qwen3moe", {"num_hidden_layers": True}, False),
    ("qwen3moe", {"model_type": "mixtral"}, False),
    ("qwen3moe", {"architectures": ["Qwen3MoeModel"]}, False),
    ("qwen3moe", {"architectures": ["MixtralForCausalLM"]}, False),
    ("qwen3moe", {"architectures": None}, False),
    ("deepseek3", {"first_k_dense_replace": 0}, False),
    ("deepseek3", {"first_k_dense_replace": 2}, False),
    ("deepseek3", {"first_k_dense_replace": None}, False),
    ("deepseek3", {"num_hidden_layers": 1, "first_k_dense_replace": 0}, False),
    ("deepseek3", {"num_hidden_layers": 1}, False),
    ("mixtral", {"intermediate_size": 12}, False),
    ("mixtral", {"sliding_window": 4}, True),
)


@pytest.mark.parametrize(("name", "fields", "settled"), CHANGES, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_config_that_differs_from_its_experts_is_left_to_transformers(
    name: str, fields: dict[str, Any], settled: bool, declared: dict[str, Saved]
) -> None:
    saved = declared[name]
    assert agrees({**saved.config, **fields}, saved.shapes) is settled


@pytest.mark.parametrize("name", DECLARED)
def test_a_field_that_is_not_given_is_never_guessed(name: str, declared: dict[str, Saved]) -> None:
    saved = declared[name]
    settled = {
        field: agrees({k: v for k, v in saved.config.items() if k != field}, saved.shapes)
        for field in saved.config
        if field not in ("architectures", "model_type", "vocab_size", "num_attention_heads")
    }
    assert not any(settled[field] for field in ("num_hidden_layers", "hidden_size"))
    assert sum(not kept for kept in settled.values()) <= 5


FIRST = "model.layers.1.mlp.experts.0.gate_proj.weight"


@pytest.mark.parametrize(
    ("key", "shape", "settled"),
    [
        (FIRST, None, False),
        (FIRST, (13, 16), False),
        (FIRST, (16, 12), False),
        (FIRST.replace(".0.", ".4."), (12, 16), False),
        (FIRST.replace(".0.", ".00."), (12, 16), False),
        (FIRST.removeprefix("model."), (12, 16), False),
        (FIRST + "_scale", (), False),
        (FIRST.replace("weight", "bias"), (12,), False),
        ("model.layers.1.mlp.experts.gate_up_proj", (4, 24, 16), False),
        (FIRST.replace("layers.1", "layers.2"), (12, 16), True),
        (FIRST.replace("layers.1", "layers.2"), (5,), True),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", (12, 16), True),
        ("mtp.head.weight", (3, 4), True),
    ],
    ids=str,
)
def test_experts_that_are_not_whole_and_alone_are_left_to_transformers(
    key: str, shape: tuple[int, ...] | None, settled: bool, declared: dict[str, Saved]
) -> None:
    saved = declared["qwen3moe"]
    others = {k: s for k, s in saved.shapes.items() if k != key}
    assert agrees(saved.config, others if shape is None else {**others, key: shape}) is settled


def test_more_than_ten_declared_experts_keep_their_numbers(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen3MoeConfig(**TEXT, **{**EXPERTS, "num_experts": 12}, head_dim=8)
    saved = save(transformers.Qwen3MoeForCausalLM(config), tmp_path)
    assert agrees(saved.config, dict(reversed(saved.shapes.items())))


@pytest.mark.parametrize("name", ["deepseek3", "glm4moe"])
def test_layers_for_the_prediction_of_further_tokens_are_no_part_of_the_class(
    name: str, declared: dict[str, Saved]
) -> None:
    saved = declared[name]
    more = {k.replace("layers.1.", "layers.2."): s for k, s in saved.shapes.items()}
    assert agrees({**saved.config, "num_nextn_predict_layers": 1}, {**saved.shapes, **more})


def test_as_many_experts_in_another_layer_are_left_to_transformers(declared: dict[str, Saved]) -> None:
    saved = declared["deepseek3"]  # its first layer is dense
    moved = {k.replace("layers.1.mlp.experts.", "layers.0.mlp.experts."): s for k, s in saved.shapes.items()}
    assert not agrees(saved.config, moved)
