"""The twenty traps that other merging tools fell into (design.md); here each is a test with its number."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from cases import LINEAR, MODELS, Kit, edit_json, new_peft_model, save_adapter
from oracle import (
    bits,
    differing,
    exact_sum,
    float64,
    header,
    peft_merged,
    read,
    round_exactly,
    same_bytes,
    shard_files,
)

Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def lora(*targets: str, r: int = 4, alpha: float = 6, **more: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), "r": r, "lora_alpha": alpha, **more}


def build(
    kit: Kit, root: Path, config: Mapping[str, Any], name: str = "a", model: str = "qwen2", seed: int = 70
) -> Path:
    peft_model = new_peft_model(MODELS[model].load(kit.base(model)), config, seed)
    return save_adapter(peft_model, root / name, copies=config.get("save_embedding_layers", "auto"))


def merge(base: Path, adapters: list[Path], out: Path, **options: Any) -> Path:
    inlay.run_plan(inlay.make_plan(base, adapters, **options), out)
    return out


def change(path: Path, edit: Mapping[str, Any]) -> None:
    """Replace, add or (None) remove tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = {**load_file(path), **edit}
    save_file({k: t for k, t in tensors.items() if t is not None}, path, {"format": "pt"})


def delta(adapter: Path, module: str, scaling: float) -> tuple[np.ndarray, np.ndarray, float]:
    tensors = read(adapter / "adapter_model.safetensors")
    b, a = (float64(tensors[f"{PREFIX}{module}.lora_{x}.weight"]) for x in "BA")
    return b, a, scaling


def expected(base: Path, adapter: Path, module: str, scaling: float, dtype: str = "F32") -> np.ndarray:
    weight = float64(read(base)[f"{module}.weight"])
    return round_exactly(*exact_sum(weight, [delta(adapter, module, scaling)]), dtype)


def leftovers(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_01_the_second_adapter_does_not_replace_the_first(kit: Kit, tmp_path: Path) -> None:
    base = kit.base("qwen2")
    first = build(kit, tmp_path, lora("q_proj", alpha=6), "first", seed=1)
    second = build(kit, tmp_path, lora("q_proj", alpha=2), "second", seed=2)
    found = float64(read(merge(base, [first, second], tmp_path / "out"))[f"{Q}.weight"])
    weight = float64(read(base)[f"{Q}.weight"])
    both = [delta(first, Q, 6 / 4), delta(second, Q, 2 / 4)]
    assert np.array_equal(found, round_exactly(*exact_sum(weight, both), "F32"))
    for one in (first, second):
        assert differing(read(merge(base, [one], tmp_path / f"{one.name}-out")), read(tmp_path / "out"))


@pytest.mark.parametrize("what", ["file", "empty folder", "half a model", "whole model"])
def test_02_an_existing_output_is_not_taken_as_done(kit: Kit, what: str, tmp_path: Path) -> None:
    base, adapter, out = kit.base("qwen2"), kit.adapter("qwen2-plain"), tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "empty folder":
        out.mkdir()
    else:
        kit.copy_of(base, tmp_path).rename(out)
        if what == "half a model":
            shard_files(out)[1].unlink()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} if out.is_dir() else out.read_text()
    with pytest.raises(inlay.InlayError, match="exists"):
        inlay.make_plan(base, [adapter], output_dir=out)
    plan = inlay.make_plan(base, [adapter])
    with pytest.raises(inlay.InlayError, match="exists"):
        inlay.run_plan(plan, out)
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} if out.is_dir() else out.read_text()
    assert after == before
    assert leftovers(tmp_path) == {"out"}
    if what != "file":
        inlay.run_plan(plan, out, exist_ok=True)
        assert same_bytes(out, kit.merged("qwen2-plain"))
        assert leftovers(tmp_path) == {"out"}


