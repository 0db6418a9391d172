"""Codes in models as they are published: gpt-oss experts in MXFP4, stacks of MLX, and indexes of real checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import BF16, CONFIG, PREFIX, raw_file, write_json, write_model, write_tensors
from cases import Model, load_peft, new_peft_model, randomise, save_adapter, third_party
from inlay import Quant, make_plan, run_plan, verify
from inlay.codecs import bnb4, mxfp4
from oracle import correctly_rounded, float64, read
from quantised_bases import FORMS, Form, config_of, decode, encode, floats, once, stored, typed

# --- gpt-oss ------------------------------------------------------------------------------------------

MX = Form("mxfp4")
GPT_OSS = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "num_local_experts": 3, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def _gpt_oss() -> Any:
    import transformers

    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**GPT_OSS))


OSS = Model(_gpt_oss)
EXPERTS = tuple(f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The base in MXFP4, the same weights in floats, and an adapter with target_parameters."""
    import torch
    from safetensors.torch import load_file, save_file

    place = tmp_path_factory.mktemp("gpt-oss")
    with third_party():
        model = _gpt_oss()
        randomise(model, 5)
        model.save_pretrained(place / "plain")
    weights = load_file(place / "plain" / "model.safetensors")
    coded = dict(weights)
    for key in EXPERTS:
        parts, settings = encode(MX, weights[key].numpy().reshape(weights[key].shape))
        values = decode(MX, parts, settings).astype(np.float32).reshape(weights[key].shape)
        weights[key] = torch.from_numpy(values)
        del coded[key]
        coded |= {f"{key}_{part}": torch.from_numpy(parts[part]) for part in ("blocks", "scales")}
    save_file(weights, place / "plain" / "model.safetensors", {"format": "pt"})
    config = config_of(place / "plain")
    write_json(place / "mx" / "config.json", {**config, "quantization_config": mxfp4.config({}, ["lm_head"])})
    save_file(coded, place / "mx" / "model.safetensors", {"format": "pt"})
    lora = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    adapter = save_adapter(new_peft_model(OSS.load(place / "plain"), lora, 3), place / "adapter", copies=False)
    return place / "mx", place / "plain", adapter


