"""torchtune's own adapter files: names, reordered rows, fused tensors; and what LLaMA-Factory leaves beside an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.errors import AdapterError, PlanError
from oracle import correctly_rounded, float64, reach

HEADS, KV, WIDTH, HIDDEN, INNER, VOCAB, RANK = 4, 2, 6, 20, 28, 24, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "head_dim": WIDTH, "vocab_size": VOCAB, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = {
    "attn.q_proj": ("self_attn.q_proj", (HEADS * WIDTH, HIDDEN)),
    "attn.k_proj": ("self_attn.k_proj", (KV * WIDTH, HIDDEN)),
    "attn.v_proj": ("self_attn.v_proj", (KV * WIDTH, HIDDEN)),
    "attn.output_proj": ("self_attn.o_proj", (HIDDEN, HEADS * WIDTH)),
    "mlp.w1": ("mlp.gate_proj", (INNER, HIDDEN)),
    "mlp.w2": ("mlp.down_proj", (HIDDEN, INNER)),
    "mlp.w3": ("mlp.up_proj", (INNER, HIDDEN)),
}
Tensors = dict[str, torch.Tensor]


def draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def write_base(path: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A model of two layers under Hugging Face's names; Phi-3 with its fused tensors."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for i in (0, 1):
        layer = dict(NAMES.values())
        if config.get("model_type") == "phi3":
            layer = {n: s for n, s in layer.items() if n in ("self_attn.o_proj", "mlp.down_proj")}
            layer |= {"self_attn.qkv_proj": ((HEADS + 2 * KV) * WIDTH, HIDDEN), "mlp.gate_up_proj": (2 * INNER, HIDDEN)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    path.mkdir()
    save_file(draw(shapes, 1, dtype), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return path


def adapter_tensors(modules: tuple[str, ...] = tuple(NAMES), output: bool = True) -> Tensors:
    shapes = {}
    for i in (0, 1):
        for module in modules:
            out, in_ = NAMES[module][1]
            shapes |= {
                f"layers.{i}.{module}.lora_a.weight": (RANK, in_),
                f"layers.{i}.{module}.lora_b.weight": (out, RANK),
            }
    if output:
        shapes |= {"output.lora_a.weight": (RANK, HIDDEN), "output.lora_b.weight": (VOCAB, RANK)}
    return draw(shapes, 2)


def write_adapter(path: Path, tensors: Tensors, file: str = "adapter_model.pt", **config: Any) -> Path:
    path.mkdir()
    torch.save(tensors, path / file)
    given = {"r": RANK, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], "peft_type": "LORA", **config}
    (path / "adapter_config.json").write_text(json.dumps(given))
    return path


def delta(tensors: Tensors, module: str) -> np.ndarray:
    return 2.0 * float64(tensors[f"{module}.lora_b.weight"]) @ float64(tensors[f"{module}.lora_a.weight"])


def tune_to_hf(rows: np.ndarray) -> np.ndarray:
    """torchtune's own formula, `_permute` of `tune_to_hf`, on the rows of a delta."""
    return rows.reshape(-1, WIDTH // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def merge(base: Path, adapter: Path, out: Path) -> tuple[Tensors, Tensors]:
    inlay.run_plan(inlay.make_plan(base, [adapter]), out)
    assert inlay.verify(base, [adapter], out).exact
    return load_file(base / "model.safetensors"), load_file(out / "model.safetensors")


def right(merged: torch.Tensor, weight: torch.Tensor, added: np.ndarray, dtype: str = "F32") -> bool:
    exact = float64(weight) + added
    return bool(correctly_rounded(float64(merged), exact, reach(exact, float64(weight)), dtype).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "permuted"),
    [("llama", True), ("mistral", True), ("gemma", True), ("gemma2", True), ("qwen2", False)],
)
def test_the_names_and_rows_are_those_of_hugging_face(
    tmp_path: Path, model_type: str, permuted: bool, dtype: torch.dtype
) -> None:
    base, tensors = write_base(tmp_path / "base", dtype, model_type=model_type), adapter_tensors()
    before, after = merge(base, write_adapter(tmp_path / "a", tensors), tmp_path / "out")
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    for i in (0, 1):
        for module, (hf, _) in NAMES.items():
            added = delta(tensors, f"layers.{i}.{module}")
            if permuted and module in ("attn.q_proj", "attn.k_proj"):
                assert not right(after[key := f"model.layers.{i}.{hf}.weight"], before[key], added, name)
                added = tune_to_hf(added)
            key = f"model.layers.{i}.{hf}.weight"
            assert right(after[key], before[key], added, name), key
    assert right(after["lm_head.weight"], before["lm_head.weight"], delta(tensors, "output"), name)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_the_width_of_a_head_follows_from_the_hidden_size(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", head_dim=None, hidden_size=HEADS * WIDTH)  # the config alone decides
    tensors = adapter_tensors(("attn.q_proj",), output=False)
    before, after = merge(base, write_adapter(tmp_path / "a", tensors), tmp_path / "out")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert right(after[key], before[key], tune_to_hf(delta(tensors, "layers.0.attn.q_proj")))


def test_phi_3_has_one_tensor_for_several_modules(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model_type="phi3", architectures=["Phi3ForCausalLM"])
    tensors = adapter_tensors(("attn.q_proj", "attn.v_proj", "mlp.w3", "mlp.w2"))
    before, after = merge(base, write_adapter(tmp_path / "a", tensors), tmp_path / "out")
    qkv = np.zeros(((HEADS + 2 * KV) * WIDTH, HIDDEN))
    qkv[: HEADS * WIDTH] = delta(tensors, "layers.1.attn.q_proj")
    qkv[-KV * WIDTH :] = delta(tensors, "layers.1.attn.v_proj")
    both = np.concatenate([np.zeros((INNER, HIDDEN)), delta(tensors, "layers.1.mlp.w3")])
    layer = "model.layers.1"
    for name, added in (("self_attn.qkv_proj", qkv), ("mlp.gate_up_proj", both)):
        assert right(after[key := f"{layer}.{name}.weight"], before[key], added)
    key = f"{layer}.mlp.down_proj.weight"
    assert right(after[key], before[key], delta(tensors, "layers.1.mlp.w2"))


def test_dora_where_the_rows_have_the_same_order(tmp_path: Path) -> None:
    base, module = write_base(tmp_path / "base", model_type="qwen2"), "attn.q_proj"
    tensors = adapter_tensors((module, "mlp.w2"), output=False)
    for i in (0, 1):
        tensors[f"layers.{i}.{module}.magnitude"] = torch.rand(HEADS * WIDTH) + 0.5
        tensors[f"layers.{i}.mlp.w2.magnitude"] = torch.rand(HIDDEN) + 0.5
    before, after = merge(base, write_adapter(tmp_path / "a", tensors), tmp_path / "out")
    weight = float64(before["model.layers.1.self_attn.q_proj.weight"])
    sum_ = weight + delta(tensors, "layers.1.attn.q_proj")
    magnitude = float64(tensors["layers.1.attn.q_proj.magnitude"])
    exact = magnitude[:, None] * sum_ / np.linalg.norm(sum_, axis=1, keepdims=True)
    merged = float64(after["model.layers.1.self_attn.q_proj.weight"])
    assert correctly_rounded(merged, exact, reach(exact, weight), "F32").all()


def test_the_own_file_is_read_before_the_copy_in_peft_s_format(tmp_path: Path) -> None:
    """torchtune reorders the rows of the copy for Qwen2 too, whose rows have the same order."""
    base, tensors = write_base(tmp_path / "base", model_type="qwen2"), adapter_tensors(("attn.q_proj",), output=False)
    adapter = write_adapter(tmp_path / "a", tensors)
    copy = {}
    for i in (0, 1):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        b = tune_to_hf(float64(tensors[f"layers.{i}.attn.q_proj.lora_b.weight"]))
        copy |= {f"{name}.lora_A.weight": tensors[f"layers.{i}.attn.q_proj.lora_a.weight"]}
        copy |= {f"{name}.lora_B.weight": torch.from_numpy(b).float()}
    save_file(copy, adapter / "adapter_model.safetensors")
    before, after = merge(base, adapter, tmp_path / "out")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert right(after[key], before[key], delta(tensors, "layers.0.attn.q_proj"))


def test_the_copy_of_a_llama_is_the_same_merge(tmp_path: Path) -> None:
    base, tensors = write_base(tmp_path / "base"), adapter_tensors(("attn.q_proj", "attn.k_proj"), output=False)
    merge(base, write_adapter(tmp_path / "own", tensors, "adapter_0.pt"), tmp_path / "one")
    copy = {}
    for name, tensor in tensors.items():
        key = "base_model.model.model." + name.replace(".attn.", ".self_attn.")
        b = ".lora_b." in name
        value = torch.from_numpy(tune_to_hf(float64(tensor))).float() if b else tensor
        copy[key.replace("lora_a", "lora_A").replace("lora_b", "lora_B")] = value
    adapter = write_adapter(tmp_path / "peft", tensors)
    (adapter / "adapter_model.pt").unlink()
    save_file(copy, adapter / "adapter_model.safetensors")
    merge(base, adapter, tmp_path / "two")
    files = [tmp_path / out / "model.safetensors" for out in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("file", ["adapter_model.pt", "adapter_3.pt"])
def test_without_a_config_it_says_what_to_give(tmp_path: Path, file: str) -> None:
    adapter = write_adapter(tmp_path / "a", adapter_tensors(), file)
    (adapter / "adapter_config.json").unlink()
    for path in (adapter, adapter / file):
        with pytest.raises(AdapterError, match=r'put an adapter_config\.json with .*"lora_alpha"'):
            inlay.read_adapter(path)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_config_that_lacks_the_strength_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match=f"lacks {name} of torchtune's adapter"):
        inlay.read_adapter(write_adapter(tmp_path / "a", adapter_tensors(), **{name: None}))


def test_several_epochs_in_a_folder_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", adapter_tensors(), "adapter_0.pt")
    torch.save(adapter_tensors(), adapter / "adapter_1.pt")
    with pytest.raises(AdapterError, match=r"several adapters of torchtune \(adapter_0\.pt, adapter_1\.pt\)"):
        inlay.read_adapter(adapter)


def test_a_family_whose_rows_are_not_known_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model_type="olmo2")
    with pytest.raises(PlanError, match="names are known for gemma, gemma2, llama, mistral, phi3, qwen2"):
        inlay.make_plan(base, [write_adapter(tmp_path / "a", adapter_tensors())])