def test_02_a_half_written_output_is_neither_visible_nor_trusted(kit: Kit, tmp_path: Path) -> None:
    """Stopped after a while, then the finished part is damaged: the rerun equals a clean run."""
    base, adapter, out = kit.base("qwen2"), kit.adapter("qwen2-plain"), tmp_path / "out"
    plan = inlay.make_plan(base, [adapter])

    class Stop(BaseException):
        pass

    done = 0

    def stop(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if done > plan.cost.written // 2:
            raise Stop

    with pytest.raises(Stop):
        inlay.run_plan(plan, out, workers=1, progress=stop)
    assert not out.exists()
    staged = list(tmp_path.rglob("*.safetensors"))
    assert staged, "the interrupted run left nothing to resume, so this test could not fail"
    for file in staged:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    inlay.run_plan(inlay.make_plan(base, [adapter]), out)
    assert same_bytes(out, kit.merged("qwen2-plain"))
    assert leftovers(tmp_path) == {"out"}


@pytest.mark.parametrize("where", ["all", "one"])
def test_03_adapter_keys_that_match_nothing_are_refused(kit: Kit, where: str, tmp_path: Path) -> None:
    adapter = kit.copy_of(kit.adapter("qwen2-plain"), tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = read(file)
    moved = {k: t for k, t in tensors.items() if where == "all" or "layers.1.mlp.up_proj" in k}
    change(file, dict.fromkeys(moved) | {k.replace("layers.", "layer."): t for k, t in moved.items()})
    with pytest.raises(inlay.InlayError) as error:
        inlay.make_plan(kit.base("qwen2"), [adapter], output_dir=tmp_path / "out")
    assert "reaches nothing" in str(error.value)
    assert "model.layer.1.mlp.up_proj" in str(error.value)
    assert leftovers(tmp_path) == {adapter.name}


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lm_head", "norm", "bias", "magnitude", "tokens"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16", "F64"])
def test_04_nan_and_inf_in_an_adapter_are_refused(
    kit: Kit, part: str, value: float, stored: str, tmp_path: Path
) -> None:
    import torch

    name, ending = {
        "lora_A": ("qwen2-plain", "1.mlp.down_proj.lora_A.weight"),
        "lora_B": ("qwen2-plain", "0.self_attn.v_proj.lora_B.weight"),
        "lm_head": ("qwen2-saved-head", "lm_head.weight"),
        "norm": ("qwen2-saved-norms", "model.norm.weight"),
        "bias": ("qwen2-bias-all", "0.self_attn.k_proj.bias"),
        "magnitude": ("qwen2-dora", "1.self_attn.o_proj.lora_magnitude_vector"),
        "tokens": ("qwen2-tokens-as-list", "trainable_tokens_delta"),
    }[part]
    adapter = kit.copy_of(kit.adapter(name), tmp_path)
    file = adapter / "adapter_model.safetensors"
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[stored]
    tensors = {k: t.to(dtype) for k, t in read(file).items()}
    change(file, tensors)
    inlay.make_plan(kit.base("qwen2"), [adapter])  # without it all is well
    key = next(k for k in tensors if k.endswith(ending))
    tensors[key].view(-1)[-1] = value
    change(file, tensors)
    with pytest.raises(inlay.InlayError) as error:
        inlay.make_plan(kit.base("qwen2"), [adapter])
    assert "NaN or Inf" in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_04_nan_and_inf_in_a_base_are_not_merged_into(kit: Kit, value: float, tmp_path: Path) -> None:
    """A touched tensor must come out finite; an untouched one is copied, whatever it holds."""
    base = kit.copy_of(kit.base("qwen2"), tmp_path)
    for key, fine in ((f"{Q}.weight", False), ("model.norm.weight", True)):
        file = next(f for f in shard_files(base) if key in header(f))
        before = read(file)[key]
        spoiled = before.clone()
        spoiled.view(-1)[3] = value
        change(file, {key: spoiled})
        out = tmp_path / f"out{fine}"
        if fine:
            merged = merge(base, [kit.adapter("qwen2-plain")], out)
            assert np.array_equal(bits(read(merged)[key]), bits(spoiled))
        else:
            with pytest.raises(inlay.InlayError, match=f"Inf or NaN.*{Q}"):
                merge(base, [kit.adapter("qwen2-plain")], out)
            assert not out.exists()
        change(file, {key: before})