def test_experts_in_mxfp4_become_the_plain_layout(gpt_oss: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, plain, _ = gpt_oss
    run_plan(make_plan(base, [], torch_dtype="float32"), tmp_path / "out")
    assert stored(tmp_path / "out") == stored(plain)
    with third_party():
        _, info = OSS.load_with_info(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_target_parameters_on_mxfp4_as_peft_on_floats(gpt_oss: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, plain, adapter = gpt_oss
    run_plan(make_plan(base, [adapter], torch_dtype="float32"), tmp_path / "out")
    with third_party():
        merged = load_peft(OSS.load(plain), adapter).merge_and_unload().state_dict()
    found = read(tmp_path / "out")
    for key in (*EXPERTS, "model.layers.0.self_attn.q_proj.weight"):
        exact, got = float64(merged[key]), float64(found[key])
        assert not np.array_equal(got, float64(read(plain)[key]))
        assert correctly_rounded(got, exact, float(np.abs(exact).max()) * 2.0**-20, "F32").all(), key
    assert verify(base, [adapter], tmp_path / "out", torch_dtype="float32", full=True).exact


@pytest.mark.parametrize("scales", ["reuse", "fresh"])
def test_experts_keep_mxfp4(scales: str, gpt_oss: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = gpt_oss
    quant = Quant(keep=True, scales=scales)
    run_plan(make_plan(base, [adapter], torch_dtype="float32"), tmp_path / "floats")
    run_plan(make_plan(base, [adapter], quant=quant), tmp_path / "out", accept_loss=True)
    merged, found, before = floats(tmp_path / "floats"), stored(tmp_path / "out"), stored(base)
    for key in EXPERTS:
        known = {"scales": np.frombuffer(before[f"{key}_scales"][2], np.uint8).reshape(before[f"{key}_scales"][1])}
        parts, settings = encode(MX, merged[key], known if scales == "reuse" else None)
        for part, array in typed(MX, parts, settings).items():
            assert found[f"{key}_{part}"][2] == array.tobytes(), (key, part)
        assert found[f"{key}_blocks"] != before[f"{key}_blocks"]
    assert verify(base, [adapter], tmp_path / "out", quant=quant, full=True).exact


# --- MLX ----------------------------------------------------------------------------------------------


def test_a_stack_of_mlx_is_decoded_under_its_own_names(tmp_path: Path) -> None:
    form = FORMS["mlx-4"]
    weight = np.random.default_rng(2).standard_normal((3, 8, 64)).astype(np.float32)
    parts, settings = encode(form, weight)
    key = "language_model.model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{key}.{part}": array for part, array in typed(form, parts, settings).items()}
    sections = dict.fromkeys(("quantization", "quantization_config"), form.file.config(settings, []))
    base = write_model(tmp_path / "base", {**tensors, "norm.weight": np.ones(8, BF16)}, config={**CONFIG, **sections})
    run_plan(make_plan(base, [], torch_dtype="float32"), tmp_path / "out")
    assert set(stored(tmp_path / "out")) == {f"{key}.weight", "norm.weight"}
    values = decode(form, parts, settings).reshape(weight.shape)
    assert np.array_equal(floats(tmp_path / "out")[f"{key}.weight"], once(values, "F32"))
    assert not sections.keys() & config_of(tmp_path / "out").keys()
    assert verify(base, [], tmp_path / "out", torch_dtype="float32", full=True).exact


def test_both_sections_of_mlx_say_what_is_no_longer_in_codes(tmp_path: Path) -> None:
    from quantised_bases import TOUCHED, write_coded, write_lora

    base = write_coded(tmp_path / "base", "mlx-4", quantization={"group_size": 32, "bits": 4, "mode": "affine"})
    quant = Quant(keep=True, keep_16bit="q_proj$")
    run_plan(make_plan(base.path, [write_lora(tmp_path / "adapter")], quant=quant), tmp_path / "out", accept_loss=True)
    config = config_of(tmp_path / "out")
    for section in ("quantization", "quantization_config"):
        assert config[section][TOUCHED[0]] is False and "quant_method" not in config[section]


# --- indexes of real checkpoints ---------------------------------------------------------------------

INDEXES = Path(__file__).parents[2] / "shared" / "data" / "indexes"  # beside the repository, where there are any
needs_indexes = pytest.mark.skipif(not INDEXES.is_dir(), reason="no indexes of real checkpoints here")
Stored = tuple[str, list[int]]


def sparse(place: Path, name: str, shape_of: Callable[[str, dict[str, Any]], Stored], small: dict[str, bytes]) -> Path:
    """A checkpoint with the files, names and shapes of a real one, whose data are holes but for the small tensors."""
    config = json.loads((INDEXES / name / "config.json").read_text())
    index = json.loads((INDEXES / name / "model.safetensors.index.json").read_text())
    place.mkdir()
    for file in ("config.json", "model.safetensors.index.json"):
        (place / file).write_bytes((INDEXES / name / file).read_bytes())
    for file in sorted(set(index["weight_map"].values())):
        at, header, written = 0, {}, []
        for key in (k for k, f in index["weight_map"].items() if f == file):
            data = next((value for end, value in small.items() if key.endswith(end)), None)
            dtype, shape = shape_of(key, config) if data is None or not data.startswith(b"{") else ("U8", [len(data)])
            nbytes = math.prod(shape) * {"F32": 4, "U32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}[dtype]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
            written += [(at, data)] if data is not None else []
            at += nbytes
        raw = raw_file(header)
        with open(place / file, "wb") as out:
            out.write(raw)
            os.truncate(place / file, len(raw) + at)
            for start, data in written:
                out.seek(len(raw) + start)
                out.write(data)
    return place


def _gpt_oss_shape(key: str, config: dict[str, Any]) -> Stored:
    h, i, e, d = (config[n] for n in ("hidden_size", "intermediate_size", "num_local_experts", "head_dim"))
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    table: list[tuple[str, Stored]] = [
        ("gate_up_proj_blocks", ("U8", [e, 2 * i, h // 32, 16])), ("gate_up_proj_scales", ("U8", [e, 2 * i, h // 32])),
        ("down_proj_blocks", ("U8", [e, h, i // 32, 16])), ("down_proj_scales", ("U8", [e, h, i // 32])),
        ("gate_up_proj_bias", ("BF16", [e, 2 * i])), ("down_proj_bias", ("BF16", [e, h])),
        ("q_proj.weight", ("BF16", [q, h])), ("q_proj.bias", ("BF16", [q])), ("o_proj.weight", ("BF16", [h, q])),
        ("k_proj.weight", ("BF16", [kv, h])), ("v_proj.weight", ("BF16", [kv, h])),
        ("k_proj.bias", ("BF16", [kv])), ("v_proj.bias", ("BF16", [kv])), ("o_proj.bias", ("BF16", [h])),
        ("sinks", ("BF16", [config["num_attention_heads"]])), ("router.weight", ("BF16", [e, h])),
        ("router.bias", ("BF16", [e])), ("embed_tokens.weight", ("BF16", [config["vocab_size"], h])),
        ("lm_head.weight", ("BF16", [config["vocab_size"], h])), ("norm.weight", ("BF16", [h])),
    ]  # fmt: skip
    return next(found for end, found in table if key.endswith(end))


def _llama_shape(key: str, config: dict[str, Any]) -> Stored:
    h, i, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * config["head_dim"]
    if key.endswith(("embed_tokens.weight", "lm_head.weight")):
        return "F32", [config["vocab_size"], h]
    if key.endswith("norm.weight"):
        return "F32", [h]
    if key.endswith("weight_format"):
        return "U8", []
    sides = {"q": (h, h), "o": (h, h), "k": (kv, h), "v": (kv, h), "gate": (i, h), "up": (i, h), "down": (h, i)}
    out, inputs = sides[key.split(".")[4].removesuffix("_proj")]
    return ("F32", [out]) if key.endswith("SCB") else ("I8", [out, inputs])


MOLMO = {"att_proj": (4608, 3584), "attn_out": (3584, 3584), "ff_out": (3584, 18944), "ff_proj": (37888, 3584)}


def _molmo_shape(key: str, config: dict[str, Any]) -> Stored:
    found = re.search(r"blocks\.\d+\.(\w+)\.weight(.*)", key)
    if found and found[1] in MOLMO:
        count = math.prod(MOLMO[found[1]])
        return {
            "": ("U8", [count // 2, 1]), ".absmax": ("F32", [count // 64]), ".quant_map": ("F32", [16])
        }[found[2]]  # fmt: skip
    if key == "model.transformer.ff_out.weight":
        return "F16", [152064, 3584]
    return ("F16", [128, 3584]) if key.endswith("embedding") else ("F16", [64])


def _molmo_states() -> dict[str, bytes]:
    states = {"quant_map": np.array(bnb4.TABLES["nf4"], np.float32).tobytes()}
    for name, shape in MOLMO.items():
        text = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(shape)}
        states[f"{name}.weight.quant_state.bitsandbytes__nf4"] = json.dumps(text).encode()
    return states


def _mlx_shape(key: str, config: dict[str, Any]) -> Stored:
    t = config["text_config"]
    h, e, i, heads = t["hidden_size"], t["n_routed_experts"], t["moe_intermediate_size"], t["num_attention_heads"]
    nope, rope, v = t["qk_nope_head_dim"], t["qk_rope_head_dim"], t["v_head_dim"]
    module, _, part = key.rpartition(".")
    sides: list[tuple[str, list[int]]] = [
        ("switch_mlp.gate_proj", [e, i, h]), ("switch_mlp.up_proj", [e, i, h]), ("switch_mlp.down_proj", [e, h, i]),
        ("shared_experts.gate_proj", [i, h]), ("shared_experts.up_proj", [i, h]),
        ("shared_experts.down_proj", [h, i]), ("lm_head", [t["vocab_size"], h]), ("embed_tokens", [t["vocab_size"], h]),
        ("embed_q", [heads, t["kv_lora_rank"], nope]), ("unembed_out", [heads, v, t["kv_lora_rank"]]),
        ("kv_a_proj_with_mqa", [t["kv_lora_rank"] + rope, h]), ("o_proj", [h, heads * v]),
        ("q_a_proj", [t["q_lora_rank"], h]), ("q_b_proj", [heads * (nope + rope), t["q_lora_rank"]]),
    ]  # fmt: skip
    shape = next((s for end, s in sides if module.endswith(end)), None)
    if shape is None:
        return "BF16", [e, h] if module.endswith("mlp.gate") else [h]
    if part == "weight":
        return "U32", [*shape[:-1], shape[-1] // 8]
    return "BF16", [*shape[:-1], shape[-1] // 64]


@pytest.fixture
def lora_on(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    def write(modules: dict[str, tuple[int, int]]) -> Path:
        tensors = {}
        for module, (out, inputs) in modules.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ones((2, inputs), np.float32)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ones((out, 2), np.float32)
        write_tensors(tmp_path / "lora" / "adapter_model.safetensors", tensors)
        write_json(tmp_path / "lora" / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4,
            "target_modules": [m.rpartition(".")[2] for m in modules], "bias": "none", "fan_in_fan_out": False,
        })  # fmt: skip
        return tmp_path / "lora"

    yield write


@needs_indexes
@pytest.mark.parametrize(
    ("name", "shape_of", "small", "coded", "module", "sides"),
    [
        ("gpt-oss-20b", _gpt_oss_shape, {}, 48, "model.layers.0.self_attn.q_proj", (4096, 2880)),
        ("Llama-3.1-8B_bnb-8bit", _llama_shape, {}, 224, "model.layers.3.mlp.down_proj", (4096, 14336)),
        ("Molmo-7B-D_nf4", _molmo_shape, _molmo_states(), 112, "model.transformer.blocks.5.att_proj", (4608, 3584)),
        (
            "Mistral3-24B_fp8", _mlx_shape, {}, 434,
            "language_model.model.layers.2.self_attn.q_a_proj", (1024, 4096),
        ),
    ],
)  # fmt: skip
def test_a_real_index_is_planned(
    name: str, shape_of: Any, small: dict[str, bytes], coded: int, module: str, sides: tuple[int, int], tmp_path: Path,
    lora_on: Callable[..., Path],
) -> None:  # fmt: skip
    base = sparse(tmp_path / "base", name, shape_of, small)
    adapter = lora_on({module: sides})
    plan = make_plan(base, [adapter], torch_dtype="bfloat16", max_memory="4GB")
    assert any(f"{coded} of " in note for note in plan.notes), plan.notes
    entry = plan.entries[f"{module}.weight"]
    assert entry.touched and entry.shape == sides
    parts = ("_blocks", "_scales", ".SCB", "weight_format", ".absmax", ".quant_map", "__nf4", ".scales", ".biases")
    assert not any(key.endswith(parts) for key in plan.entries)
    assert all(e.dtype.name == "BF16" for e in plan.entries.values())
    written = sum(e.nbytes for s in plan.shards for e in s.entries)
    assert plan.cost.written >= written and max(sum(e.nbytes for e in s.entries) for s in plan.shards) < 6_000_000_000
    assert plan.index is not None and set(plan.index["weight_map"]) == set(plan.entries)
    kept = make_plan(base, [adapter], quant=Quant(keep=True), max_memory="4GB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert set(kept.entries) == set(index["weight_map"]) and len(kept.shards) == len(set(index["weight_map"].values()))
