"""Diffusers pipelines as bases, and LoRA files in diffusers' own names, against W + alpha/r · up ∘ down in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.cli.main import main
from inlay.errors import AdapterError, CheckpointError, InputError, PlanError
from oracle import correctly_rounded, float64, header, reach
from pipelines import (
    TEXT_FILE,
    UNET_FILE,
    Tensors,
    draw,
    pair,
    product,
    read_component,
    text_shapes,
    unet_shapes,
    write_json,
    write_pipeline,
    write_sharded,
)

RANK = 3
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
UNET = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.resnets.0.conv_shortcut",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
)
TEXT = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1")
Pairs = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "base")


def pairs(modules: Mapping[str, tuple[str, ...]] | None = None, rank: int = RANK, seed: int = 5) -> Pairs:
    """down and up by component and module."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"unet": unet_shapes(), "text_encoder": text_shapes()}
    return {
        (component, module): pair(shapes[component][module + ".weight"], rank, generator)
        for component, names in (modules or {"unet": UNET, "text_encoder": TEXT}).items()
        for module in names
    }


def write_lora(
    path: Path, given: Pairs, down: str = "lora_A", up: str = "lora_B", metadata: Mapping[str, Any] | None = None
) -> Path:
    tensors = {}
    for (component, module), (a, b) in given.items():
        tensors[f"{component}.{module}.{down}.weight"], tensors[f"{component}.{module}.{up}.weight"] = a, b
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if metadata else {})
    save_file(tensors, path, header)
    return path


def merge(base: Path, adapter: Path, out: Path, **more: Any) -> Path:
    inlay.run_plan(inlay.make_plan(base, [adapter], **more), out)
    assert inlay.verify(base, [adapter], out).exact
    return out


def check(base: Path, out: Path, given: Pairs, scaling: Mapping[str, float] | float = 1.0, dtype: str = "F32") -> None:
    """Every tensor of every component is what the formula says, or the base's."""
    touched = 0
    for component in ("unet", "text_encoder", "vae"):
        before, after = read_component(base, component), read_component(out, component)
        assert before.keys() == after.keys()
        for key, weight in before.items():
            found = given.get((component, key.removesuffix(".weight")))
            if found is None:
                assert torch.equal(after[key], weight), key
                continue
            factor = scaling if isinstance(scaling, float) else scaling[key.removesuffix(".weight")]
            exact = float64(weight) + factor * product(found[1], found[0])
            error = reach(exact, float64(weight))
            assert correctly_rounded(float64(after[key]), exact, error, dtype).all(), key
            assert not torch.equal(after[key], weight), key
            touched += 1
    assert touched == len(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_pair_reaches_its_component(tmp_path: Path, dtype: torch.dtype) -> None:
    base, given = write_pipeline(tmp_path / "base", dtype), pairs()
    adapter = write_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors", given)
    out = merge(base, adapter.parent, tmp_path / "out")
    check(base, out, given, dtype=NAMES[dtype])


@pytest.mark.parametrize(("down", "up"), [("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")])
def test_older_spellings_are_the_same_adapter(base: Path, tmp_path: Path, down: str, up: str) -> None:
    given = pairs()
    out = merge(base, write_lora(tmp_path / "old.safetensors", given, down, up), tmp_path / "out")
    check(base, out, given)


def test_attention_processors_are_the_layers_that_they_became(base: Path, tmp_path: Path) -> None:
    """`attn1.processor.to_out_lora` is to_out.0; the text encoder's to_q_lora is q_proj."""
    unet, text = "down_blocks.1.attentions.0.transformer_blocks.0.attn1", "text_model.encoder.layers.1.self_attn"
    old = {
        f"unet.{unet}.processor.to_q_lora": ("unet", f"{unet}.to_q"),
        f"unet.{unet}.processor.to_out_lora": ("unet", f"{unet}.to_out.0"),
        f"text_encoder.{text}.to_k_lora": ("text_encoder", f"{text}.k_proj"),
        f"text_encoder.{text}.to_out_lora": ("text_encoder", f"{text}.out_proj"),
    }
    given = pairs({c: tuple(m for k, m in old.values() if k == c) for c in ("unet", "text_encoder")})
    tensors = {
        f"{name}.{way}.weight": given[key][i] for name, key in old.items() for i, way in enumerate(("down", "up"))
    }
    save_file(tensors, tmp_path / "old.safetensors")
    check(base, merge(base, tmp_path / "old.safetensors", tmp_path / "out"), given)


def test_names_without_a_component_are_those_of_the_one_that_has_them(base: Path, tmp_path: Path) -> None:
    """As `unet.save_attn_procs` wrote them."""
    given = pairs({"unet": UNET[:2]})
    tensors = {}
    for (_, module), (a, b) in given.items():
        attention, _, which = module.rpartition(".")
        tensors[f"{attention}.processor.{which}_lora.down.weight"] = a
        tensors[f"{attention}.processor.{which}_lora.up.weight"] = b
    save_file(tensors, tmp_path / "procs.safetensors")
    check(base, merge(base, tmp_path / "procs.safetensors", tmp_path / "out"), given)


def test_the_config_in_the_header_gives_the_strength(base: Path, tmp_path: Path) -> None:
    given = pairs() | pairs({"unet": UNET[3:4]}, rank=2)
    metadata = {
        "unet.r": RANK, "unet.lora_alpha": 12, "unet.target_modules": ["to_q"], "unet.peft_type": "LORA",
        "unet.rank_pattern": {UNET[3]: 2}, "unet.alpha_pattern": {UNET[3]: 5},
        "text_encoder.r": RANK, "text_encoder.lora_alpha": 9, "text_encoder.use_rslora": True,
    }  # fmt: skip
    scaling = {**dict.fromkeys(UNET, 4.0), UNET[3]: 2.5, **dict.fromkeys(TEXT, 9 / np.sqrt(3))}
    adapter = write_lora(tmp_path / "a.safetensors", given, metadata=metadata)
    check(base, merge(base, adapter, tmp_path / "out"), given, scaling)


def test_old_alphas_give_the_strength(base: Path, tmp_path: Path) -> None:
    given = pairs()
    adapter = write_lora(tmp_path / "a.safetensors", given, "lora.down", "lora.up")
    alphas = {f"{c}.{m}.alpha": torch.tensor(1.5) for c, m in given}
    save_file({**load_file(adapter), **alphas}, adapter)
    check(base, merge(base, adapter, tmp_path / "out"), given, 0.5)


def test_a_peft_adapter_of_one_component_finds_it(base: Path, tmp_path: Path) -> None:
    """`get_peft_model(unet)` and `save_pretrained`, as diffusers' examples for DreamBooth did."""
    given, tensors = pairs({"unet": UNET}), {}
    for (_, module), (a, b) in given.items():
        tensors[f"base_model.model.{module}.lora_A.weight"], tensors[f"base_model.model.{module}.lora_B.weight"] = a, b
    (tmp_path / "unet").mkdir()
    save_file(tensors, tmp_path / "unet" / "adapter_model.safetensors")
    write_json(tmp_path / "unet" / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 6})
    check(base, merge(base, tmp_path / "unet", tmp_path / "out"), given, 2.0)