def test_05_rslora_is_scaled_by_alpha_over_the_root_of_r(kit: Kit, tmp_path: Path) -> None:
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, lora("q_proj", r=9, alpha=6, use_rslora=True))
    found = float64(read(merge(base, [adapter], tmp_path / "out"))[f"{Q}.weight"])
    assert np.array_equal(found, expected(base, adapter, Q, 6 / math.sqrt(9)))
    assert not np.array_equal(found, expected(base, adapter, Q, 6 / 9))


def test_06_rank_pattern_and_alpha_pattern_act(kit: Kit, tmp_path: Path) -> None:
    config = lora(
        "q_proj", "v_proj", "up_proj", r=4, alpha=6, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 5},
        alpha_pattern={"model.layers.0.self_attn.v_proj": 11, "q_proj": 7},
    )  # fmt: skip
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, config)
    merged = read(merge(base, [adapter], tmp_path / "out"))
    for module, scaling in {
        Q: 7 / 2, "model.layers.1.self_attn.q_proj": 7 / 2, "model.layers.0.self_attn.v_proj": 11 / 4,
        "model.layers.1.self_attn.v_proj": 6 / 4, "model.layers.0.mlp.up_proj": 6 / 4,
        "model.layers.1.mlp.up_proj": 6 / 5,
    }.items():  # fmt: skip
        assert np.array_equal(float64(merged[f"{module}.weight"]), expected(base, adapter, module, scaling)), module


