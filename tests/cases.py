"""One table of tiny models and adapters: every feature of PEFT's LoRA that changes a merged weight.

Checkpoints have a few kilobytes and are written by transformers and PEFT themselves. All weights are
random and no adapter is neutral, so that an ignored tensor, pattern or flag shows in the numbers.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
DTYPES = ("F32", "BF16", "F16")
SHARD_SIZE = "6KB"


@contextlib.contextmanager
def third_party() -> Iterator[None]:
    """Around calls of PEFT and transformers: what they warn of is theirs, and inlay is never called inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- models -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """How to build, load and call a tiny model. `auto` is None for a module of our own, saved with safetensors."""

    build: Callable[[], Any]
    auto: str | None = "AutoModelForCausalLM"
    inputs: str = "tokens"

    def load(self, path: Path, dtype: str = "F32") -> Any:
        """The model of a directory with all floats in `dtype`, in eval mode."""
        import torch
        import transformers
        from safetensors.torch import load_file

        torch_dtype = getattr(torch, TORCH_NAMES[dtype])
        with third_party():
            if self.auto is None:
                model = self.build()
                model.load_state_dict(load_file(path / "model.safetensors"))
                return model.to(torch_dtype).eval()
            return getattr(transformers, self.auto).from_pretrained(path, dtype=torch_dtype).eval()

    def load_with_info(self, path: Path, dtype: str = "F32") -> tuple[Any, dict[str, Any]]:
        """A transformers model and what its loader says was missing or not expected."""
        import torch
        import transformers

        assert self.auto is not None
        with third_party():
            model, info = getattr(transformers, self.auto).from_pretrained(
                path, dtype=getattr(torch, TORCH_NAMES[dtype]), output_loading_info=True
            )
        return model.eval(), info

    def __call__(self, model: Any) -> Any:
        """Outputs for a fixed input."""
        import torch

        generator = torch.Generator().manual_seed(7)
        with torch.no_grad(), third_party():
            if self.inputs == "tokens":
                out = model(input_ids=torch.randint(0, 40, (2, 9), generator=generator))
                return out.logits if hasattr(out, "logits") else out
            pixels = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
            out = model(pixels.to(next(model.parameters()).dtype))
            return out.logits if hasattr(out, "logits") else out


def _decoder(kind: str, **changes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **{"tie_word_embeddings": False, **changes},
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _gpt2(tied: bool = False) -> Any:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _bert_config(**changes: Any) -> Any:
    import transformers

    return transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, **changes,
    )  # fmt: skip


def _bert(kind: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, f"Bert{kind}")(_bert_config(**changes))


def _resnet() -> Any:
    import transformers

    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def _convolutions() -> Any:
    import torch
    from torch import nn

    class Convolutions(nn.Module):
        """All three kinds, a Linear, an Embedding and a MultiheadAttention; keys are module names."""

        def __init__(self) -> None:
            super().__init__()
            self.conv2d = nn.Conv2d(3, 5, (3, 2), padding=1)
            self.point = nn.Conv2d(5, 6, 1)
            self.conv1d = nn.Conv1d(6, 7, 3)
            self.conv3d = nn.Conv3d(1, 4, (2, 1, 3))
            self.table = nn.Embedding(11, 12)
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.out = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.point(torch.tanh(self.conv2d(x)))
            x = torch.tanh(self.conv1d(x.flatten(2)))
            x = self.conv3d(x.unflatten(2, (-1, 5))[:, None, :, :4].contiguous()).mean((1, 3))
            tokens = (x.flatten(1)[:, :4].abs() * 7).long() % 11
            y = self.table(tokens)
            y, _ = self.attention(y, y, y, need_weights=False)
            return self.out(y).sum(1)

    return Convolutions()


MODELS: dict[str, Model] = {
    "qwen2": Model(lambda: _decoder("Qwen2")),
    "qwen2-tied": Model(lambda: _decoder("Qwen2", tie_word_embeddings=True)),
    "llama": Model(lambda: _decoder("Llama")),
    "gpt2": Model(_gpt2),
    "gpt2-tied": Model(lambda: _gpt2(tied=True)),
    "bert": Model(lambda: _bert("ForSequenceClassification", num_labels=3), "AutoModelForSequenceClassification"),
    "bert-headless": Model(lambda: _bert("Model"), "AutoModelForSequenceClassification"),
    "bert-masked": Model(lambda: _bert("ForMaskedLM"), "AutoModelForMaskedLM"),
    "resnet": Model(_resnet, "AutoModelForImageClassification", "pixels"),
    "conv": Model(_convolutions, None, "pixels"),
}


