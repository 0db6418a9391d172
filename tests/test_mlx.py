"""Adapters of MLX: transposed pairs, their own scaling, magnitudes, against the formulas of mlx-lm in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import families  # noqa: F401  (its models)
import inlay
from cases import Kit
from inlay.errors import AdapterError, PlanError
from oracle import correctly_rounded, float64, reach, read

MODULES = ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def make(path: Path, base: Path, config: dict[str, Any], dora: bool = False, rank: int = 3) -> dict[str, torch.Tensor]:
    """An adapter on two layers of the base, one of them not square."""
    generator = torch.Generator().manual_seed(4)
    weights = read(base)
    tensors = {}
    for module in MODULES:
        out, in_ = weights[module + ".weight"].shape
        tensors[module + ".lora_a"] = torch.randn(in_, rank, generator=generator)
        tensors[module + ".lora_b"] = torch.randn(rank, out, generator=generator)
        if dora:
            tensors[module + ".m"] = torch.rand(out, generator=generator) + 0.5
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rank": 3, "scale": 20.0, "dropout": 0.0}, 20.0),
        ({"rank": 3, "scale": 0.7, "alpha": 16}, 0.7),  # the scale outranks alpha
        ({"rank": 3, "alpha": 6}, 2.0),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_merge_is_the_formula_of_mlx_rounded_once(
    kit: Kit, tmp_path: Path, dtype: str, parameters: dict[str, Any], scaling: float
) -> None:
    base = kit.base("qwen2", dtype)
    given = make(tmp_path / "a", base, {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters})
    inlay.run_plan(inlay.make_plan(base, [tmp_path / "a"]), tmp_path / "out")
    before, merged = read(base), read(tmp_path / "out")
    for key, tensor in merged.items():
        weight, module = float64(before[key]), key.removesuffix(".weight")
        exact = weight
        if module in MODULES:
            exact = weight + scaling * (float64(given[module + ".lora_a"]) @ float64(given[module + ".lora_b"])).T
        error = reach(exact, weight) if module in MODULES else 0.0
        assert correctly_rounded(float64(tensor), exact, error, dtype).all(), key
        assert (module in MODULES) != np.array_equal(float64(tensor), weight)
    assert inlay.verify(base, [tmp_path / "a"], tmp_path / "out").exact


@pytest.mark.parametrize("config", [{"fine_tune_type": "dora"}, {"use_dora": True}])
def test_dora_gives_each_output_its_length(kit: Kit, tmp_path: Path, config: dict[str, Any]) -> None:
    base = kit.base("qwen2")
    given = make(tmp_path / "a", base, {**config, "lora_parameters": {"rank": 3, "scale": 2.0}}, dora=True)
    inlay.run_plan(inlay.make_plan(base, [tmp_path / "a"]), tmp_path / "out")
    before, merged = read(base), read(tmp_path / "out")
    for module in MODULES:
        weight = float64(before[module + ".weight"])
        sum_ = weight + 2.0 * (float64(given[module + ".lora_a"]) @ float64(given[module + ".lora_b"])).T
        exact = float64(given[module + ".m"])[:, None] * sum_ / np.linalg.norm(sum_, axis=1, keepdims=True)
        assert correctly_rounded(float64(merged[module + ".weight"]), exact, reach(exact, weight), "F32").all()


@pytest.mark.parametrize("factor", ["lora_b", "all", "none"])
def test_an_adapter_of_zeros_is_worth_a_warning(kit: Kit, tmp_path: Path, factor: str) -> None:
    """MLX starts lora_a at random and lora_b at zero, so an untrained adapter has the second at zero only."""
    base, path = kit.base("qwen2"), tmp_path / "a"
    given = make(path, base, {"lora_parameters": {"rank": 3, "scale": 2.0}})
    zeros = {k: 0 * t if factor == "all" or k.endswith(factor) else t for k, t in given.items()}
    save_file(zeros, path / "adapters.safetensors")
    warnings = inlay.make_plan(base, [path]).warnings
    assert warnings == (() if factor == "none" else ("a is zero everywhere: the merged weights equal the base",))


def test_a_full_copy_of_zeros_does_not_equal_the_base(kit: Kit, tmp_path: Path) -> None:
    base, path = kit.base("qwen2"), tmp_path / "a"
    path.mkdir()
    save_file({"model.norm.weight": torch.zeros(16)}, path / "adapters.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    assert not inlay.make_plan(base, [path]).warnings


def test_full_fine_tuning_replaces_the_tensors(kit: Kit, tmp_path: Path) -> None:
    base, path = kit.base("qwen2"), tmp_path / "a"
    path.mkdir()
    new = torch.randn_like(read(base)["model.norm.weight"])
    save_file({"model.norm.weight": new}, path / "adapters.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    inlay.run_plan(inlay.make_plan(base, [path]), tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["model.norm.weight"], new)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "prefix", "lora_parameters": {"rank": 3, "scale": 1.0}}, "fine_tune_type 'prefix'"),
        ({"lora_parameters": {"rank": 3}}, "neither scale nor alpha"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "rank must be a positive integer"),
        ({"lora_parameters": {"rank": 3, "scale": "big"}}, "scale must be a number"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0, "rank_pattern": {}}}, "rank_pattern"),
        ({"lora_parameters": [3]}, "must be an object"),
    ],
)
def test_a_config_that_does_not_say_what_is_needed_is_refused(
    kit: Kit, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    make(tmp_path / "a", kit.base("qwen2"), config)
    with pytest.raises(AdapterError, match=message):
        inlay.read_adapter(tmp_path / "a")


def test_a_pair_that_does_not_fit_is_refused(kit: Kit, tmp_path: Path) -> None:
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 1.0}}
    make(tmp_path / "a", kit.base("llama"), config)
    tensors = read(tmp_path / "a" / "adapters.safetensors")
    key = MODULES[1] + ".lora_a"
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, tmp_path / "a" / "adapters.safetensors")
    with pytest.raises(PlanError, match="lora_a"):
        inlay.make_plan(kit.base("llama"), [tmp_path / "a"])
    config["lora_parameters"]["rank"] = 4
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="rank 3 in the file, 4 in the config"):
        inlay.make_plan(kit.base("llama"), [tmp_path / "a"])


def test_a_rank_beyond_any_number_is_refused(kit: Kit, tmp_path: Path) -> None:
    base = kit.base("qwen2")
    make(tmp_path / "a", base, {"fine_tune_type": "lora", "lora_parameters": {"rank": 10**400, "scale": 2.0}})
    with pytest.raises(AdapterError, match="rank must be a positive integer"):
        inlay.make_plan(base, [tmp_path / "a"])


def test_pairs_of_a_full_fine_tune_are_refused(kit: Kit, tmp_path: Path) -> None:
    """mlx-lm loads none of them; they were merged with strength 0."""
    base = kit.base("qwen2")
    make(tmp_path / "a", base, {"fine_tune_type": "full", "lora_parameters": {"rank": 3}})
    with pytest.raises(AdapterError, match="holds pairs"):
        inlay.make_plan(base, [tmp_path / "a"])


def test_a_pair_on_an_embedding_is_refused(kit: Kit, tmp_path: Path) -> None:
    """lora_a is (vocabulary, r): where the vocabulary is as wide as the model it was merged transposed."""
    base, path = kit.copy_of(kit.base("qwen2"), tmp_path), tmp_path / "a"
    make(path, base, {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.0}})
    for file in base.glob("*.safetensors"):
        tensors = read(file)
        for key in [k for k in tensors if k in ("model.embed_tokens.weight", "lm_head.weight")]:
            save_file({**tensors, key: tensors[key][:16].clone()}, file, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 16}))
    pair = {"model.embed_tokens.lora_a": torch.ones(16, 3), "model.embed_tokens.lora_b": torch.ones(3, 16)}
    save_file(pair, path / "adapters.safetensors")
    with pytest.raises(PlanError, match="on an embedding"):
        inlay.make_plan(base, [path])


def test_a_pair_on_a_module_of_a_fused_tensor_lies_as_any_other(kit: Kit, tmp_path: Path) -> None:
    base, path, rank = kit.base("nomicbert"), tmp_path / "a", 16  # as wide as the layer: the shapes do not tell
    generator = torch.Generator().manual_seed(3)
    name = "layers.0.self_attn.v_proj"
    a, b = (torch.randn(16, 16, generator=generator) for _ in range(2))
    path.mkdir()
    save_file({name + ".lora_a": a, name + ".lora_b": b}, path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": rank, "scale": 1.0}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    inlay.run_plan(inlay.make_plan(base, [path]), tmp_path / "out")
    key = "encoder.layers.0.attn.Wqkv.weight"
    weight, merged = float64(read(base)[key]), float64(read(tmp_path / "out")[key])
    exact = weight.copy()
    exact[32:] += (float64(a) @ float64(b)).T
    assert correctly_rounded(merged, exact, reach(exact, weight), "F32").all()