def test_07_a_lora_on_the_embedding_is_merged(kit: Kit, tmp_path: Path) -> None:
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, lora("embed_tokens", alpha=6, save_embedding_layers=False))
    tensors = read(adapter / "adapter_model.safetensors")
    a, b = (float64(tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{x}"]) for x in "AB")
    weight = float64(read(base)["model.embed_tokens.weight"])
    found = float64(read(merge(base, [adapter], tmp_path / "out"))["model.embed_tokens.weight"])
    assert np.array_equal(found, round_exactly(*exact_sum(weight, [(a.T, b.T, 6 / 4)]), "F32"))


def test_08_saved_modules_are_written(kit: Kit, tmp_path: Path) -> None:
    saved = ["lm_head", "norm", "embed_tokens"]
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, lora("q_proj", modules_to_save=saved))
    tensors, merged = read(adapter / "adapter_model.safetensors"), read(merge(base, [adapter], tmp_path / "out"))
    for key in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        assert np.array_equal(bits(merged[key]), bits(tensors[PREFIX + key]))
        assert not np.array_equal(bits(merged[key]), bits(read(base)[key]))


def test_08_an_untied_head_is_not_tied_again_on_load(kit: Kit, tmp_path: Path) -> None:
    base = kit.base("qwen2-tied")
    adapter = build(kit, tmp_path, lora("q_proj", modules_to_save=["lm_head"]), model="qwen2-tied")
    merged = merge(base, [adapter], tmp_path / "out")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = MODELS["qwen2-tied"].load(merged)
    head = read(adapter / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"]
    embedding = read(base)["model.embed_tokens.weight"]
    assert np.array_equal(bits(loaded.lm_head.weight.detach()), bits(head))
    assert np.array_equal(bits(loaded.model.embed_tokens.weight.detach()), bits(embedding))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, kit: Kit) -> tuple[Path, Path]:
    """A Qwen3-MoE whose experts' tensors lie in several shards, and a LoRA on single experts by their names on disk."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from cases import randomise, third_party

    del kit  # for its quiet set-up
    root = tmp_path_factory.mktemp("experts")
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1, head_dim=4,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    with third_party():
        model = transformers.Qwen3MoeForCausalLM(config)
        randomise(model, 3)
        model.save_pretrained(root / "base", max_shard_size="2KB")
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for key, tensor in read(root / "base").items():
        if ".experts." in key:
            out, in_ = tensor.shape
            module = PREFIX + key.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, in_, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    (root / "adapter").mkdir()
    save_file(tensors, root / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(raw))
    return root / "base", root / "adapter"


def test_09_experts_in_several_shards_are_all_merged(experts: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = experts
    places = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({places[k] for k in places if ".experts.1." in k}) > 1, "one shard holds all of an expert"
    merged = merge(base, [adapter], tmp_path / "out")
    count = 0
    for key, tensor in read(merged).items():
        if ".experts." in key:
            count += 1
            wanted = expected(base, adapter, key.removesuffix(".weight"), 3 / 2)
            assert np.array_equal(float64(tensor), wanted), key
    assert count == 12


def test_10_experts_keep_the_keys_of_the_base(experts: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = experts
    merged = merge(base, [adapter], tmp_path / "out")
    for a, b in zip(shard_files(base), shard_files(merged), strict=True):
        assert header(a) == header(b)
    assert any(".experts.3.down_proj.weight" in key for key in read(merged))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(("model", "module", "transposed"), [
    ("gpt2", "transformer.h.0.attn.c_proj", True), ("qwen2", "model.layers.0.self_attn.o_proj", False),
])  # fmt: skip
def test_11_a_square_weight_is_turned_by_what_its_layer_is(
    kit: Kit, model: str, module: str, transposed: bool, flag: bool, tmp_path: Path
) -> None:
    """Whatever the adapter's flag says. Where only the flag could tell, the merge is refused instead."""
    adapter = build(kit, tmp_path, lora(module.rpartition("layers.")[2].rpartition("h.")[2], r=3, alpha=3), model=model)
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=flag)
    base = kit.base(model)
    b, a, _ = delta(adapter, module, 1.0)
    weight = float64(read(base)[f"{module}.weight"])
    assert weight.shape[0] == weight.shape[1]
    if flag and not transposed:
        with pytest.raises(inlay.InlayError, match="square"):
            inlay.make_plan(base, [adapter])
        return
    found = float64(read(merge(base, [adapter], tmp_path / "out"))[f"{module}.weight"])
    pair = (a.T, b.T, 1.0) if transposed else (b, a, 1.0)
    assert np.array_equal(found, round_exactly(*exact_sum(weight, [pair]), "F32"))


SIDECARS = {
    "generation_config.json": b'{\n "temperature": 0.70 }\n\n',
    "chat_template.jinja": "{% for m in messages %}«{{ m }}»{% endfor %}".encode(),
    "modeling_custom.py": b"# custom code\r\n",
    "tokenizer.json": b'{"a":1}',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }",
    "preprocessor_config.json": b"{}",
    "assets/deep/picture.png": bytes(range(256)),
    "1_Pooling/config.json": b'{"word_embedding_dimension": 16}',
    "LICENSE": b"yours",
}


def test_12_all_other_files_of_the_base_are_copied_byte_for_byte(kit: Kit, tmp_path: Path) -> None:
    base = kit.copy_of(kit.base("qwen2"), tmp_path)
    for name, content in SIDECARS.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    config = b'{"model_type": "qwen2",   "odd": [1,2 ],\n\t"architectures": ["Qwen2ForCausalLM"]}'
    (base / "config.json").write_bytes(config)
    merged = merge(base, [kit.adapter("qwen2-plain")], tmp_path / "out")
    for name, content in {**SIDECARS, "config.json": config}.items():
        assert (merged / name).read_bytes() == content, name


