"""What the recipe trains beside its targets: full copies, biases, and the parts of a vision-language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import build
from cases import Kit
from trainable import FAST, add_tokenizer, copy_base, inlay, train, write_rows

pytest.importorskip("accelerate")


def exported(checkpoint: Path, out: Path) -> Path:
    code, _, err = inlay(f"export --adapters {checkpoint} --merge_lora --output_dir {out}")
    assert code == 0, err
    assert inlay(f"verify --adapters {checkpoint} --merged {out} --exact")[0] == 0
    return out


def changed(base: Path, merged: Path) -> set[str]:
    before, after = build.read_arrays(base), build.read_arrays(merged)
    return {key for key in before if (before[key] != after[key]).any()}


@pytest.mark.parametrize(
    ("more", "kinds"),
    [
        ("--lora_bias all", ("bias",)),
        ("--modules_to_save all-norm", ("norm",)),
        ("--modules_to_save all-embedding", ("embed_tokens", "lm_head")),
    ],
)
def test_the_frozen_part_of_a_vision_language_model_stays_as_it_is(
    kit: Kit, tmp_path: Path, more: str, kinds: tuple[str, ...]
) -> None:
    base = copy_base(kit, "qwen25vl", tmp_path)
    checkpoint = train(base, tmp_path, more)
    free = json.loads((checkpoint / "args.json").read_text())["trainable_parameters"]
    found = changed(base, exported(checkpoint, tmp_path / "out"))
    assert found and not [key for key in found if "visual" in key]
    plain = json.loads((train(base, tmp_path) / "args.json").read_text())["trainable_parameters"]
    tensors = build.read_arrays(base)
    expected = {k for k in tensors if "visual" not in k and any(kind in k for kind in kinds)}
    assert free == plain + sum(tensors[k].size for k in expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--freeze_llm true --freeze_vit false", "lie in the vision part, which rows of text never pass"),
        ("--freeze_llm true --freeze_aligner false", "lie in the aligner part"),
        ("--freeze_llm true --freeze_vit false --train_type full", "--freeze_llm: rows of text pass no other part"),
    ],
)
def test_parts_that_rows_of_text_never_pass_are_refused_alone(
    kit: Kit, tmp_path: Path, more: str, message: str
) -> None:
    base, data = copy_base(kit, "llava", tmp_path), write_rows(tmp_path / "data.jsonl")
    code, _, err = inlay(f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'r'} {FAST} {more}")
    assert code == 2 and message in err and not (tmp_path / "r").exists()


def test_parts_that_rows_of_text_never_pass_are_a_warning_beside_others(kit: Kit, tmp_path: Path) -> None:
    base, data = copy_base(kit, "llava", tmp_path), write_rows(tmp_path / "data.jsonl")
    code, _, err = inlay(
        f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'r'} --max_steps 1 {FAST} --freeze_vit false"
    )
    assert code == 0 and "warning: 12 targets lie in the vision part" in err


@pytest.mark.parametrize(
    ("more", "saved", "count"),
    [
        # PEFT takes "norm" for the end of input_layernorm too
        ("--modules_to_save norm --target_modules q_proj", ["model.norm"], 1),
        ("--modules_to_save mlp", ["mlp"], 6),
        ("--modules_to_save q_proj", ["q_proj"], 4),
    ],
)
def test_full_copies_are_made_of_what_is_named_and_of_nothing_else(
    kit: Kit, tmp_path: Path, more: str, saved: list[str], count: int
) -> None:
    """A module that is trained whole is no target too."""
    from safetensors import safe_open

    base = copy_base(kit, "qwen2", tmp_path)
    checkpoint = train(base, tmp_path, more)
    args = json.loads((checkpoint / "args.json").read_text())
    assert args["resolved_modules_to_save"] == saved
    with safe_open(checkpoint / "adapter_model.safetensors", "np") as file:
        copies = [key for key in file.keys() if ".lora_" not in key]  # noqa: SIM118
    assert len(copies) == count and all(saved[0] in key for key in copies)
    assert not {m for m in args["resolved_modules"] if f".{saved[0]}" in m}
    exported(checkpoint, tmp_path / "out")


def test_layers_that_peft_would_take_for_experts_are_refused_rather_than_others_trained(tmp_path: Path) -> None:
    """The shared expert of Qwen3-Next has layers of the names that PEFT reads as the routed experts."""
    import torch
    import transformers

    from cases import third_party

    config = transformers.Qwen3NextConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with third_party():
        transformers.Qwen3NextForCausalLM(config).save_pretrained(tmp_path / "base")
    base, data = add_tokenizer(tmp_path / "base"), write_rows(tmp_path / "data.jsonl")
    for dropout in ("0.05", "0"):
        command = f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'r'} {FAST} --lora_dropout {dropout}"
        code, _, err = inlay(command)
        assert code == 2 and "PEFT reads down_proj gate_proj up_proj as names of the experts" in err
    exported(train(base, tmp_path, "--exclude_modules down_proj gate_proj up_proj"), tmp_path / "out")


def test_a_block_of_oft_that_does_not_fit_is_said_and_what_is_taken_instead(kit: Kit, tmp_path: Path) -> None:
    """Inputs of 16 (12 modules) and 24: 6 divides only the latter."""
    base, data = copy_base(kit, "qwen2", tmp_path), write_rows(tmp_path / "data.jsonl")
    command = f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'r'} --max_steps 2 {FAST} --train_type oft"
    code, out, err = inlay(f"{command} --oft_block_size 6")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "--oft_block_size" in line]
    blocks = {key: a.shape for key, a in build.read_arrays(Path(out.strip())).items() if "oft_R" in key}
    sizes = {int((1 + (1 + 8 * shape[1]) ** 0.5) / 2) for key, shape in blocks.items() if "down_proj" not in key}
    assert sizes == {next(iter(sizes))} and sizes < {2, 4, 8, 16}
    assert line.endswith(f"PEFT takes {next(iter(sizes))} in 12 modules")
    exported(Path(out.strip()), tmp_path / "out")
    code, _, err = inlay(f"{command} --oft_block_size 4")
    assert code == 0 and "--oft_block_size" not in err


def test_steps_that_bfloat16_takes_back_are_said_where_all_weights_are_trained(kit: Kit, tmp_path: Path) -> None:
    """The oracle adds a step of Adam to each weight, and rounds."""
    import torch

    base, data = copy_base(kit, "qwen2", tmp_path), write_rows(tmp_path / "data.jsonl")
    command = f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'r'} --max_steps 1 --train_type full"
    code, _, err = inlay(f"{command} --torch_dtype bfloat16 --learning_rate 1e-5")
    assert code == 0, err
    weights = torch.cat(
        [torch.tensor(a.astype("f4")).to(torch.bfloat16).flatten() for a in build.read_arrays(base).values()]
    )
    stay = sum(float((weights + sign == weights).float().mean()) for sign in (1e-5, -1e-5)) / 2
    (line,) = [line for line in err.splitlines() if "too large for a step" in line]
    said = int(line.partition("bfloat16: ")[2].partition("%")[0]) / 100
    assert said > 0.5 and said - 0.01 <= stay <= said + 0.1, line
    for more in ("--torch_dtype float32 --learning_rate 1e-5", "--torch_dtype bfloat16 --learning_rate 3e-2"):
        code, _, err = inlay(f"{command} {more}")
        assert code == 0 and "too large for a step" not in err