def randomise(model: Any, seed: int) -> None:
    """Random values for everything a checkpoint stores: norms that are not one, biases that are not zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + noise.abs())
            elif tensor.dim() < 2:
                tensor.copy_(("norm" in name.lower() or "ln_" in name) * 1.0 + 0.2 * noise)
            else:
                tensor.copy_(0.3 * noise)


# --- adapters ---------------------------------------------------------------------------------------

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """An adapter on a model: fields of LoraConfig, fields edited in the saved config, type of the saved tensors."""

    name: str
    model: str
    lora: Mapping[str, Any]
    edited: Mapping[str, Any] = field(default_factory=dict)
    stored: str = "F32"

    @cached_property
    def is_dora(self) -> bool:
        return bool(self.lora.get("use_dora"))


def _case(name: str, target_modules: Any, *, edited: Mapping[str, Any] | None = None, stored: str = "F32",
          model: str | None = None, **lora: Any) -> Case:  # fmt: skip
    given = {"r": 4, "lora_alpha": 6, "target_modules": target_modules, **lora}
    return Case(name, model or name.partition("-")[0], given, edited or {}, stored)


_TABLE = (
    # decoders with Linear layers
    _case("qwen2-plain", LINEAR),
    _case("qwen2-rank1", ("q_proj", "down_proj"), r=1, lora_alpha=3),
    _case("qwen2-all-linear", "all-linear", r=3),
    _case("qwen2-regex-targets", r".*layers\.(0|1)\.(self_attn\.[qv]_proj|mlp\.up_proj)"),
    _case("qwen2-adapter-in-bf16", LINEAR, stored="BF16"),
    _case("qwen2-adapter-in-f16", LINEAR, stored="F16"),
    _case("qwen2-adapter-in-f64", LINEAR, stored="F64"),
    _case(
        "qwen2-patterns-by-suffix",
        LINEAR,
        rank_pattern={"q_proj": 2, "mlp.up_proj": 7},
        alpha_pattern={"v_proj": 3, "up_proj": 11},
    ),
    _case(
        "qwen2-patterns-by-regex",
        LINEAR,
        rank_pattern={r"layers\.0\..*": 6, r"self_attn\.(q|k)_proj": 3},
        alpha_pattern={r".*\.1\.mlp\.[gu].*": 1},
    ),
    _case(
        "qwen2-patterns-anchored",
        LINEAR,
        rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 5},
        alpha_pattern={r"^model\..*_proj": 2},
    ),
    _case(
        "qwen2-patterns-by-full-name",
        LINEAR,
        rank_pattern={"model.layers.0.self_attn.q_proj": 7},
        alpha_pattern={"model.layers.1.mlp.down_proj": 9},
    ),
    _case(
        "qwen2-patterns-that-overlap",
        LINEAR,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 5},
        alpha_pattern={"q_proj": 5, "self_attn.q_proj": 7},
    ),
    _case(
        "qwen2-patterns-that-match-nothing",
        LINEAR,
        rank_pattern={"proj": 2, "q_pro": 3},
        alpha_pattern={"elf_attn.q_proj": 7},
    ),
    _case("qwen2-rslora", LINEAR, r=8, use_rslora=True),
    _case(
        "qwen2-rslora-with-patterns",
        LINEAR,
        use_rslora=True,
        rank_pattern={"v_proj": 9},
        alpha_pattern={"o_proj": 5, "v_proj": 2},
    ),
    _case("qwen2-wrong-fan-in-fan-out", ("q_proj", "o_proj", "k_proj"), edited={"fan_in_fan_out": True}),
    _case("qwen2-embedding", ("embed_tokens", "q_proj")),
    _case("qwen2-embedding-only", ("embed_tokens",), save_embedding_layers=False),
    _case("qwen2-head", ("lm_head", "v_proj")),
    _case("qwen2-embedding-and-head-copies-saved", ("embed_tokens", "lm_head")),
    _case("qwen2-lora-bias", ("q_proj", "k_proj", "v_proj"), lora_bias=True, alpha_pattern={"k_proj": 1}),
    _case("qwen2-bias-all", ("q_proj", "o_proj"), bias="all"),
    _case("qwen2-bias-lora-only", ("q_proj", "o_proj"), bias="lora_only"),
    _case("qwen2-saved-head", LINEAR, modules_to_save=["lm_head"]),
    _case("qwen2-saved-embedding", ("q_proj",), modules_to_save=["embed_tokens"]),
    _case("qwen2-saved-norms", ("q_proj",), modules_to_save=["norm", "post_attention_layernorm"]),
    _case("qwen2-saved-submodule", ("q_proj",), modules_to_save=["mlp"]),
    _case("qwen2-tokens-as-list", ("q_proj",), trainable_token_indices=[39, 0, 7]),
    _case("qwen2-tokens-as-dict", ("q_proj",), trainable_token_indices={"embed_tokens": [5, 2], "lm_head": [2, 9]}),
    _case("qwen2-layers-to-transform", ("q_proj", "up_proj"), layers_to_transform=[1]),
    _case("qwen2-exclude-modules", "all-linear", exclude_modules=["v_proj", r".*\.0\.mlp\..*"]),
    _case("qwen2-dora", LINEAR, use_dora=True),
    _case(
        "qwen2-dora-rslora-with-patterns",
        LINEAR,
        use_dora=True,
        use_rslora=True,
        rank_pattern={"v_proj": 9},
        alpha_pattern={"o_proj": 5},
    ),
    _case("qwen2-dora-embedding", ("embed_tokens", "k_proj"), use_dora=True),
    _case("qwen2-dora-in-bf16", LINEAR, use_dora=True, stored="BF16"),
    _case(
        "qwen2-everything",
        (*LINEAR, "embed_tokens"),
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"embed_tokens": 2},
        bias="all",
        modules_to_save=["lm_head", "norm"],
    ),
    _case("llama-plain", LINEAR, r=16),
    _case("llama-no-biases-to-save", LINEAR, bias="all"),
    _case("llama-rslora-dora", LINEAR, use_rslora=True, use_dora=True),
    # Conv1D: stored (in, out); c_proj of the attention is square
    _case("gpt2-plain", ("c_attn", "c_proj", "c_fc"), fan_in_fan_out=True),
    _case("gpt2-wrong-fan-in-fan-out", ("c_attn", "c_proj", "c_fc"), edited={"fan_in_fan_out": False}),
    _case("gpt2-square-only", ("attn.c_proj",), fan_in_fan_out=True),
    _case("gpt2-square-only-wrong-flag", ("attn.c_proj",), edited={"fan_in_fan_out": False}),
    _case("gpt2-with-linear-head", ("c_attn", "lm_head"), fan_in_fan_out=True),
    _case("gpt2-with-linear-head-wrong-flag", ("c_attn", "lm_head"), edited={"fan_in_fan_out": False}),
    _case("gpt2-embeddings", ("wte", "wpe", "c_fc"), fan_in_fan_out=True),
    _case("gpt2-lora-bias", ("c_attn", "c_proj"), lora_bias=True, fan_in_fan_out=True),
    _case("gpt2-bias-all", ("c_attn",), bias="all", fan_in_fan_out=True),
    _case(
        "gpt2-rslora-with-patterns",
        ("c_attn", "c_proj"),
        use_rslora=True,
        rank_pattern={r"attn\.c_proj": 2},
        fan_in_fan_out=True,
    ),
    _case("gpt2-dora", ("c_attn", "c_proj", "c_fc"), use_dora=True, fan_in_fan_out=True),
    _case("gpt2-dora-wrong-flag", ("c_attn", "c_proj", "c_fc"), use_dora=True, edited={"fan_in_fan_out": False}),
    _case("gpt2-saved-ln", ("c_attn",), modules_to_save=["ln_f", "ln_1"], fan_in_fan_out=True),
    # an encoder with a classification head
    _case("bert-classifier", ("query", "value"), task_type="SEQ_CLS"),
    _case("bert-all-linear", "all-linear", task_type="SEQ_CLS"),
    _case("bert-embeddings", ("word_embeddings", "position_embeddings", "dense"), task_type="SEQ_CLS"),
    _case("bert-bias-all", ("query", "dense"), bias="all", task_type="SEQ_CLS"),
    _case("bert-saved-pooler", ("key",), modules_to_save=["pooler"], task_type="SEQ_CLS"),
    _case("bert-dora", ("query", "dense"), use_dora=True, task_type="SEQ_CLS"),
    _case("bert-tokens", ("query",), trainable_token_indices={"word_embeddings": [3, 1]}, task_type="SEQ_CLS"),
    _case("bert-new-classifier", ("query", "value"), task_type="SEQ_CLS", model="bert-headless"),
    # convolutions
    _case("conv-plain", ("conv1d", "conv2d", "conv3d", "point", "out")),
    _case("conv-rank1-rslora", ("conv1d", "conv2d", "conv3d"), r=1, use_rslora=True),
    _case("conv-patterns", ("conv1d", "conv2d", "point"), rank_pattern={"conv2d": 2}, alpha_pattern={"conv[12]d": 3}),
    _case("conv-lora-bias", ("conv1d", "conv2d", "conv3d", "out"), lora_bias=True),
    _case("conv-bias-lora-only", ("conv2d", "out"), bias="lora_only"),
    _case("conv-dora", ("conv1d", "conv2d", "conv3d", "point"), use_dora=True),
    _case("conv-embedding", ("table", "out")),
    _case("conv-attention", ("attention", "out")),
    _case("resnet-plain", ("convolution",), modules_to_save=["classifier.1"]),
    _case("resnet-dora", ("convolution",), use_dora=True),
)

CASES: dict[str, Case] = {case.name: case for case in _TABLE}
assert len(CASES) == len(_TABLE), "two cases have one name"


def perturb(model: Any, seed: int) -> None:
    """Random values for all that an adapter trains, far from the neutral ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            if "lora_magnitude_vector" in name:
                p.mul_(1 + 0.3 * noise.clamp(-2, 2))
            elif "lora_B" in name and name.endswith("bias"):
                p.copy_(0.5 * noise)
            elif "lora_" in name:
                p.copy_(0.4 * noise)
            else:
                p.add_(0.3 * noise)


