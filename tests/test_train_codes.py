"""Training on a base that is stored in codes: on the codes, decoded while it is loaded, or refused with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import build
from cases import third_party
from trainable import FAST, add_tokenizer, inlay, log, train, write_rows

pytest.importorskip("accelerate")

HIDDEN, INNER = 64, 128


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A base whose layers are wide enough for blocks of codes."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with third_party():
        transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    return add_tokenizer(tmp_path / "dense")


def coded(dense: Path, how: str) -> Path:
    """The same base in codes: as `export` writes it, or FP8 as DeepSeek stores it."""
    out = dense.with_name("coded")
    if how == FP8:
        return fp8_blocks(dense, out)
    code, _, err = inlay(f"export --model {dense} {how} --output_dir {out}")
    assert code == 0, err
    return out


def decoded(base: Path, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """The base in floats, by the command that messages name."""
    out = base.with_name("decoded")
    code, _, err = inlay(f"export --model {base} --torch_dtype {dtype} --output_dir {out}")
    assert code == 0, err
    return build.read_arrays(out)


def fp8_blocks(dense: Path, out: Path) -> Path:
    """Each block of 32 × 32 elements in E4M3, with the scale that brings its largest to 448."""
    shutil.copytree(dense, out)
    tensors = {}
    for key, weight in build.read_arrays(dense).items():
        if "proj.weight" not in key:
            tensors[key] = weight
            continue
        rows, cols = weight.shape
        blocks = weight.astype(np.float32).reshape(rows // 32, 32, cols // 32, 32)
        scales = np.abs(blocks).max(axis=(1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).reshape(rows, cols)
        tensors[key] = codes.astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales.astype(np.float32)
    build.write_tensors(out / "model.safetensors", tensors)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    build.write_json(out / "config.json", config)
    return out


FP8 = "fp8 in blocks"
BNB = "--quant_method bnb --quant_bits 4"
LIBRARIES = {
    FP8: None,
    BNB: "bitsandbytes",
    "--quant_method bnb --quant_bits 8": "bitsandbytes",
    "--quant_method fp8": "compressed_tensors",
}


@pytest.mark.parametrize("how", LIBRARIES)
def test_an_adapter_trained_on_codes_belongs_to_them_and_merges_onto_what_they_stand_for(
    dense: Path, tmp_path: Path, how: str
) -> None:
    """The oracle is the base as inlay decodes it, plus scaling · B A in float64."""
    if library := LIBRARIES[how]:
        pytest.importorskip(library)
    base = coded(dense, how)
    checkpoint = train(base, tmp_path, "--lora_rank 4 --lora_alpha 8", steps=6)
    losses = [line["loss"] for line in log(checkpoint.parent)]
    assert losses[-1] < losses[0]
    assert any("scale" in k or "absmax" in k or "SCB" in k for k in recorded(checkpoint)), recorded(checkpoint)
    code, _, err = inlay(f"export --adapters {checkpoint} --merge_lora --output_dir {tmp_path / 'out'}")
    assert code == 0, err
    assert inlay(f"verify --adapters {checkpoint} --merged {tmp_path / 'out'} --exact")[0] == 0
    before, after = decoded(base, "float32"), build.read_arrays(tmp_path / "out")
    adapter = build.read_arrays(checkpoint)
    module = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    expected = before[f"{module}.weight"].astype(np.float64) + 2 * b @ a
    assert np.abs(after[f"{module}.weight"].astype(np.float64) - expected).max() <= np.abs(expected).max() / 256
    assert np.abs(2 * b @ a).max() > np.abs(expected).max() / 64


def recorded(checkpoint: Path) -> list[str]:
    return list(json.loads((checkpoint / "inlay_base.json").read_text())["tensors"])


def test_codes_that_hand_no_gradient_on_are_decoded_as_inlay_decodes_them(dense: Path) -> None:
    """So the adapter is trained on just the weights that it is merged onto."""
    from inlay.train import codes, load
    from inlay.train.recipe import Recipe

    base = coded(dense, FP8)
    expected = decoded(base)
    recipe = Recipe(model=str(base))
    with third_party():
        config = load.read_config(base, recipe)
        stored = codes.stored_method(base, config)
        model = load.load_model(base, config, recipe, stored)
    assert stored == "fp8"
    for key, p in model.named_parameters():
        assert str(p.dtype) == "torch.bfloat16", key
        assert (p.detach().float().numpy() == expected[key].astype(np.float32)).all(), key


REFUSED: dict[str, tuple[str, str, str]] = {
    "codes on codes": (FP8, "--quant_method bnb --quant_bits 4", "is stored in codes already (fp8)"),
    "all weights": (FP8, "--train_type full", "is stored in codes (fp8), which take no small steps"),
    "a method without layers": (BNB, "--train_type loha", "--train_type loha: cannot be trained on a base in codes"),
    "a base that is taken apart": (BNB, "--init_weights pissa", "--init_weights pissa: takes a part of"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_on_codes_is_refused_with_the_way_out(dense: Path, tmp_path: Path, what: str) -> None:
    how, more, message = REFUSED[what]
    refused(coded(dense, how), tmp_path, more, message)


def test_codes_that_transformers_would_read_as_weights_are_refused(dense: Path, tmp_path: Path) -> None:
    """FP8 with its description in a file of its own, or nowhere: the scales would be left out, without a word."""
    base = coded(dense, FP8)
    config = json.loads((base / "config.json").read_text())
    codes: dict[str, Any] = config.pop("quantization_config")
    build.write_json(base / "config.json", config)
    refused(base, tmp_path, "", "is stored in codes (of no name) that cannot be trained on")
    build.write_json(base / "hf_quant_config.json", codes)
    refused(base, tmp_path, "", "is stored in codes (fp8) that cannot be trained on")


def test_a_missing_library_is_named(dense: Path, tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is here")
    refused(coded(dense, BNB), tmp_path, "", "requires bitsandbytes")


def refused(base: Path, folder: Path, more: str, message: str) -> None:
    data = write_rows(folder / "data.jsonl")
    code, out, err = inlay(f"sft --model {base} --dataset {data} --output_dir {folder / 'runs'} {FAST} {more}")
    assert code == 2 and message in err and not out
    assert f"`inlay export --model {base} --torch_dtype bfloat16 --output_dir DENSE`" in err
    assert "Traceback" not in err and not (folder / "runs").exists()