def test_dora_of_diffusers_gives_each_output_its_length(base: Path, tmp_path: Path) -> None:
    given = pairs({"unet": UNET[:2]})
    adapter = write_lora(tmp_path / "a.safetensors", given)
    magnitudes = {f"unet.{m}.lora_magnitude_vector.weight": torch.rand(12) + 0.5 for _, m in given}
    save_file({**load_file(adapter), **magnitudes}, adapter)
    out = merge(base, adapter, tmp_path / "out")
    before, after = read_component(base, "unet"), read_component(out, "unet")
    for (_, module), (a, b) in given.items():
        weight = float64(before[module + ".weight"])
        sum_ = weight + product(b, a)
        magnitude = float64(magnitudes[f"unet.{module}.lora_magnitude_vector.weight"])
        exact = magnitude[:, None] * sum_ / np.linalg.norm(sum_, axis=1, keepdims=True)
        assert correctly_rounded(float64(after[module + ".weight"]), exact, reach(exact, weight), "F32").all()


def test_two_adapters_sum_across_components(base: Path, tmp_path: Path) -> None:
    one, two = pairs(), pairs({"unet": UNET[:2], "text_encoder": TEXT[:1]}, rank=2, seed=6)
    files = [write_lora(tmp_path / "one.safetensors", one), write_lora(tmp_path / "two.safetensors", two)]
    inlay.run_plan(inlay.make_plan(base, files, weights=[1.0, 0.5]), tmp_path / "out")
    for (component, module), (a, b) in two.items():
        weight = float64(read_component(base, component)[module + ".weight"])
        first = one[component, module]
        exact = weight + product(first[1], first[0]) + 0.5 * product(b, a)
        merged = float64(read_component(tmp_path / "out", component)[module + ".weight"])
        assert correctly_rounded(merged, exact, reach(exact, weight), "F32").all()