def _seed(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % 2**31


def save_adapter(
    peft_model: Any, path: Path, stored: str = "F32", edited: Mapping[str, Any] | None = None, copies: Any = "auto"
) -> Path:
    """Save as PEFT does, then change the type of the tensors and fields of the config.

    `copies` is PEFT's `save_embedding_layers`: "auto" adds full copies of embeddings that are targeted or resized.
    """
    import torch
    from safetensors.torch import load_file, save_file

    with third_party():
        peft_model.save_pretrained(path, save_embedding_layers=copies)
    if stored != "F32":
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({k: t.to(getattr(torch, TORCH_NAMES[stored])) for k, t in tensors.items()}, file, {"format": "pt"})
    if edited:
        edit_json(path / "adapter_config.json", **edited)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object; None removes."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if k not in changes or v is not None}, indent=2))


def new_peft_model(model: Any, lora: Mapping[str, Any], seed: int) -> Any:
    """A PEFT model with random, non-neutral trained values."""
    import torch
    from peft import LoraConfig, get_peft_model

    given = {k: list(v) if isinstance(v, tuple) else v for k, v in lora.items() if k != "save_embedding_layers"}
    torch.manual_seed(seed)  # shapes come first, all values are set below
    with third_party():
        peft_model = get_peft_model(model, LoraConfig(**given, init_lora_weights=False))
    perturb(peft_model, seed)
    return peft_model.eval()


def load_peft(model: Any, *paths: Path, autocast: bool = True) -> Any:
    """The model with the adapters at `paths`, all of them active in this order."""
    from peft import PeftModel

    with third_party():
        adapted = PeftModel.from_pretrained(model, paths[0], adapter_name="a0", autocast_adapter_dtype=autocast)
        for i, path in enumerate(paths[1:], 1):
            adapted.load_adapter(path, adapter_name=f"a{i}", autocast_adapter_dtype=autocast)
        adapted.base_model.set_adapter([f"a{i}" for i in range(len(paths))])
    return adapted.eval()


class Kit:
    """Builds what the table describes, once each, under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, model: str, dtype: str = "F32") -> Path:
        """A base directory; the 16-bit ones hold the rounded values of the float32 one."""
        import torch
        from safetensors.torch import save_file

        path = self.root / f"{model}.{dtype}"
        if path.exists():
            return path
        with third_party():
            module = MODELS[model].build()
            randomise(module, _seed(model))
            module = module.to(getattr(torch, TORCH_NAMES[dtype]))
            if MODELS[model].auto is None:
                path.mkdir()
                save_file(module.state_dict(), path / "model.safetensors", {"format": "pt"})
            else:
                module.save_pretrained(path, max_shard_size=SHARD_SIZE)
        (path / "code").mkdir()
        (path / "code" / "modeling.py").write_text("x = 1\n")
        return path

    def adapter(self, name: str) -> Path:
        """The adapter of a case, trained (as it were) on the float32 base."""
        case = CASES[name]
        path = self.root / f"{name}.adapter"
        if path.exists():
            return path
        model = MODELS[case.model].load(self.base(case.model))
        peft_model = new_peft_model(model, case.lora, _seed(name))
        copies = case.lora.get("save_embedding_layers", "auto")
        return save_adapter(peft_model, path, case.stored, case.edited, copies)

    def merged(self, name: str, dtype: str = "F32") -> Path:
        """The merge of a case by inlay."""
        import inlay

        path = self.root / f"{name}.{dtype}.merged"
        if not path.exists():
            plan = inlay.make_plan(self.base(CASES[name].model, dtype), [self.adapter(name)])
            inlay.run_plan(plan, path)
        return path

    def copy_of(self, path: Path, where: Path) -> Path:
        """A copy that a test may change."""
        return Path(shutil.copytree(path, where / path.name))