def test_dora_on_reordered_rows_is_refused(tmp_path: Path) -> None:
    tensors = adapter_tensors(("attn.q_proj",), output=False)
    tensors |= {f"layers.{i}.attn.q_proj.magnitude": torch.ones(HEADS * WIDTH) for i in (0, 1)}
    with pytest.raises(PlanError, match="DoRA on rows that torchtune has in another order"):
        inlay.make_plan(write_base(tmp_path / "base"), [write_adapter(tmp_path / "a", tensors)])


@pytest.mark.parametrize(
    ("config", "message"),
    [({"head_dim": 5}, "no heads of 5"), ({"head_dim": None, "num_attention_heads": None}, "no heads of None")],
)
def test_heads_that_do_not_tile_the_rows_are_a_problem(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    base = write_base(tmp_path / "base", **config)
    with pytest.raises(PlanError, match=message):
        inlay.make_plan(base, [write_adapter(tmp_path / "a", adapter_tensors(("attn.k_proj",), output=False))])


def test_a_pair_that_does_not_fit_and_a_module_that_is_not_there_are_problems(tmp_path: Path) -> None:
    tensors = adapter_tensors(("attn.q_proj", "attn.v_proj"), output=False)
    tensors["layers.0.attn.q_proj.lora_b.weight"] = torch.ones(WIDTH, RANK)
    tensors["layers.0.moe.router.lora_a.weight"] = torch.ones(RANK, HIDDEN)
    with pytest.raises(PlanError) as caught:
        inlay.make_plan(write_base(tmp_path / "base"), [write_adapter(tmp_path / "a", tensors)])
    assert {p.where for p in caught.value.problems} == {"model.layers.0.self_attn.q_proj", "layers.0.moe.router"}


# --- LLaMA-Factory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin"])
def test_a_value_head_beside_the_adapter_is_reported(tmp_path: Path, file: str) -> None:
    adapter = write_adapter(tmp_path / "a", adapter_tensors())
    base = write_base(tmp_path / "base")
    assert not inlay.make_plan(base, [adapter]).warnings
    save_file({"v_head.summary.weight": torch.ones(1, HIDDEN)}, adapter / file)
    (warning,) = inlay.make_plan(base, [adapter]).warnings
    assert file in warning and "is not merged" in warning


def test_what_was_trained_without_an_adapter_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "full")
    with pytest.raises(AdapterError, match=r"this is a model, not an adapter.*freeze, LLaMA Pro"):
        inlay.read_adapter(base)
    (base / "config.json").unlink()
    (base / "finetuning_args.json").write_text("{}")
    with pytest.raises(AdapterError, match="LLaMA-Factory before 2024"):
        inlay.read_adapter(base)