# --- the folder -------------------------------------------------------------------------------------


def test_everything_else_is_kept_byte_for_byte(base: Path, tmp_path: Path) -> None:
    out = merge(base, write_lora(tmp_path / "a.safetensors", pairs()), tmp_path / "out")
    changed = {f"unet/{UNET_FILE}", f"text_encoder/{TEXT_FILE}"}
    files = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert written == files | {"inlay.json", "README.base.md"}
    for file in files - {"README.md"}:
        same = (base / file).read_bytes() == (out / file).read_bytes()
        assert same != (file in changed), file
    assert (out / "README.base.md").read_bytes() == (base / "README.md").read_bytes()
    assert header(out / "unet" / UNET_FILE) == header(base / "unet" / UNET_FILE)


def test_a_component_in_shards_keeps_its_shards_and_its_index(base: Path, tmp_path: Path) -> None:
    unet = read_component(base, "unet")
    (base / "unet" / UNET_FILE).unlink()
    write_sharded(base / "unet", unet, "diffusion_pytorch_model")
    given = pairs()
    out = merge(base, write_lora(tmp_path / "a.safetensors", given), tmp_path / "out")
    check(base, out, given)
    names = sorted(p.name for p in (base / "unet").iterdir())
    assert names == sorted(p.name for p in (out / "unet").iterdir())
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert (out / "unet" / index).read_bytes() == (base / "unet" / index).read_bytes()