@pytest.mark.parametrize("total_size", [0, 10**12, "12", None])
def test_13_the_total_size_of_the_index_is_right(kit: Kit, total_size: Any, tmp_path: Path) -> None:
    base = kit.copy_of(kit.base("qwen2"), tmp_path)
    index = base / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["metadata"] = {} if total_size is None else {"total_size": total_size}
    index.write_text(json.dumps(value))
    merged = merge(base, [kit.adapter("qwen2-plain")], tmp_path / "out")
    wrote = json.loads((merged / index.name).read_text())
    assert wrote["metadata"]["total_size"] == sum(t.nbytes for t in read(merged).values())
    assert wrote["weight_map"] == value["weight_map"]


@pytest.mark.parametrize("options", [{"torch_dtype": "bfloat16"}, {"max_shard_size": 3000}])
def test_13_the_index_is_right_for_another_type_and_layout(kit: Kit, options: dict[str, Any], tmp_path: Path) -> None:
    merged = merge(kit.base("qwen2"), [kit.adapter("qwen2-plain")], tmp_path / "out", **options)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read(merged).values())
    for file in shard_files(merged):
        assert {k for k, f in index["weight_map"].items() if f == file.name} == header(file).keys() - {"__metadata__"}


@pytest.mark.parametrize("where", ["base", "inside the base", "around the base", "adapter", "link to the base"])
def test_14_nothing_is_patched_in_place(kit: Kit, where: str, tmp_path: Path) -> None:
    base, adapter = kit.copy_of(kit.base("qwen2"), tmp_path / "home"), kit.copy_of(kit.adapter("qwen2-plain"), tmp_path)
    out = {
        "base": base, "inside the base": base / "merged", "around the base": base.parent, "adapter": adapter,
        "link to the base": tmp_path / "link",
    }[where]  # fmt: skip
    if where == "link to the base":
        out.symlink_to(base)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    plan = inlay.make_plan(base, [adapter])
    with pytest.raises(inlay.InlayError):
        inlay.make_plan(base, [adapter], output_dir=out, exist_ok=True)
    with pytest.raises(inlay.InlayError):
        inlay.run_plan(plan, out, exist_ok=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_14_a_rerun_applies_the_delta_once(kit: Kit, tmp_path: Path) -> None:
    base, adapter, out = kit.base("qwen2"), kit.adapter("qwen2-plain"), tmp_path / "out"
    merge(base, [adapter], out)
    inlay.run_plan(inlay.make_plan(base, [adapter]), out, exist_ok=True)
    assert same_bytes(out, kit.merged("qwen2-plain"))
    assert same_bytes(base, kit.base("qwen2"))


def test_14_the_merged_model_as_base_is_another_merge(kit: Kit, tmp_path: Path) -> None:
    """Merging again into the result is possible and adds the delta again; its manifest tells what it was made from."""
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, lora("q_proj"))
    first = merge(base, [adapter], tmp_path / "first")
    second = merge(first, [adapter], tmp_path / "second")
    key = f"{Q}.weight"
    assert np.array_equal(float64(read(second)[key]), expected(first, adapter, Q, 6 / 4))
    recipe = json.loads((second / "inlay.json").read_text())["base"]["recipe"]
    assert recipe["plan"] == json.loads((first / "inlay.json").read_text())["plan"]


def retrain(adapter: Path) -> None:
    """Other values in a file of the same name, size and time."""
    file = adapter / "adapter_model.safetensors"
    stat = file.stat()
    change(file, {k: -2 * t for k, t in read(file).items() if "lora_B" in k})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size


def test_15_a_retrained_adapter_at_the_same_path_is_merged_anew(kit: Kit, tmp_path: Path) -> None:
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, lora("q_proj"))
    old = inlay.make_plan(base, [adapter])
    inlay.run_plan(old, tmp_path / "old")
    retrain(adapter)
    new = inlay.make_plan(base, [adapter])
    assert new.digest != old.digest
    inlay.run_plan(new, tmp_path / "new")
    assert np.array_equal(float64(read(tmp_path / "new")[f"{Q}.weight"]), expected(base, adapter, Q, 6 / 4))
    assert not same_bytes(tmp_path / "old", tmp_path / "new")


