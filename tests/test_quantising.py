"""Quantising with calibration: folds are exact, AWQ beats plain rounding, one layer is in memory at a time."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.checkpoints.decoded import decode_checkpoint
from inlay.codecs import awq as codec
from inlay.dtypes import F32
from inlay.errors import CheckFailed, InputError
from inlay.quantising import folding, search
from inlay.quantising.awq import quantise_awq
from inlay.quantising.calibration import calibration_blocks, read_texts
from inlay.quantising.perplexity import load_float32, perplexity
from inlay.quantising.quantise import check_result, open_source, quantise
from inlay.quantising.tracing import trace

BABYLLAMA = Path(__file__).parents[2] / "shared/data/models/babyllama-105"
if not BABYLLAMA.is_dir():
    BABYLLAMA = Path(__file__).parents[1] / "shared/data/models/babyllama-105"
trained = pytest.mark.skipif(not BABYLLAMA.is_dir(), reason="no trained model here")

COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
# Family -> class, settings, places that take a scale over in a layer.
QKV, UP, V = "input_layernorm.weight", "mlp.up_proj.weight", "self_attn.v_proj.weight"
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaForCausalLM", {}, [QKV, V, "post_attention_layernorm.weight", UP]),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}, [QKV, V, "post_attention_layernorm.weight", UP]),
    "qwen2": ("Qwen2ForCausalLM", {}, [QKV, V, "post_attention_layernorm.weight", UP]),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}, [QKV, V, "post_attention_layernorm.weight", UP]),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16}, [QKV, V, "pre_feedforward_layernorm.weight", UP]),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16}, [QKV, V, "pre_feedforward_layernorm.weight", UP]),
    "phi3": ("Phi3ForCausalLM", {"num_key_value_heads": 4},
             [QKV, "self_attn.qkv_proj.weight", "post_attention_layernorm.weight", "mlp.gate_up_proj.weight"]),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 16}, [QKV, V, "post_attention_layernorm.weight"]),
}  # fmt: skip


def build(family: str, seed: int = 0) -> Any:
    """A model with random weights, in which channels and gains differ as they do in trained ones."""
    import transformers

    name, settings, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    config = cls.config_class(**{**COMMON, **settings})
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p += torch.randn(p.shape) * (0.1 if name.endswith("bias") else 0.3)
            else:
                p.copy_(torch.randn(p.shape) * 0.1)
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    vocabulary = {"<unk>": 0, **{chr(31 + i): i for i in range(1, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("llama") / "base")


QUICK: dict[str, Any] = {"group_size": 32, "samples": 8, "max_length": 64}


@pytest.fixture(scope="module")
def llama_awq(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("awq") / "out"
    quantise(llama, out, "awq", **QUICK)
    return out


def folds_of(layer: Any, run: Callable[[], torch.Tensor]) -> list[folding.Fold | None]:
    traced = trace(layer, run)
    return [folding.find_fold(layer, group, traced, run) for group in traced.groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_fold_exactly_wherever_they_are_found_to(family: str) -> None:
    model = build(family)
    ids = torch.randint(1, 128, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        for number, layer in enumerate(model.model.layers):
            calls: list[Any] = []
            hook = layer.register_forward_pre_hook(lambda m, a, k, calls=calls: calls.append((a, k)), with_kwargs=True)
            model(ids, use_cache=False)
            hook.remove()
            args, kwargs = calls[0]

            def run(layer: Any = layer, args: Any = args, kwargs: Any = kwargs) -> torch.Tensor:
                out = layer(*args, **kwargs)
                return out[0] if isinstance(out, tuple) else out

            folds = [fold for fold in folds_of(layer, run) if fold is not None]
            assert [fold.source for fold in folds] == FAMILIES[family][2]
            for position, fold in enumerate(folds):
                draw = torch.Generator().manual_seed(10 * number + position)
                width = layer.get_parameter(fold.readers[0]).shape[-1]
                scale = folding.share(fold, torch.rand(width, generator=draw) * 3 + 0.3)
                folding.apply(layer, fold, folding.storable(layer, fold, scale, F32))
        after = model(ids).logits
    # A few roundings of float32 in each of two layers, on logits of this size.
    assert (after - before).abs().max() <= 64 * torch.finfo(torch.float32).eps * before.abs().max()


def test_a_norm_that_is_read_elsewhere_too_takes_no_scale() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(32), torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return y + self.linear(y) if self.read_twice else x + self.linear(y)

    layer, x = Residual(), torch.randn(1, 8, 32)
    with torch.no_grad():
        for layer.read_twice, found in ((False, 1), (True, 0)):
            assert sum(fold is not None for fold in folds_of(layer, lambda: layer(x))) == found


def test_the_gain_of_a_norm_is_rounded_before_the_scale_is_taken() -> None:
    from inlay.dtypes import BF16

    layer = build("gemma2").model.layers[0]
    fold = folding.Fold(("self_attn.q_proj.weight",), "input_layernorm.weight", offset=1)
    with torch.no_grad():
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.bfloat16().float()
        gain = 1 + layer.input_layernorm.weight.data
        scale = folding.storable(layer, fold, torch.rand(64) + 0.5, BF16)
        folding.apply(layer, fold, scale)
        stored = layer.input_layernorm.weight.data.bfloat16().float()
        np.testing.assert_allclose((1 + stored) * scale, gain, rtol=1e-6)


def test_queries_and_keys_are_known_without_their_names() -> None:
    for family, expected in (("llama", 2), ("qwen3", 2), ("phi3", 0)):
        model = build(family)
        layer, x = model.model.layers[0], torch.randn(1, 8, 64)
        kwargs = {"position_embeddings": model.model.rotary_emb(x, torch.arange(8)[None])}

        def run(layer: Any = layer, kwargs: Any = kwargs, x: Any = x) -> torch.Tensor:
            return layer(x, **kwargs)

        with torch.no_grad():
            found = [folding.interchangeable(layer, group.names, run) for group in trace(layer, run).groups]
        assert sum(map(len, found)) == expected
        assert all("q_proj" in name or "k_proj" in name for names in found for name in names)


@pytest.mark.parametrize("seed", range(3))
def test_trial_rounding_is_what_the_codec_encodes(seed: int) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[3, :32], weight[4, 32:64] = 0, weight[4, 32:64].abs()
    settings = codec.fresh((32, 128), {"group_size": 32})
    decoded = codec.decode(codec.encode(weight.numpy(), settings, 0, {}), settings, 0, 32)
    np.testing.assert_allclose(search.rounded(weight, 32).numpy(), decoded, rtol=1e-6, atol=1e-9)


def test_clipping_never_errs_more_on_what_it_saw() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 64, generator=draw) ** 3, torch.randn(100, 64, generator=draw)
    made = search.clipped(weight, x, 32)
    # Errors are taken group by group, so they are compared so.
    for group in range(2):
        part = slice(32 * group, 32 * group + 32)
        errors = [((search.rounded(w, 32) - weight)[:, part] @ x[:, part].T).square().sum(1) for w in (weight, made)]
        assert (errors[1] <= errors[0] * 1.001 + 1e-6).all()
    assert (made != weight).any()


def test_result_is_whole_and_close(llama: Path, llama_awq: Path) -> None:
    config = json.loads((llama_awq / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert config == json.loads((llama / "config.json").read_text())
    assert (llama_awq / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    index = json.loads((llama_awq / "model.safetensors.index.json").read_text())
    result = open_checkpoint(llama_awq)
    assert index["metadata"]["total_size"] == result.nbytes
    assert [s.file for s in result.shards] == [s.file for s in open_checkpoint(llama).shards]
    assert len(decode_checkpoint(result).encodings) == 14
    ids = torch.randint(1, 96, (1, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        base, quantised = load_float32(llama)(ids).logits, load_float32(llama_awq)(ids).logits
    # 4 bits in groups of 32 cost 0.6 % of the energy of a Gaussian weight, and 14 matrices come one after the other.
    assert float((quantised - base).square().mean() / base.square().mean()) < 0.15


def test_the_same_request_gives_the_same_bytes(llama: Path, llama_awq: Path, tmp_path: Path) -> None:
    quantise(llama, tmp_path / "again", "awq", **QUICK)
    for file in sorted(p.name for p in llama_awq.iterdir()):
        assert (tmp_path / "again" / file).read_bytes() == (llama_awq / file).read_bytes(), file


def test_one_layer_is_in_memory_at_a_time(llama: Path, tmp_path: Path) -> None:
    made = quantise_awq(open_source(llama), tmp_path, texts=read_texts(), **QUICK)
    model = build("llama")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    around = sum(p.numel() for n, p in model.model.named_parameters() if ".layers" not in f".{n}")
    assert made.most_parameters <= max(layer, layer + around)
    assert made.most_parameters < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3_moe", "qwen2"])
def test_other_families_are_quantised(family: str, tmp_path: Path) -> None:
    source = save(build(family), tmp_path / "base")
    result = quantise(source, tmp_path / "out", "awq", **QUICK)
    assert result.weights == {"gemma3": 14, "phi3": 8, "qwen3_moe": 2 * (4 + 3 * 4), "qwen2": 14}[family]
    if family == "qwen3_moe":  # routers stay, and no name of theirs is part of another's
        excluded = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"][
            "modules_to_not_convert"
        ]
        assert set(excluded) == {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    text = ["The quick brown fox jumps over the lazy dog. " * 8]
    assert perplexity(tmp_path / "out", text, 64) == pytest.approx(perplexity(source, text, 64), rel=0.2)


@trained
def test_awq_beats_plain_rounding_on_a_trained_model(tmp_path: Path) -> None:
    """Texts are the model's own, so that none is likelier under another model, and errors can only cost."""
    tokenizer, model = read_tokenizer_and_model()
    torch.manual_seed(0)
    with torch.no_grad():
        made = model.generate(
            torch.ones(48, 1, dtype=torch.long), do_sample=True, max_new_tokens=160, top_k=0, use_cache=True
        )
    texts = [t for t in tokenizer.batch_decode(made, skip_special_tokens=True) if len(t) > 1]
    base, figures, errors = open_source(BABYLLAMA), {}, {}
    for name, on in (("rtn", False), ("awq", True)):
        folder = tmp_path / name
        folder.mkdir()
        found = quantise_awq(
            base, folder, texts=texts[:24], group_size=32, samples=24, max_length=128, scale=on, clip=on
        )
        check_result(folder, set(found.settings), found.samples)
        figures[name], errors[name] = perplexity(folder, texts[24:], 128), found.groups
    assert perplexity(BABYLLAMA, texts[24:], 128) < figures["awq"] < figures["rtn"]
    assert all(g.source is not None and g.scaled <= g.plain for g in errors["awq"])
    assert sum(g.scaled < 0.97 * g.plain for g in errors["awq"]) >= len(errors["awq"]) // 2


