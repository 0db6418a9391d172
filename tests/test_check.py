"""What is said of an adapter and a base that do not fit: only what is so, and what helps."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from cases import MODELS, Kit, edit_json
from chatty import talking
from families import FAMILIES
from inlay.adapters.adapter import read_adapter
from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.errors import InlayError
from inlay.records.fingerprint import make_fingerprint
from test_live import lora, trained

MODELS.update(FAMILIES)
Q = "model.layers.0.self_attn.q_proj.weight"


def recorded(kit: Kit, base: Path, where: Path) -> Path:
    """An adapter that names this base, with the record that training leaves."""
    adapter = kit.copy_of(kit.adapter("qwen2-plain"), where)
    record = make_fingerprint(open_checkpoint(base), [Q])
    (adapter / "inlay_base.json").write_text(json.dumps(record))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    return adapter


def change(base: Path, key: str, name: str | None) -> None:
    """Another type for a tensor, or another name."""
    file = next(f for f in sorted(base.glob("*.safetensors")) if key in load_file(f))
    tensors = load_file(file)
    if name is None:
        tensors[key] = tensors[key].to(torch.bfloat16)
    else:
        tensors[name] = tensors.pop(key)
        index = base / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(f'"{key}"', f'"{name}"'))
    save_file(tensors, file, {"format": "pt"})


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(InlayError) as found:
        inlay.make_plan(base, [adapter])
    return str(found.value)


def test_a_base_that_changed_at_its_place_is_not_named_twice(kit: Kit, tmp_path: Path) -> None:
    base = kit.copy_of(kit.base("qwen2"), tmp_path)
    adapter = recorded(kit, base, tmp_path)
    inlay.make_plan(base, [adapter])
    change(base, Q, Q + ".moved")
    said = refusal(base, adapter)
    assert "as its base; this is" not in said
    assert f"1 of the 1 tensors that the adapter changes are not there now, such as {Q}" in said


def test_a_base_of_other_types_is_told_apart(kit: Kit, tmp_path: Path) -> None:
    base = kit.copy_of(kit.base("qwen2"), tmp_path)
    adapter = recorded(kit, base, tmp_path)
    change(base, Q, None)
    assert "names, types or shapes of its tensors are others now" in refusal(base, adapter)


def test_a_fault_of_the_adapter_alone_is_not_laid_on_the_base(kit: Kit, tmp_path: Path) -> None:
    base = kit.copy_of(kit.base("qwen2"), tmp_path)
    adapter = recorded(kit, base, tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("q_proj.lora_B.weight"))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, file, {"format": "pt"})
    said = refusal(base, adapter)
    assert "names, types and shapes of its tensors are as they were then" in said and "as its base" not in said
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="another/base")
    assert f"names another/base as its base; this is {base}" in refusal(base, adapter)


def test_layers_that_are_tuned_whole_and_excluded_ones_are_not_missed(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path)
    norms = peft.LNTuningConfig(target_modules=["norm", "input_layernorm"])
    adapter = trained(MODELS["qwen2"].load(base), norms, tmp_path / "norms")
    assert inlay.make_plan(base, [adapter]).warnings == ()
    plan = inlay.make_plan(kit.base("qwen2"), [kit.adapter("qwen2-exclude-modules")])
    assert not [w for w in plan.warnings if "has nothing for it" in w]
    listed = read_adapter(adapter).config.raw["target_modules"]
    edit_json(adapter / "adapter_config.json", target_modules=[*listed, "post_attention_layernorm"])
    (warning,) = inlay.make_plan(base, [adapter]).warnings
    assert "lists 'post_attention_layernorm', the file has nothing for it" in warning


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral"])
def test_copies_of_stacked_experts_are_refused_where_the_base_has_them_one_by_one(
    kit: Kit, tmp_path: Path, family: str
) -> None:
    """They would stand beside the base's own experts, and no class would load the result."""
    base = talking(kit, tmp_path, family)
    config = lora(target_modules=["q_proj"], modules_to_save=["mlp"])
    adapter = trained(MODELS[family].load(base), config, tmp_path / "a")
    said = refusal(base, adapter)
    assert "(4 problems" in said and "a full copy of experts" in said and "target_parameters" in said


def test_copies_of_experts_that_the_base_has_stacked_are_taken(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, "gptoss")
    config = lora(target_modules=["q_proj"], modules_to_save=["mlp"])
    adapter = trained(MODELS["gptoss"].load(base), config, tmp_path / "a")
    plan = inlay.make_plan(base, [adapter])
    assert sum(not e.copied or e.source.root != "base" for k, e in plan.entries.items() if ".experts." in k) == 8