def test_15_what_an_interrupted_merge_left_is_not_used_for_a_retrained_adapter(kit: Kit, tmp_path: Path) -> None:
    base, adapter, out = kit.base("qwen2"), build(kit, tmp_path, lora(*LINEAR)), tmp_path / "out"
    plan = inlay.make_plan(base, [adapter])

    class Stop(BaseException):
        pass

    def stop(folder: Path) -> None:
        raise Stop

    with pytest.raises(Stop):
        inlay.run_plan(plan, out, check=stop)
    assert list(tmp_path.rglob("*.safetensors")) != [adapter / "adapter_model.safetensors"], "nothing to resume from"
    retrain(adapter)
    inlay.run_plan(inlay.make_plan(base, [adapter]), out)
    assert np.array_equal(float64(read(out)[f"{Q}.weight"]), expected(base, adapter, Q, 6 / 4))
    assert leftovers(tmp_path) == {"a", "out"}


def test_15_a_plan_is_not_run_on_files_that_changed_since(kit: Kit, tmp_path: Path) -> None:
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, lora("q_proj"))
    plan = inlay.make_plan(base, [adapter])
    file = adapter / "adapter_model.safetensors"
    change(file, {k: -t for k, t in read(file).items()})
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    with pytest.raises(inlay.InlayError, match=r"adapter_model\.safetensors.*changed since the plan"):
        inlay.run_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen2-plain", "qwen2-dora", "qwen2-everything", "gpt2-dora"])