def test_another_type_is_written_under_the_plain_names(base: Path, tmp_path: Path) -> None:
    unet = read_component(base, "unet")
    (base / "unet" / UNET_FILE).unlink()
    write_sharded(base / "unet", unet, "diffusion_pytorch_model")
    given = pairs()
    out = merge(base, write_lora(tmp_path / "a.safetensors", given), tmp_path / "out", torch_dtype="float16")
    merged = read_component(out, "unet")
    assert merged.keys() == unet.keys() and {t.dtype for t in merged.values()} == {torch.float16}
    index = json.loads((out / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in unet.values())
    assert json.loads((out / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"
    exact = float64(unet[UNET[0] + ".weight"]) + product(*given["unet", UNET[0]][::-1])
    assert correctly_rounded(float64(merged[UNET[0] + ".weight"]), exact, reach(exact, exact), "F16").all()


def test_a_bin_becomes_safetensors_under_the_name_that_diffusers_looks_for(base: Path, tmp_path: Path) -> None:
    unet = read_component(base, "unet")
    (base / "unet" / UNET_FILE).unlink()
    torch.save(unet, base / "unet" / "diffusion_pytorch_model.bin")
    given = pairs({"unet": UNET})
    adapter = write_lora(tmp_path / "a.safetensors", given)
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "unet" / UNET_FILE)
    assert merged.keys() == unet.keys()
    exact = float64(unet[UNET[3] + ".weight"]) + product(*given["unet", UNET[3]][::-1])
    assert correctly_rounded(float64(merged[UNET[3] + ".weight"]), exact, reach(exact, exact), "F32").all()
    assert not (tmp_path / "out" / "unet" / "diffusion_pytorch_model.bin").exists()


def test_other_copies_of_the_weights_are_left_out(base: Path, tmp_path: Path) -> None:
    save_file(read_component(base, "unet"), base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for file in ("unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "vae/model.onnx"):
        (base / file).write_bytes(b"other weights")
    adapter = write_lora(tmp_path / "a.safetensors", pairs())
    plan = inlay.make_plan(base, [adapter])
    assert {"unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt",
            "v1-5-pruned.safetensors", "vae/model.onnx"} == set(plan.left_out)  # fmt: skip
    inlay.run_plan(plan, tmp_path / "out")
    assert not any((tmp_path / "out" / file).exists() for file in plan.left_out)


def rename(base: Path, component: str, variant: str, *, keep: bool = False) -> None:
    """Give the weights of a component a variant."""
    for file in (base / component).glob("*.safetensors"):
        target = file.with_name(f"{file.stem}.{variant}.safetensors")
        target.write_bytes(file.read_bytes())
        if not keep:
            file.unlink()


def test_the_only_variant_that_loads_is_merged(base: Path, tmp_path: Path) -> None:
    rename(base, "unet", "fp16")
    rename(base, "text_encoder", "fp16", keep=True)  # diffusers loads the variant where there is one
    marked = {k: t + 1 for k, t in read_component(base, "text_encoder").items()}
    save_file(marked, base / "text_encoder" / "model.fp16.safetensors")
    given = pairs({"text_encoder": TEXT})
    out = merge(base, write_lora(tmp_path / "a.safetensors", given), tmp_path / "out")
    assert sorted(p.name for p in (out / "text_encoder").glob("*.safetensors")) == ["model.fp16.safetensors"]
    assert [p.name for p in (out / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert [p.name for p in (out / "vae").glob("*.safetensors")] == [UNET_FILE]
    merged = load_file(out / "text_encoder" / "model.fp16.safetensors")
    exact = float64(marked[TEXT[0] + ".weight"]) + product(*given["text_encoder", TEXT[0]][::-1])
    assert correctly_rounded(float64(merged[TEXT[0] + ".weight"]), exact, reach(exact, exact), "F32").all()


@pytest.mark.parametrize("variants", [("fp16", "bf16"), ("fp16", "fp16 bf16")])
def test_a_variant_that_cannot_be_told_is_refused(base: Path, tmp_path: Path, variants: tuple[str, str]) -> None:
    for component, names in zip(("unet", "text_encoder"), variants, strict=True):
        for variant in names.split():
            rename(base, component, variant, keep=True)
        (base / component / (UNET_FILE if component == "unet" else TEXT_FILE)).unlink()
    if variants[1] == "fp16 bf16":  # then fp16 loads, and only it
        assert inlay.open_checkpoint(base).components["text_encoder"].shards[0].file == "model.fp16.safetensors"
        return
    with pytest.raises(CheckpointError, match=r"not every component loads without a variant.*leave the files"):
        inlay.open_checkpoint(base)


def test_a_sharded_variant_is_read_by_its_index(base: Path, tmp_path: Path) -> None:
    unet = read_component(base, "unet")
    (base / "unet" / UNET_FILE).unlink()
    write_sharded(base / "unet", unet, "diffusion_pytorch_model", "fp16")
    given = pairs()
    out = merge(base, write_lora(tmp_path / "a.safetensors", given), tmp_path / "out")
    check(base, out, given)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()


def test_a_wrong_total_size_is_put_right(base: Path, tmp_path: Path) -> None:
    unet = read_component(base, "unet")
    (base / "unet" / UNET_FILE).unlink()
    write_sharded(base / "unet", unet, "diffusion_pytorch_model")
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1'))
    out = merge(base, write_lora(tmp_path / "a.safetensors", pairs()), tmp_path / "out")
    total = json.loads((out / "unet" / index.name).read_text())["metadata"]["total_size"]
    assert total == sum(t.numel() * t.element_size() for t in unet.values())


# --- refusals ---------------------------------------------------------------------------------------


def test_a_component_that_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    given = {("text_encoder_2", m): p for (_, m), p in pairs({"text_encoder": TEXT}).items()}
    adapter = write_lora(tmp_path / "a.safetensors", given)
    with pytest.raises(
        PlanError, match=r"is for text_encoder_2, which this pipeline does not have \(unet, text_encoder, vae\)"
    ):
        inlay.make_plan(base, [adapter])


def test_a_module_that_is_not_there_and_a_pair_that_does_not_fit_are_problems(base: Path, tmp_path: Path) -> None:
    given = pairs({"unet": UNET[:1]})
    a, b = given["unet", UNET[0]]
    given["unet", "down_blocks.7.to_q"] = a.clone(), b.clone()
    given["unet", UNET[0]] = a[:, :-1].contiguous(), b
    with pytest.raises(PlanError) as caught:
        inlay.make_plan(base, [write_lora(tmp_path / "a.safetensors", given)])
    assert len(caught.value.problems) == 2 and "down_blocks.7.to_q" in str(caught.value)


def test_a_language_model_is_not_the_base_of_an_image_lora(tmp_path: Path, base: Path) -> None:
    (tmp_path / "llm").mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(PlanError, match="no diffusers pipeline"):
        inlay.make_plan(tmp_path / "llm", [write_lora(tmp_path / "a.safetensors", pairs())])


def test_one_component_alone_is_refused(base: Path) -> None:
    with pytest.raises(CheckpointError, match="one component of a diffusers pipeline; pass the folder above"):
        inlay.open_checkpoint(base / "unet")


def test_shards_of_another_size_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="leave max_shard_size out"):
        inlay.make_plan(base, [write_lora(tmp_path / "a.safetensors", pairs())], max_shard_size="1KB")


def test_another_type_beside_codes_is_refused(base: Path, tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderKL", "quantization_config": {"quant_method": "bitsandbytes"}}
    write_json(base / "vae" / "config.json", config)
    adapter = write_lora(tmp_path / "a.safetensors", pairs())
    check(base, merge(base, adapter, tmp_path / "out"), pairs())
    with pytest.raises(PlanError, match=r"vae holds codes.*leave torch_dtype out"):
        inlay.make_plan(base, [adapter], torch_dtype="float16")


def test_a_folder_of_several_files_asks_for_one(base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_lora(tmp_path / "loras" / f"{name}.safetensors", pairs())
    with pytest.raises(AdapterError, match=r"several LoRA files .one\.safetensors, two\.safetensors"):
        inlay.read_adapter(tmp_path / "loras")
    (tmp_path / "loras" / "two.safetensors").unlink()
    check(base, merge(base, tmp_path / "loras", tmp_path / "out"), pairs())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"unet.r": 3, "unet.lora_alpha": 3, "unet.use_dora": True}, "lacks its magnitude, and use_dora is true"),
        ({"unet.r": 3, "unet.lora_alpha": "big"}, "lora_alpha must be a number"),
        ({"unet.r": 3, "unet.strange": 4}, "strange = 4"),
    ],
)
def test_a_config_in_the_header_that_is_not_right_is_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        inlay.read_adapter(write_lora(tmp_path / "a.safetensors", pairs(), metadata=metadata))


def test_a_rank_that_the_header_contradicts_is_a_problem(base: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a.safetensors", pairs(), metadata={"unet.r": 4, "unet.lora_alpha": 4})
    with pytest.raises(PlanError, match="rank 3 in the file, 4 in the config"):
        inlay.make_plan(base, [adapter])


def test_a_file_with_other_names_is_no_adapter(tmp_path: Path) -> None:
    save_file({"model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json beside it"):
        inlay.read_adapter(tmp_path / "a.safetensors")
    (tmp_path / "a.txt").write_text("no")
    with pytest.raises(InputError, match="not a file of weights"):
        inlay.read_adapter(tmp_path / "a.txt")


def test_the_weights_of_a_peft_folder_are_not_read_without_its_config(tmp_path: Path) -> None:
    save_file({"unet.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(AdapterError, match="pass the folder"):
        inlay.read_adapter(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b"])
def test_a_component_outside_the_folder_is_refused(base: Path, name: str) -> None:
    index = json.loads((base / "model_index.json").read_text())
    write_json(base / "model_index.json", {**index, name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(CheckpointError, match="not the name of a folder"):
        inlay.open_checkpoint(base)


def test_a_tampered_component_is_found(base: Path, tmp_path: Path) -> None:
    out = merge(base, write_lora(tmp_path / "a.safetensors", pairs()), tmp_path / "out")
    file = out / "vae" / UNET_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    report = inlay.verify(base, [tmp_path / "a.safetensors"], out)
    assert [t.key for t in report.tensors if t.verdict == "changed"] == ["vae/decoder.conv_in.weight"]


# --- the command line -------------------------------------------------------------------------------


def test_the_commands_work_on_a_pipeline(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lora(tmp_path / "style.safetensors", pairs())
    monkeypatch.chdir(tmp_path)
    given = ["--model", "base", "--adapters", "style.safetensors"]
    assert main(["plan", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["name"] == "style"
    assert main(["export", *given, "--merge_lora", "true", "--output_dir", "out", "--quiet"]) == 0  # beside the file
    assert main(["verify", *given, "--merged", "out", "--quiet"]) == 0
    check(base, tmp_path / "out", pairs())
    capsys.readouterr()
    assert main(["inspect", "style.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["rank"], facts["scaling"]) == ("adapter", [RANK], [1.0])
    assert main(["inspect", "out", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "merged" and facts["architecture"] == "StableDiffusionPipeline"
    assert list(facts["components"]) == ["unet", "text_encoder", "vae"]


def test_a_refusal_writes_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {("transformer", m): p for (_, m), p in pairs().items()}
    adapter = write_lora(tmp_path / "a.safetensors", given)
    out = tmp_path / "out"
    command = [
        "export",
        "--model",
        str(base),
        "--adapters",
        str(adapter),
        "--merge_lora",
        "true",
        "--output_dir",
        str(out),
    ]
    assert main(command) == 2
    assert not out.exists() and "nothing was written" in capsys.readouterr().err


def test_a_generated_pipeline_has_what_the_tests_think() -> None:
    tensors: Tensors = draw(unet_shapes(), 0, torch.float32)
    assert all(f"{m}.weight" in tensors for m in UNET)
