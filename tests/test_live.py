"""Every method of PEFT beside its base and merged while loading: both compute what PEFT's own model does in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from cases import LINEAR, MODELS, Kit, third_party
from chatty import logits, source_of, talking
from families import FAMILIES
from inlay.infer.pt import TorchBackend

MODELS.update(FAMILIES)
SOME = ["q_proj", "o_proj"]
ALL = list(LINEAR)


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=5, **more)


METHODS = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["lm_head"]
    ),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=ALL, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9}),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=ALL, decompose_both=True, modules_to_save=["norm"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ALL),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=SOME),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, target_modules=ALL, init_r=4, target_r=2),
    "ln": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 9], target_modules=["embed_tokens"]),
    "dora": lambda: lora(target_modules=ALL, use_dora=True, use_rslora=True, alpha_pattern={"q_proj": 9}),
    "lora-bias": lambda: lora(target_modules=["q_proj", "k_proj"], lora_bias=True),
    "lora-tokens": lambda: lora(target_modules=SOME, trainable_token_indices=[3, 7], modules_to_save=["lm_head"]),
}  # fmt: skip


def trained(model: Any, config: Any, path: Path) -> Path:
    """Something that is far from neutral in every trained value, saved by PEFT."""
    with third_party():
        adapted = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
        adapted.save_pretrained(path)
    return path


def expected(model: str, base: Path, adapter: Path, dtype: str = "F64") -> Any:
    """The logits of PEFT's own model."""
    with third_party():
        return logits(peft.PeftModel.from_pretrained(MODELS[model].load(base, dtype), adapter).eval()).float()


def near(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_beside_its_base_and_merged_an_adapter_computes_what_peft_does(kit: Kit, tmp_path: Path, method: str) -> None:
    base = talking(kit, tmp_path)
    adapter = trained(MODELS["qwen2"].load(base), METHODS[method](), tmp_path / "a")
    wanted = expected("qwen2", base, adapter)
    assert (wanted - logits(MODELS["qwen2"].load(base))).abs().max() > 0.1
    apart = TorchBackend(source_of(base, [adapter]))
    assert apart.peft is not None and not apart.notes
    near(logits(apart.model), wanted)
    near(logits(TorchBackend(source_of(base, [adapter], merge=True)).model), wanted)


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral", "gptoss"])
def test_experts_as_parameters_compute_what_peft_does(kit: Kit, tmp_path: Path, family: str) -> None:
    base = talking(kit, tmp_path, family)
    config = lora(
        target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        alpha_pattern={"experts.down_proj": 9},
    )  # fmt: skip
    adapter = trained(MODELS[family].load(base), config, tmp_path / "a")
    wanted = expected(family, base, adapter, "F32")  # transformers has no product of experts in float64
    apart = TorchBackend(source_of(base, [adapter]))
    assert apart.peft is not None
    near(logits(apart.model), wanted)
    near(logits(TorchBackend(source_of(base, [adapter], merge=True)).model), wanted)


def test_a_linear_with_a_forward_of_its_own_is_merged_instead(kit: Kit, tmp_path: Path) -> None:
    """Llama 4's router is a Linear that returns two tensors, to which PEFT (0.21) would add one."""
    base = talking(kit, tmp_path, "llama4")
    adapter = trained(MODELS["llama4"].load(base), lora(target_modules=["router"]), tmp_path / "a")
    backend = TorchBackend(source_of(base, [adapter]))
    assert backend.peft is None and any("Llama4Router with a forward of its own" in note for note in backend.notes)
    merged = MODELS["llama4"].load(base)
    scaling = 5 / 3
    from safetensors.torch import load_file

    parts = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, p in merged.named_parameters():
            if name.endswith("router.weight"):
                one, two = (parts[f"base_model.model.{name[:-7]}.lora_{x}.weight"] for x in "AB")
                p += scaling * two @ one
    near(logits(backend.model), logits(merged))