def test_16_every_way_to_run_gives_the_same_bytes(
    kit: Kit, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, memory, kernel, verification, command line or Python: no setting is a "safer" arithmetic."""
    from cases import CASES
    from inlay.cli.main import main

    base, adapter = kit.base(CASES[name].model, "BF16"), kit.adapter(name)
    reference = merge(base, [adapter], tmp_path / "reference")
    plan = inlay.make_plan(base, [adapter])
    for i, (workers, memory) in enumerate([(1, "1GB"), (4, "1GB"), (2, 40_000)]):
        inlay.run_plan(plan, tmp_path / f"run{i}", workers=workers, max_memory=memory)
    monkeypatch.setenv("INLAY_KERNEL", "0")
    merge(base, [adapter], tmp_path / "float64")
    monkeypatch.delenv("INLAY_KERNEL")
    for verify in ("none", "full"):
        argv = ["export", "--model", str(base), "--adapters", str(adapter), "--merge_lora", "true", "--quiet"]
        assert main([*argv, "--verify", verify, "--output_dir", str(tmp_path / f"cli-{verify}")]) == 0
    others = [tmp_path / n for n in ("run0", "run1", "run2", "float64", "cli-none", "cli-full")]
    assert all(same_bytes(reference, other) for other in others)
    tensors = dict(inlay.merged_tensors(plan))
    assert not differing(tensors, read(reference))
    assert tensors.keys() == read(reference).keys()


QUANTISATIONS = {
    "bnb 4 bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "uint8", (128, 1)),
    "bnb 8 bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", (16, 16)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [8, 8]}, "float8_e4m3fn", (16, 16)),
}


def without_scales(kit: Kit, root: Path, name: str) -> Path:
    """A base whose linear weights are codes that nothing scales."""
    import torch

    settings, dtype, shape = QUANTISATIONS[name]
    base = kit.copy_of(kit.base("qwen2", "BF16"), root)
    for file in shard_files(base):
        codes = {k: torch.arange(math.prod(shape)).to(torch.uint8).reshape(shape).view(getattr(torch, dtype))
                 for k in read(file) if "proj.weight" in k}  # fmt: skip
        change(file, codes)
    edit_json(base / "config.json", quantization_config=settings)
    return base


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_17_codes_without_scales_are_refused(kit: Kit, name: str, tmp_path: Path) -> None:
    base = without_scales(kit, tmp_path, name)
    with pytest.raises(inlay.InlayError) as error:
        inlay.make_plan(base, [kit.adapter("qwen2-plain")], output_dir=tmp_path / "out")
    assert "quantised" in str(error.value)
    assert QUANTISATIONS[name][0]["quant_method"] in str(error.value)
    assert "16-bit original" in str(error.value)
    assert leftovers(tmp_path) == {base.name}


def test_17_float_tensors_of_a_quantised_base_stay_off_its_grid(kit: Kit, tmp_path: Path) -> None:
    """A LoRA on the head alone: the head is merged as the float it is, and every code is copied."""
    base = tmp_path / "nf4"
    inlay.run_plan(inlay.make_plan(kit.base("qwen2", "BF16"), [], quant=inlay.Quant(method="bnb", bits=4)), base)
    adapter = build(kit, tmp_path, lora("lm_head", alpha=6, save_embedding_layers=False))
    inlay.run_plan(inlay.make_plan(base, [adapter], quant=inlay.Quant(keep=True)), tmp_path / "out")
    assert differing(read(base), read(tmp_path / "out")) == ["lm_head.weight"]
    head = float64(read(tmp_path / "out")["lm_head.weight"])
    assert np.array_equal(head, expected(base, adapter, "lm_head", 6 / 4, "BF16"))


def test_18_rows_beyond_the_vocabulary_are_appended(kit: Kit, tmp_path: Path) -> None:
    """Embedding and head of 43 rows in the adapter, 40 in the base (see test_tied.py for all the ways to get there)."""
    import torch

    adapter = build(kit, tmp_path, lora("q_proj"))
    generator = torch.Generator().manual_seed(9)
    new = {k: torch.randn(43, 16, generator=generator) for k in ("model.embed_tokens.weight", "lm_head.weight")}
    change(adapter / "adapter_model.safetensors", {PREFIX + k: t for k, t in new.items()})
    merged = merge(kit.base("qwen2", "BF16"), [adapter], tmp_path / "out")
    for key, tensor in new.items():
        assert np.array_equal(bits(read(merged)[key]), bits(tensor.bfloat16()))
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 43
    loaded, info = MODELS["qwen2"].load_with_info(merged, "BF16")
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert loaded.get_output_embeddings().weight.shape == (43, 16)


def test_18_fewer_rows_than_the_vocabulary_keep_the_function(kit: Kit, tmp_path: Path) -> None:
    """A vocabulary that was cut before training: both ends shrink together, or the merge is refused."""
    import torch

    adapter = build(kit, tmp_path, lora("q_proj"))
    change(adapter / "adapter_model.safetensors", {f"{PREFIX}model.embed_tokens.weight": torch.ones(30, 16)})
    with pytest.raises(inlay.InlayError, match=r"lm_head\.weight.*40 rows"):
        inlay.make_plan(kit.base("qwen2"), [adapter])


@pytest.mark.parametrize("size", [1500, 4000, "8KB", "1GB"])
def test_19_shards_are_no_larger_than_asked(kit: Kit, size: int | str, tmp_path: Path) -> None:
    limit = {"8KB": 8000, "1GB": 10**9}.get(str(size), size)
    merged = merge(kit.base("qwen2"), [kit.adapter("qwen2-plain")], tmp_path / "out", max_shard_size=size)
    assert not differing(read(kit.merged("qwen2-plain")), read(merged))
    for file in shard_files(merged):
        sizes = [t.nbytes for t in read(file).values()]
        assert sum(sizes) <= int(limit) or len(sizes) == 1, file.name
    assert MODELS["qwen2"].load_with_info(merged)[1]["missing_keys"] == set()
    assert (size == "1GB") == (not (merged / "model.safetensors.index.json").exists())


def test_19_memory_does_not_grow_with_the_shard(kit: Kit, tmp_path: Path) -> None:
    """A base of one 60 GB shard (a hole on disk): planning reads its header, and the work space stays under the cap."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(60)]
    rows, cols = 65536, 8192
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for i, name in enumerate(names):
        offsets = [i * rows * cols * 2, (i + 1) * rows * cols * 2]
        head[f"{name}.weight"] = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": offsets}
    raw = json.dumps(head).encode()
    with open(base / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + len(names) * rows * cols * 2)
    (base / "config.json").write_text("{}")
    import torch
    from safetensors.torch import save_file

    adapter.mkdir()
    pair = {"lora_A": torch.ones(8, cols), "lora_B": torch.ones(rows, 8)}
    save_file({f"{PREFIX}{names[0]}.{k}.weight": t for k, t in pair.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    plan = inlay.make_plan(base, [adapter], max_memory="16MB")
    assert plan.cost.written == 60 * rows * cols * 2
    assert plan.cost.memory <= 16_000_000


@pytest.mark.parametrize("config_dtype", ["float32", "float16", None])
def test_20_the_type_in_the_config_does_not_change_the_tensors(
    kit: Kit, config_dtype: str | None, tmp_path: Path
) -> None:
    """16-bit tensors stay 16-bit, whatever `dtype` in config.json or the adapter's float32 says."""
    base = kit.copy_of(kit.base("qwen2", "BF16"), tmp_path)
    edit_json(base / "config.json", dtype=config_dtype, torch_dtype=config_dtype)
    merged = merge(base, [kit.adapter("qwen2-everything")], tmp_path / "out")
    assert not differing(read(merged), read(kit.merged("qwen2-everything", "BF16")))
    for a, b in zip(shard_files(base), shard_files(merged), strict=True):
        assert a.stat().st_size == b.stat().st_size
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_20_mixed_types_are_each_kept(kit: Kit, tmp_path: Path) -> None:
    """float32 norms and one float16 weight in a bfloat16 base: each tensor keeps its own type."""
    base = kit.copy_of(kit.base("qwen2", "BF16"), tmp_path)
    key = f"{Q}.weight"
    for file in shard_files(base):
        tensors = read(file)
        change(file, {k: t.float() for k, t in tensors.items() if "norm" in k})
        if key in tensors:
            change(file, {key: tensors[key].half()})
    adapter = kit.adapter("qwen2-plain")
    merged = read(merge(base, [adapter], tmp_path / "out"))
    assert {k: t.dtype for k, t in merged.items()} == {k: t.dtype for k, t in read(base).items()}
    assert np.array_equal(float64(merged[key]), expected(base, adapter, Q, 6 / 4, "F16"))
    other = "model.layers.1.mlp.up_proj"
    assert np.array_equal(float64(merged[f"{other}.weight"]), expected(base, adapter, other, 6 / 4, "BF16"))


def test_20_a_type_that_is_asked_for_is_written_to_tensors_and_config(kit: Kit, tmp_path: Path) -> None:
    base, adapter = kit.base("qwen2", "BF16"), kit.adapter("qwen2-plain")
    merged = merge(base, [adapter], tmp_path / "out", torch_dtype="float16")
    assert {str(t.dtype) for t in read(merged).values()} == {"torch.float16"}
    before, after = (json.loads((p / "config.json").read_text()) for p in (base, merged))
    assert after == {**before, "dtype": "float16"}
    assert np.array_equal(float64(read(merged)[f"{Q}.weight"]), expected(base, adapter, Q, 6 / 4, "F16"))


def test_the_formula_of_these_tests_is_that_of_peft(kit: Kit, tmp_path: Path) -> None:
    """`expected` above, against PEFT in float64, so that it is not merely our own opinion."""
    base, adapter = kit.base("qwen2"), build(kit, tmp_path, lora("q_proj"))
    theirs = float64(peft_merged("qwen2", base, [adapter], "F64")[f"{Q}.weight"])
    ours = expected(base, adapter, Q, 6 / 4)
    assert np.abs(ours - theirs).max() <= 2.0**-24 * np.abs(ours).max()