def read_tokenizer_and_model() -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BABYLLAMA), load_float32(BABYLLAMA)


def test_codes_that_are_not_those_of_the_weight_are_found(llama_awq: Path) -> None:
    key = next(iter(decode_checkpoint(open_checkpoint(llama_awq)).encodings))
    with pytest.raises(CheckFailed, match="steps away"):
        check_result(llama_awq, {key}, {key: (0, np.full((8, 96), 0.5, np.float32))})
    with pytest.raises(CheckFailed, match="should be quantised"):
        check_result(llama_awq, {"model.norm.weight"}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "exl2"}, "no method"),
        ({"group_size": 48}, "do not fit"),
        ({"bits": 8}, "4 bits"),
        ({"keep": ["("]}, "no pattern"),
        ({"keep": ["."]}, "no linear modules"),
        ({"samples": 0}, "at least 1 sample"),
        ({"max_memory": 1000}, "bytes of memory"),
    ],
)
def test_requests_that_cannot_be_met(llama: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantise(llama, tmp_path / "out", **{"method": "awq", **QUICK, **change})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", " \n\n", "no text"),
        ("odd.jsonl", '{"question": "?"}\n', "odd.jsonl:1"),
        ("none.jsonl", None, "no such file"),
    ],
)
def test_datasets_that_cannot_be_read(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_texts(tmp_path / name)


def test_merged_and_quantised_in_one_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result is in codes, whole, and says what it was made from; nothing of the way is left."""
    from build import write_adapter
    from inlay.cli.main import main

    shape = open_checkpoint(llama).tensors["model.layers.0.self_attn.q_proj.weight"][1].shape
    adapter = write_adapter(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (shape[0], shape[1])})
    command = ["export", "--model", str(llama), "--adapters", str(adapter), "--merge_lora", "true"]
    more = ["--quant_method", "awq", "--quant_bits", "4", "--group_size", "32", "--quant_n_samples", "4"]
    assert main([*command, *more, "--max_length", "32", "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "inlay_quant.json").read_text())
    assert set(record["perplexity"]) == {"base", "merged", "awq"}
    assert record["merged"]["adapters"][0]["name"] == "a"
    decoded = decode_checkpoint(open_checkpoint(tmp_path / "out"))
    assert not decoded.problems and "model.layers.0.self_attn.q_proj.weight" in decoded.encodings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]
    capsys.readouterr()
    assert main([*command, *more[:2], "--output_dir", str(tmp_path / "no")]) == 2
    assert "--quant_bits" in capsys.readouterr().err


def test_a_quantised_source_and_one_without_tokenizer_are_refused(llama: Path, llama_awq: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised already"):
        quantise(llama_awq, tmp_path / "out", "awq")
    bare = shutil.copytree(llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(InputError, match="no tokenizer"):
        quantise(bare, tmp_path / "out", "awq", **QUICK)
    with pytest.raises(InputError, match="itself"):
        quantise(llama, llama, "awq", exist_ok=True)
    assert not (tmp_path / "out").exists()


def test_kept_modules_stay_in_16_bits(llama: Path, tmp_path: Path) -> None:
    """One that shares its input with modules that are quantised takes their scale, rounded once; others keep all bits."""
    result = quantise(llama, tmp_path / "out", "awq", keep=[r"layers\.1\.", "v_proj"], **QUICK)
    assert result.weights == 6
    assert {"model.layers.1", "model.layers.0.self_attn.v_proj"} <= set(result.excluded)
    stored = open_checkpoint(tmp_path / "out").tensors
    assert stored["model.layers.0.self_attn.v_proj.weight"][1].dtype.name == "BF16"
    layer = [key for key in open_checkpoint(llama).tensors if ".layers.1." in key]
    assert bits(llama, layer) == bits(tmp_path / "out", layer)


def bits(directory: Path, keys: list[str]) -> list[bytes]:
    """Stored bytes of these tensors."""
    places = [open_checkpoint(directory).tensors[key] for key in keys]
    return [(directory / shard.file).read_bytes()[t.start : t.end] for shard, t in places]


def test_a_group_may_be_a_whole_row(llama: Path, tmp_path: Path) -> None:
    assert quantise(llama, tmp_path / "out", "awq", **{**QUICK, "group_size": -1}).weights == 14


def test_datasets_of_every_form(tmp_path: Path) -> None:
    rows = [
        {"text": "a"}, {"messages": [{"role": "user", "content": "b"}]}, {"prompt": "c", "completion": "d"},
        {"query": "e", "response": "f"},
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_texts(tmp_path / "d.jsonl") == ["a", rows[1]["messages"], "cd", "ef"]
    (tmp_path / "d.txt").write_text("one\ntwo\n\n\nthree\n")
    assert read_texts(tmp_path / "d.txt") == ["one\ntwo", "three"]


def test_the_set_that_comes_along() -> None:
    texts = read_texts()
    assert 60 <= len(texts) <= 100
    assert any("公园" in t for t in texts if isinstance(t, str))


def test_blocks_are_full_and_the_same_each_time() -> None:
    class Characters:
        chat_template = None

        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    texts = ["abc" * 10, "de" * 20, [{"role": "user", "content": "hello"}]]
    blocks = calibration_blocks(Characters(), texts, 8, 16)
    assert [len(b) for b in blocks] == [16, 16]  # 16 of each long text and 5, of which 5 are left over
    assert blocks == calibration_blocks(Characters(), texts, 8, 16)
    assert [len(b) for b in calibration_blocks(Characters(), texts, 8, 100)] == [75]


def test_gptq(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    result = quantise(llama, tmp_path / "out", "gptq", **QUICK)
    assert result.weights == 14
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["sym"], config["desc_act"], config["bits"]) == ("gptq", True, False, 4)
    text = ["The quick brown fox jumps over the lazy dog. " * 8]
    assert perplexity(tmp_path / "out", text, 64) == pytest.approx(perplexity(llama, text, 64), rel=0.2)


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is here")
def test_gptq_names_its_extra(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"inlay\[gptq\]"):
        quantise(llama, tmp_path / "out", "gptq", **QUICK)
    assert not list(tmp_path.iterdir())
