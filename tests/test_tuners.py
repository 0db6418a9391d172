"""Methods beyond LoRA, from the adapter's directory to the merged one, against PEFT in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from cases import MODELS, Kit, load_peft, save_adapter, third_party
from inlay.adapters.peft_config import MERGED_TYPES
from inlay.dtypes import DTYPES
from inlay.errors import AdapterError, PlanError
from inlay.tuners import dense
from inlay.tuners.refused import REFUSED_TYPES
from oracle import correctly_rounded, float64, peft_merged, read, same_bytes

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# float64 in two orders: a few hundred roundings of 2^-53, relative to the largest number that takes part
FLOAT64 = 1e-12
# where PEFT itself computes in float32 whatever the type: Fourier transforms, QR, logits won back from weights
FLOAT32 = 2.0**-20
PEFTS_DIGITS = 1e-10  # where PEFT's numbers for a wavelet have 12 digits
DECOMPOSED32 = 2.0**-17  # where it also decomposes the weight in float32, and refuses float64


@dataclass(frozen=True)
class Row:
    """A method on a model: PEFT's config class, its fields, and how far from 1 its parameters are drawn."""

    name: str
    config: str
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    size: float = 0.4
    oracle: float = FLOAT64
    peft_in: str = "F64"


# PEFT holds LoHa's scaling in float32, so the rows here have one that float32 holds.
ROWS = (
    Row("adalora", "AdaLoraConfig", "qwen2", {"target_modules": LINEAR, "init_r": 4, "lora_alpha": 6, "total_step": 10}),
    Row("ia3", "IA3Config", "qwen2", {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}),
    Row("ia3-conv1d", "IA3Config", "gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    Row("ia3-conv", "IA3Config", "conv", {"target_modules": ["conv2d", "point", "conv3d", "out"], "feedforward_modules": ["point", "conv3d"]}),
    Row("ia3-conv-pattern", "IA3Config", "conv", {"target_modules": "point|conv2d|conv3d", "feedforward_modules": "conv2d"}),
    Row("loha", "LoHaConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "alpha": 6}),
    Row("loha-patterns", "LoHaConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9}}),
    Row("loha-conv", "LoHaConfig", "conv", {"target_modules": ["conv2d", "point", "conv1d", "out"], "r": 2, "alpha": 3}),
    Row("loha-core", "LoHaConfig", "conv", {"target_modules": ["conv2d", "out"], "r": 2, "alpha": 3, "use_effective_conv2d": True}),
    Row("lokr", "LoKrConfig", "qwen2", {"target_modules": LINEAR, "r": 2, "alpha": 5}),
    Row("lokr-both", "LoKrConfig", "qwen2", {"target_modules": LINEAR, "r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4}),
    Row("lokr-full", "LoKrConfig", "qwen2", {"target_modules": LINEAR, "r": 64, "alpha": 5}),
    Row("lokr-conv", "LoKrConfig", "conv", {"target_modules": ["conv2d", "point", "conv1d", "out"], "r": 1, "alpha": 3}),
    Row("lokr-core", "LoKrConfig", "conv", {"target_modules": ["conv2d"], "r": 1, "alpha": 3, "use_effective_conv2d": True}),
    Row("oft", "OFTConfig", "qwen2", {"target_modules": LINEAR, "oft_block_size": 4, "use_cayley_neumann": False}),
    Row("oft-neumann", "OFTConfig", "qwen2", {"target_modules": LINEAR, "oft_block_size": 8}),
    Row("oft-neumann-2", "OFTConfig", "qwen2", {"target_modules": LINEAR, "oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    Row("oft-neumann-7", "OFTConfig", "qwen2", {"target_modules": LINEAR, "oft_block_size": 4, "num_cayley_neumann_terms": 7}, 0.1),
    Row("oft-shared", "OFTConfig", "qwen2", {"target_modules": LINEAR, "oft_block_size": 4, "block_share": True}),
    Row("oft-coft", "OFTConfig", "qwen2", {"target_modules": LINEAR[:6], "oft_block_size": 4, "coft": True, "eps": 0.25}),
    Row("vera", "VeraConfig", "qwen2", {"target_modules": LINEAR, "r": 5}),
    Row("vera-drawn", "VeraConfig", "qwen2", {"target_modules": LINEAR, "r": 5, "save_projection": False, "projection_prng_key": 42}),
    Row("fourierft", "FourierFTConfig", "qwen2", {"target_modules": LINEAR, "n_frequency": 20, "scaling": 64.0, "random_loc_seed": 5}, oracle=FLOAT32),
    Row("vblora", "VBLoRAConfig", "qwen2", {"target_modules": LINEAR, "r": 2, "num_vectors": 6, "vector_length": 4}),
    Row("vblora-topk", "VBLoRAConfig", "qwen2", {"target_modules": LINEAR, "r": 2, "num_vectors": 6, "vector_length": 4, "save_only_topk_weights": True}, oracle=FLOAT32),
    Row("c3a", "C3AConfig", "qwen2", {"target_modules": LINEAR, "block_size": 4}, oracle=FLOAT32),
    Row("shira", "ShiraConfig", "qwen2", {"target_modules": LINEAR, "r": 2}),
    Row("gralora", "GraloraConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "alpha": 6, "gralora_k": 2}),
    Row("delora", "DeloraConfig", "qwen2", {"target_modules": LINEAR, "r": 3}),
    Row("randlora", "RandLoraConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "randlora_alpha": 6}),
    Row("randlora-drawn", "RandLoraConfig", "qwen2", {"target_modules": LINEAR, "r": 5, "randlora_alpha": 6, "save_projection": False, "projection_prng_key": 42}, oracle=FLOAT32),
    Row("randlora-drawn-sparse", "RandLoraConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "randlora_alpha": 6, "save_projection": False, "projection_prng_key": 42, "sparse": True}),
    Row("randlora-drawn-very-sparse", "RandLoraConfig", "gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "r": 5, "save_projection": False, "projection_prng_key": 7, "very_sparse": True, "fan_in_fan_out": True}),
    Row("beft", "BeftConfig", "qwen2", {"target_modules": ["v_proj", "k_proj"]}),
    Row("boft", "BOFTConfig", "qwen2", {"target_modules": LINEAR, "boft_block_size": 4}),
    Row("deft", "DeftConfig", "qwen2", {"target_modules": LINEAR, "r": 3}, oracle=FLOAT32),
    Row("hira", "HiraConfig", "qwen2", {"target_modules": LINEAR, "r": 3}),
    Row("hra", "HRAConfig", "qwen2", {"target_modules": LINEAR, "r": 4}),
    Row("hra-gs", "HRAConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "apply_GS": True}),
    Row("miss", "MissConfig", "qwen2", {"target_modules": LINEAR, "r": 4}),
    Row("miss-remainder", "MissConfig", "qwen2", {"target_modules": LINEAR, "r": 5}),
    Row("miss-bat", "MissConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "init_weights": "bat"}),
    Row("miss-mini", "MissConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "mini_r": 2, "init_weights": "mini"}),
    Row("road", "RoadConfig", "qwen2", {"target_modules": LINEAR, "group_size": 4}),
    Row("pvera", "PveraConfig", "qwen2", {"target_modules": LINEAR, "r": 5}),
    Row("pvera-conv1d", "PveraConfig", "gpt2", {"target_modules": ["c_attn"], "r": 5, "fan_in_fan_out": True}),
    Row("pvera-drawn", "PveraConfig", "qwen2", {"target_modules": LINEAR, "r": 5, "save_projection": False, "projection_prng_key": 42}),
    Row("glora", "GloraConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "config_C": "none"}),
    Row("glora-vector", "GloraConfig", "qwen2", {"target_modules": LINEAR, "config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}),
    Row("glora-constant", "GloraConfig", "qwen2", {"target_modules": LINEAR, "config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    Row("glora-bias", "GloraConfig", "qwen2", {"target_modules": LINEAR, "config_A_B": "none", "config_C": "none"}),
    Row("glora-coupled", "GloraConfig", "qwen2", {"target_modules": LINEAR, "r": 3}),
    Row("glora-coupled-vector", "GloraConfig", "qwen2", {"target_modules": LINEAR, "config_A_B": "constant", "config_C": "vector", "config_D_E": "none"}),
    Row("glora-no-bias", "GloraConfig", "qwen2", {"target_modules": LINEAR[3:], "r": 3}),
    Row("supertuning", "SupertuningConfig", "qwen2", {"target_modules": LINEAR, "sparsity": 0.9}),
    Row("supertuning-bottom", "SupertuningConfig", "qwen2", {"target_modules": LINEAR, "sparsity": 0.7, "select_top": False}),
    Row("supertuning-pair", "SupertuningConfig", "qwen2", {"target_modules": LINEAR, "sparsity": 0.9, "r": 3, "lora_alpha": 5}),
    Row("supertuning-alpha", "SupertuningConfig", "qwen2", {"target_modules": LINEAR, "sparsity": 0.9, "r": 3}),
    Row("waveft", "WaveFTConfig", "qwen2", {"target_modules": LINEAR, "n_frequency": 20}),
    Row("waveft-db10", "WaveFTConfig", "qwen2", {"target_modules": LINEAR, "n_frequency": 20, "wavelet_family": "db10", "scaling": 3.0, "random_loc_seed": 5}),
    Row("waveft-coif2", "WaveFTConfig", "gpt2", {"target_modules": ["c_attn"], "n_frequency": 20, "wavelet_family": "coif2", "fan_in_fan_out": True}),
    Row("waveft-coif4", "WaveFTConfig", "qwen2", {"target_modules": LINEAR, "n_frequency": 20, "wavelet_family": "coif4"}),
    Row("waveft-sym5", "WaveFTConfig", "qwen2", {"target_modules": LINEAR, "n_frequency": 20, "wavelet_family": "sym5"}, oracle=PEFTS_DIGITS),
    Row("waveft-direct", "WaveFTConfig", "qwen2", {"target_modules": LINEAR, "n_frequency": 20, "use_idwt": False}),
    Row("osf", "OSFConfig", "qwen2", {"target_modules": LINEAR}, 0.1, DECOMPOSED32, "F32"),
    Row("osf-patterns", "OSFConfig", "qwen2", {"target_modules": LINEAR, "effective_rank": 0.25, "rank_pattern": {"q_proj": 3, "up_proj": 15}}, 0.1, DECOMPOSED32, "F32"),
    Row("peanut", "PeanutConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "scaling": 0.7}),
    Row("peanut-deep", "PeanutConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "depth": 2, "act_fn": "gelu"}),
    Row("unilora", "UniLoraConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "theta_d_length": 40, "save_indices": True}),
    Row("unilora-conv1d", "UniLoraConfig", "gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "r": 3, "save_indices": True, "fan_in_fan_out": True}),
    Row("pissa", "LoraConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "lora_alpha": 6, "init_lora_weights": "pissa"}, 0.1, DECOMPOSED32, "F32"),
    Row("pissa-rslora", "LoraConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 1}}, 0.1, DECOMPOSED32, "F32"),
    Row("pissa-conv1d", "LoraConfig", "gpt2", {"target_modules": ["c_attn"], "r": 3, "lora_alpha": 6, "init_lora_weights": "pissa", "fan_in_fan_out": True}, 0.1, DECOMPOSED32, "F32"),
    Row("olora", "LoraConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "lora_alpha": 6, "init_lora_weights": "olora"}, 0.1, DECOMPOSED32, "F32"),
    Row("kasa", "LoraConfig", "qwen2", {"target_modules": LINEAR, "r": 3, "lora_alpha": 6, "kasa_config": "KasaConfig"}, 0.4, DECOMPOSED32, "F32"),
    Row("bdlora-a", "LoraConfig", "qwen2", {"target_modules": LINEAR, "r": 4, "lora_alpha": 6, "use_bdlora": {"target_modules_bd_a": ["q_proj", "up_proj"], "target_modules_bd_b": ["o_proj", "down_proj"], "nblocks": 2, "match_strict": False}}),
    Row("ln-tuning", "LNTuningConfig", "qwen2", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    Row("trainable-tokens", "TrainableTokensConfig", "qwen2", {"target_modules": ["embed_tokens"], "token_indices": [3, 1, 7]}),
)  # fmt: skip
NAMES = [row.name for row in ROWS]


def make(row: Row, kit: Kit, path: Path) -> Path:
    """An adapter of the row with random values, none of them neutral."""
    import peft
    import torch
    from peft.tuners import lora

    model = MODELS[row.model].load(kit.base(row.model))
    torch.manual_seed(3)
    fields = {k: getattr(lora, v)() if k == "kasa_config" else v for k, v in row.fields.items()}
    with third_party():
        adapted = peft.get_peft_model(model, getattr(peft, row.config)(**fields))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad or ".lora_E" in name or "lokr_" in name:
                p.add_(row.size * torch.randn(p.shape, generator=generator))
    return save_adapter(adapted, path, copies=False)


@pytest.fixture(scope="module")
def adapter(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(next(r for r in ROWS if r.name == name), kit, tmp_path_factory.mktemp("tuners") / name)
        return made[name]

    return get


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_pefts_float64_merge_rounded_once(
    kit: Kit, adapter: Callable[[str], Path], name: str, dtype: str, tmp_path: Path
) -> None:
    row = next(r for r in ROWS if r.name == name)
    base, path = kit.base(row.model, dtype), adapter(name)
    plan = inlay.make_plan(base, [path])
    inlay.run_plan(plan, tmp_path / "out")
    expected, before, merged = peft_merged(row.model, base, [path], row.peft_in), read(base), read(tmp_path / "out")
    assert merged.keys() == before.keys()
    changed = 0
    for key, tensor in merged.items():
        exact, weight = float64(expected[key]), float64(before[key])
        error = row.oracle * max(float(np.abs(exact).max()), float(np.abs(weight).max()))
        assert correctly_rounded(float64(tensor), exact, error, dtype).all(), key
        changed += not np.array_equal(float64(tensor), weight)
    assert changed, "the adapter did nothing, so this test could not fail"
    report = inlay.verify(base, [path], tmp_path / "out")
    assert report.ok and report.exact
    assert "B A" not in (tmp_path / "out" / "README.md").read_text(), "the card must not claim LoRA's formula"
    assert inlay.loads(inlay.dumps(plan)) == plan


@pytest.mark.parametrize("name", ["loha", "lokr-both", "oft", "ia3-conv1d", "vera"])
def test_threads_and_blocks_change_no_byte(
    kit: Kit, adapter: Callable[[str], Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(r for r in ROWS if r.name == name)
    plan = inlay.make_plan(kit.base(row.model, "BF16"), [adapter(name)])
    inlay.run_plan(plan, tmp_path / "one", workers=1)
    monkeypatch.setattr("inlay.plan.memory.FLOAT64_TILE_BYTES", 3000)
    inlay.run_plan(plan, tmp_path / "many", workers=8)
    assert same_bytes(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("name", ["miss", "miss-remainder", "miss-bat"])
def test_bone_of_older_peft_is_miss_under_its_old_name(
    kit: Kit, adapter: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path = kit.copy_of(adapter(name), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("mini_r", "miss_dropout", "peft_version")}
    (path / "adapter_config.json").write_text(json.dumps({**kept, "peft_type": "BONE"}))
    file = path / "adapter_model.safetensors"
    save_file({k.replace("miss_block", "bone_block"): t for k, t in read(file).items()}, file)
    for given, out in ((path, "bone"), (adapter(name), "now")):
        inlay.run_plan(inlay.make_plan(kit.base("qwen2"), [given]), tmp_path / out)
    assert same_bytes(tmp_path / "bone", tmp_path / "now")
    if name == "miss":  # PEFT 0.15: every r columns get the block
        key = "model.layers.0.mlp.down_proj"
        block = float64(read(file)[f"base_model.model.{key}.bone_block"])
        exact = float64(read(kit.base("qwen2"))[key + ".weight"]) + np.tile(block.T, (1, 24 // len(block)))
        stored = float64(read(tmp_path / "bone")[key + ".weight"])
        assert correctly_rounded(stored, exact, FLOAT64 * float(np.abs(exact).max()), "F32").all()


def test_two_methods_on_one_layer_act_in_turn(kit: Kit, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    """LoHa adds to the weight, IA3 then scales the sum: what two merges one after the other give."""
    base, one, two = kit.base("qwen2"), adapter("loha"), adapter("ia3")
    plan = inlay.make_plan(base, [one, two])
    assert plan.order_matters
    inlay.run_plan(plan, tmp_path / "both")
    first = peft_merged("qwen2", base, [one], "F64")
    scale = read(two / "adapter_model.safetensors")
    merged = read(tmp_path / "both")
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        factor = float64(scale[f"base_model.model.{module}.ia3_l"])
        exact = float64(first[module + ".weight"]) * factor
        error = FLOAT64 * float(np.abs(exact).max())
        assert correctly_rounded(float64(merged[module + ".weight"]), exact, error, "F32").all()


@pytest.mark.parametrize("name", ["glora", "glora-coupled"])
def test_two_gloras_take_their_shares_of_the_original(
    kit: Kit, adapter: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """W' = W + W∘A₁ + B₁ + W∘A₂ + B₂, the bias likewise: what the model with both computes."""
    import shutil

    base, one = kit.base("qwen2"), adapter(name)
    two = Path(shutil.copytree(one, tmp_path / "two"))
    inlay.run_plan(inlay.make_plan(base, [one, two]), tmp_path / "out")
    once, before, merged = peft_merged("qwen2", base, [one], "F64"), read(base), read(tmp_path / "out")
    biases = 0
    for key, tensor in merged.items():
        exact = 2 * float64(once[key]) - float64(before[key])
        assert correctly_rounded(float64(tensor), exact, FLOAT64 * float(np.abs(exact).max()), "F32").all(), key
        biases += key.endswith("bias") and not np.array_equal(float64(tensor), float64(before[key]))
    assert biases, "the bias must take part"


def test_a_changed_byte_is_found(kit: Kit, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    from oracle import shard_files

    base, path, out = kit.base("qwen2", "BF16"), adapter("oft"), tmp_path / "out"
    inlay.run_plan(inlay.make_plan(base, [path]), out)
    file = shard_files(out)[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x10
    file.write_bytes(data)
    assert not inlay.verify(base, [path], out).ok


@pytest.mark.parametrize("name", ["ia3", "oft"])
def test_a_weight_on_what_is_no_sum_is_refused(kit: Kit, adapter: Callable[[str], Path], name: str) -> None:
    with pytest.raises(PlanError, match=r"0\.5 has no meaning"):
        inlay.make_plan(kit.base("qwen2"), [adapter(name)], weights=[0.5])


def test_a_weight_scales_a_sum(kit: Kit, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    base, path = kit.base("qwen2"), adapter("lokr")
    inlay.run_plan(inlay.make_plan(base, [path], weights=[-0.5]), tmp_path / "out")
    expected, before, merged = peft_merged("qwen2", base, [path], "F64"), read(base), read(tmp_path / "out")
    key = "model.layers.1.mlp.up_proj.weight"
    exact = float64(before[key]) - 0.5 * (float64(expected[key]) - float64(before[key]))
    assert correctly_rounded(float64(merged[key]), exact, FLOAT64 * float(np.abs(exact).max()), "F32").all()


def test_vera_without_its_projections_and_without_saying_so_is_refused(
    kit: Kit, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    path = kit.copy_of(adapter("vera-drawn"), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "save_projection": True}))
    with pytest.raises(PlanError, match="save_projection=True"):
        inlay.make_plan(kit.base("qwen2"), [path])


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_projections_are_drawn_as_torch_draws_them(seed: int, dtype: str) -> None:
    import torch

    from inlay.tuners.torch_random import uniform

    generator = torch.Generator("cpu").manual_seed(seed)
    ours = np.random.RandomState(seed)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    upper = 0
    for shape, bound in (((3, 7), 0.3), ((40, 500), 2.0), ((1, 700), 1e-3), ((30, 1, 70000), 0.25)):
        theirs = torch.empty(shape, dtype=kind).uniform_(-bound, bound, generator=generator).float().numpy()
        drawn = uniform(ours, shape, -bound, bound, DTYPES[dtype])
        assert np.array_equal(theirs, drawn), shape
        upper += int((drawn == -bound).sum())
    assert upper or dtype == "F32", "numbers that round to the upper bound become the lower"


@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("rank", [7, 64])
def test_randlora_draws_what_peft_draws(kind: str, rank: int) -> None:
    """Bit for bit, also where a deviation is of a million numbers."""
    import peft
    import torch

    from inlay.tuners import randlora

    network = torch.nn.Sequential(torch.nn.Linear(600, 900), torch.nn.Linear(900, 1700))
    fields = {"projection_prng_key": 5, "save_projection": False, **({} if kind == "dense" else {kind: True})}
    with third_party():
        config = peft.RandLoraConfig(r=rank, target_modules=["0", "1"], **fields)
        theirs = peft.get_peft_model(network, config, autocast_adapter_dtype=False).base_model
    settings = {**randlora.settings({**config.to_dict()}, rank, None), "largest": [1700, 900]}
    ours = randlora._drawn(settings["key"], settings["drawn"], *randlora.drawn_shapes(settings))
    for name, drawn in zip(("randlora_A", "randlora_B"), ours, strict=True):
        assert np.array_equal(getattr(theirs, name)["default"].float().numpy(), drawn), name


def test_memory_counts_what_is_drawn_again(kit: Kit, adapter: Callable[[str], Path]) -> None:
    """A (r, 1, 24) and B (24, ⌈24 / r⌉, r), whether they are read or drawn."""
    from inlay.plan.memory import tile

    for name, rank in (("randlora", 4), ("randlora-drawn", 5)):
        entry = inlay.make_plan(kit.base("qwen2"), [adapter(name)]).entries["model.layers.1.mlp.up_proj.weight"]
        count, all_of_them = -(-16 // rank), -(-24 // rank)
        own = rank * count + count * 16
        assert tile(entry, kernel=False).shared == 16 * (own + rank * 24 + 24 * all_of_them * rank), name


@pytest.mark.parametrize("pattern", ["(point", "((a|aa)+)+b" + "x" * 9, None, 5])
def test_ia3_on_a_convolution_needs_to_know_what_it_scales(
    kit: Kit, adapter: Callable[[str], Path], pattern: Any, tmp_path: Path
) -> None:
    path = kit.copy_of(adapter("ia3-conv"), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "feedforward_modules": pattern}))
    with pytest.raises(PlanError, match=r"feedforward_modules|numbers for"):
        inlay.make_plan(kit.base("conv"), [path])


@pytest.mark.parametrize("version", [None, "0.17.1"])
def test_oft_of_older_peft_is_merged_as_it_was_trained(
    kit: Kit, adapter: Callable[[str], Path], version: str | None, tmp_path: Path
) -> None:
    """I + 2Q + 2Q² + 2Q³ + 2Q⁴; the plan says that PEFT of today would merge another weight."""
    path = kit.copy_of(adapter("oft-neumann"), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
    plan = inlay.make_plan(kit.base("qwen2"), [path])
    assert [n for n in plan.notes if "later versions halve its last term" in n]
    assert not inlay.make_plan(kit.base("qwen2"), [adapter("oft-neumann")]).notes
    inlay.run_plan(plan, tmp_path / "out")
    module = "model.layers.1.mlp.down_proj"
    weight, blocks = float64(read(kit.base("qwen2"))[module + ".weight"]), []
    for vector in float64(read(path / "adapter_model.safetensors")[f"base_model.model.{module}.oft_R.weight"]):
        skew = np.zeros((8, 8))
        skew[np.triu_indices(8, 1)] = vector
        skew -= skew.T
        blocks.append(np.eye(8) + 2 * sum(np.linalg.matrix_power(skew, n) for n in range(1, 5)))
    exact = np.concatenate([weight[:, 8 * i : 8 * i + 8] @ r.T for i, r in enumerate(blocks)], axis=1)
    merged = float64(read(tmp_path / "out")[module + ".weight"])
    assert correctly_rounded(merged, exact, FLOAT64 * float(np.abs(exact).max()), "F32").all()


def test_randlora_that_is_drawn_again_says_so(kit: Kit, adapter: Callable[[str], Path]) -> None:
    for name, said in (("randlora-drawn", 1), ("randlora-drawn-sparse", 0), ("randlora", 0)):
        notes = inlay.make_plan(kit.base("qwen2"), [adapter(name)]).notes
        assert len([n for n in notes if "drawn again in bfloat16" in n]) == said, name


def test_oft_on_a_large_kernel_is_refused(kit: Kit, tmp_path: Path) -> None:
    row = Row("oft", "OFTConfig", "conv", {"target_modules": ["conv2d"], "oft_block_size": 6})
    with pytest.raises(PlanError, match="kernel larger than 1"):
        inlay.make_plan(kit.base("conv"), [make(row, kit, tmp_path / "a")])


def test_an_adapter_for_other_widths_is_refused(kit: Kit, adapter: Callable[[str], Path]) -> None:
    for name in ("loha", "lokr", "oft", "ia3", "vera", "adalora"):
        with pytest.raises(PlanError) as error:
            inlay.make_plan(kit.base("gpt2"), [adapter(name)])
        assert "reaches nothing" in str(error.value)


def test_a_whole_matrix_that_does_not_fit_under_the_cap_is_refused(kit: Kit, adapter: Callable[[str], Path]) -> None:
    with pytest.raises(PlanError, match="max_memory"):
        inlay.make_plan(kit.base("gpt2"), [adapter("ia3-conv1d")], max_memory=20_000)
    inlay.make_plan(kit.base("qwen2"), [adapter("oft")], max_memory=20_000)  # works row by row


def test_every_method_of_peft_is_merged_or_refused_with_a_reason() -> None:
    from peft.utils.peft_types import PeftType

    known = {t.value for t in PeftType}
    assert known == (MERGED_TYPES | REFUSED_TYPES.keys()) & known  # BONE is gone from PEFT
    assert not MERGED_TYPES & REFUSED_TYPES.keys()
    assert all(len(why) > 30 for why in REFUSED_TYPES.values())
    assert len({row.config for row in ROWS}) == len(set(dense.FILES.values())) + 3, (
        "a method without a row in the table"
    )
    assert {row.name.partition("-")[0] for row in ROWS} >= dense.VARIANTS - {"qalora"}, "which test_qalora.py has"


@pytest.mark.parametrize("kind", sorted(REFUSED_TYPES))
def test_a_method_that_cannot_be_merged_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(AdapterError, match=kind):
        inlay.read_adapter(tmp_path)


def test_a_field_that_a_method_does_not_know_is_refused(
    adapter: Callable[[str], Path], kit: Kit, tmp_path: Path
) -> None:
    path = kit.copy_of(adapter("loha"), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "use_secret": True}))
    with pytest.raises(AdapterError, match="use_secret"):
        inlay.read_adapter(path)


def test_inspect_claims_no_rank_and_no_scaling_for_methods_without(adapter: Callable[[str], Path]) -> None:
    from inlay.cli.inspect import inspect_path

    facts = inspect_path(adapter("oft"))
    assert facts["tuner"] == "oft" and not facts["rank"] and not facts["alpha"] and not facts["scaling"]
    facts = inspect_path(adapter("loha-patterns"))
    assert facts["rank"] == [2, 3] and facts["alpha"] == [6.0, 9.0] and not facts["scaling"]
    facts = inspect_path(adapter("pissa"))
    assert facts["tuner"] == "pissa" and facts["rank"] == [3] and facts["scaling"] == [2.0]


@pytest.mark.parametrize("name", ["shira", "randlora"])
def test_parts_that_fit_both_ways_are_not_placed_by_a_guess(
    adapter: Callable[[str], Path], kit: Kit, tmp_path: Path, name: str
) -> None:
    """Their shapes do not tell (out, in) from (in, out), not even where the weight is not square."""
    path = kit.copy_of(adapter(name), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    with pytest.raises(PlanError, match="orientation cannot be known") as error:
        inlay.make_plan(kit.base("qwen2"), [path])
    assert "down_proj" in {p.where.rpartition(".")[2] for p in error.value.problems}, "that one is not square"


def test_peft_loads_what_the_table_makes(adapter: Callable[[str], Path], kit: Kit) -> None:
    """The oracle's adapters act: their logits differ from the base's."""
    import torch

    for row in ROWS:
        model = MODELS[row.model].load(kit.base(row.model))
        before = MODELS[row.model](model)
        after = MODELS[row.model](load_peft(model, adapter(row.name)))
        assert not torch.allclose(before, after), row.name


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "BOOL"])
@pytest.mark.parametrize("name", ["lokr", "oft", "vera", "trainable-tokens"])
def test_parts_that_are_no_floats_are_refused(
    kit: Kit, adapter: Callable[[str], Path], name: str, dtype: str, tmp_path: Path
) -> None:
    """Read as if they were numbers (F8: eight bytes for each code), they made weights that `verify` passed."""
    import torch
    from safetensors.torch import save_file

    kinds = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "BOOL": torch.bool}
    path = kit.copy_of(adapter(name), tmp_path)
    file = path / "adapter_model.safetensors"
    tensors = read(file)
    first = min(tensors, key=lambda k: (not k.endswith("vera_A"), k))
    save_file({**tensors, first: tensors[first].to(kinds[dtype])}, file)
    with pytest.raises(PlanError, match=f"adapter tensors of type {dtype}"):
        inlay.make_plan(kit.base("qwen2"), [path])


@pytest.mark.parametrize("shape", [(), (0,), (16,), (0, 16), (16, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_a_base_whose_weight_is_no_matrix_is_merged_around_or_refused(
    kit: Kit, adapter: Callable[[str], Path], name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    row = next(r for r in ROWS if r.name == name)
    base = kit.copy_of(kit.base(row.model), tmp_path)
    tried = 0
    for file in sorted(base.glob("*.safetensors")):
        tensors = read(file)
        for key in [
            k for k in tensors if k.endswith(("0.self_attn.q_proj.weight", "0.attn.c_attn.weight", "conv2d.weight"))
        ]:
            save_file({**tensors, key: torch.zeros(shape)}, file, {"format": "pt"})
            tried += 1
    assert tried
    try:
        plan = inlay.make_plan(base, [adapter(name)])
    except PlanError:
        return
    inlay.run_plan(plan, tmp_path / "out")
    assert inlay.verify(base, [adapter(name)], tmp_path / "out").ok


@pytest.mark.parametrize("value", ["x", "", [1], {"a": 1}, 2.5, -1, 10**400, True])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("fourierft", "random_loc_seed"),
        ("vera-drawn", "projection_prng_key"),
        ("gralora", "gralora_k"),
        ("gralora", "hybrid_r"),
        ("miss-mini", "mini_r"),
        ("oft-neumann", "num_cayley_neumann_terms"),
        ("road", "group_size"),
        ("vblora-topk", "topk"),
        ("adalora", "init_r"),
        ("loha", "r"),
        ("randlora", "r"),
    ],
)
def test_a_setting_that_is_no_whole_number_is_refused(
    kit: Kit, adapter: Callable[[str], Path], name: str, field: str, value: Any, tmp_path: Path
) -> None:
    path = kit.copy_of(adapter(name), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(AdapterError, match=f"{field} must be"):
        inlay.make_plan(kit.base("qwen2"), [path])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("fourierft", "scaling", [1.0]),
        ("fourierft", "scaling", 1e308),
        ("oft-coft", "eps", "x"),
        ("oft", "use_cayley_neumann", "no"),
        ("hra", "apply_GS", "false"),
        ("deft", "para", 1),
        ("bdlora-a", "use_bdlora", {"nblocks": "x"}),
    ],
)
def test_a_setting_of_another_type_is_refused(
    kit: Kit, adapter: Callable[[str], Path], name: str, field: str, value: Any, tmp_path: Path
) -> None:
    path = kit.copy_of(adapter(name), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(AdapterError, match="must be"):
        inlay.make_plan(kit.base("qwen2"), [path])


@pytest.mark.parametrize("index", [100_000, -1, 0.5, float("nan")])
@pytest.mark.parametrize("name", ["vblora-topk", "shira", "supertuning", "unilora"])
def test_places_outside_are_a_problem_of_the_plan(
    kit: Kit,
    adapter: Callable[[str], Path],
    name: str,
    index: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A negative one counted from the end, a fraction was cut off, and the others stopped a run that had begun."""
    import torch
    from safetensors.torch import save_file

    from inlay.cli.main import main

    base, path, out = kit.base("qwen2"), kit.copy_of(adapter(name), tmp_path), tmp_path / "out"
    file = path / "adapter_model.safetensors"
    tensors = read(file)
    key = next(k for k in tensors if "_indices" in k)
    changed = tensors[key].to(torch.int64 if index == int(np.nan_to_num(index)) else torch.float32)
    changed.view(-1)[0] = index
    save_file({**tensors, key: changed}, file)
    with pytest.raises(PlanError, match="point outside") as error:
        inlay.make_plan(base, [path])
    assert len([p for p in error.value.problems if "outside" in p.what]) == 1
    assert (
        main(["export", "--model", str(base), "--adapters", str(path), "--merge_lora", "--output_dir", str(out)]) == 2
    )
    assert "point outside" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
