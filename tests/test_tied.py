"""Tied embeddings: whatever an adapter does to either end, the merged directory computes what the adapted
model computes. PEFT's own merge does not (peft#2777), so the yardstick is the unmerged model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from cases import MODELS, Kit, edit_json, load_peft, new_peft_model, perturb, save_adapter, third_party
from oracle import bits, differing, float64, logits_tolerance, read, rounded, shard_files

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Tied:
    """Adapters on a tied model, and whether the result is still tied."""

    name: str
    loras: tuple[Mapping[str, Any], ...]
    stays: bool
    model: str = "qwen2-tied"

    @property
    def peft_forward_is_wrong(self) -> bool:
        """PEFT's trained tokens on a tied head forget the head's bias in the forward pass (peft 0.21.2,
        trainable_tokens/layer.py, `F.linear` without one); its merge does not."""
        return self.name == "bert-tokens"


def _case(name: str, *loras: Mapping[str, Any], stays: bool, model: str = "qwen2-tied") -> Tied:
    return Tied(name, tuple({"r": 3, "lora_alpha": 4, **lora} for lora in loras), stays, model)


def lora(*targets: str, **more: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), **more}


TABLE = (
    _case("q-only", lora("q_proj"), stays=True),
    _case("embed", lora("embed_tokens", "q_proj"), stays=False),
    _case("embed-alone", lora("embed_tokens"), stays=False),
    _case("head", lora("lm_head", "q_proj"), stays=False),
    _case("head-alone", lora("lm_head"), stays=False),
    _case("both", lora("lm_head", "embed_tokens", "q_proj"), stays=False),
    _case("dora-embed", lora("embed_tokens", use_dora=True), stays=False),
    _case("dora-head", lora("lm_head", "v_proj", use_dora=True), stays=False),
    _case("dora-both", lora("lm_head", "embed_tokens", use_dora=True), stays=False),
    _case("saved-embed", lora("q_proj", modules_to_save=["embed_tokens"]), stays=False),
    _case("saved-head", lora("q_proj", modules_to_save=["lm_head"]), stays=False),
    _case("saved-both", lora("q_proj", modules_to_save=["lm_head", "embed_tokens"]), stays=False),
    _case("saved-embed-lora-head", lora("lm_head", modules_to_save=["embed_tokens"]), stays=False),
    _case("saved-head-lora-embed", lora("embed_tokens", modules_to_save=["lm_head"]), stays=False),
    _case("tying-saved-embed", lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True), stays=True),
    _case("tying-saved-head", lora("q_proj", modules_to_save=["lm_head"], ensure_weight_tying=True), stays=True),
    _case(
        "tying-saved-both",
        lora("q_proj", modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        stays=True,
    ),
    _case("tying-lora-embed", lora("embed_tokens", "q_proj", ensure_weight_tying=True), stays=True),
    _case("tying-lora-both", lora("embed_tokens", "lm_head", ensure_weight_tying=True), stays=True),
    _case("tokens", lora("q_proj", trainable_token_indices=[3, 39, 0]), stays=True),
    _case("tokens-dict", lora("q_proj", trainable_token_indices={"embed_tokens": [3, 39, 0]}), stays=True),
    _case("tokens-tying", lora("q_proj", trainable_token_indices=[3, 1], ensure_weight_tying=True), stays=True),
    _case(
        "tokens-dict-both-same",
        lora("q_proj", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]}),
        stays=True,
    ),
    # several adapters
    _case("q-and-v", lora("q_proj"), lora("v_proj"), stays=True),
    _case("embed-and-head", lora("embed_tokens"), lora("lm_head", r=2), stays=False),
    _case("head-and-embed", lora("lm_head"), lora("embed_tokens", r=2), stays=False),
    _case("embed-twice", lora("embed_tokens"), lora("embed_tokens", r=5), stays=False),
    _case("saved-head-and-q", lora("q_proj", modules_to_save=["lm_head"]), lora("q_proj", r=2), stays=False),
    # other families
    _case("gpt2-embed", lora("wte", "c_attn", fan_in_fan_out=True), stays=False, model="gpt2-tied"),
    _case("gpt2-head", lora("lm_head"), stays=False, model="gpt2-tied"),
    _case(
        "gpt2-tokens",
        lora("c_attn", trainable_token_indices={"wte": [1, 7]}, fan_in_fan_out=True),
        stays=True,
        model="gpt2-tied",
    ),
    _case(
        "gpt2-saved-head",
        lora("c_attn", modules_to_save=["lm_head"], fan_in_fan_out=True),
        stays=False,
        model="gpt2-tied",
    ),
    # PEFT ties what is called embed_tokens or lm_head only, whatever ensure_weight_tying says
    _case(
        "gpt2-tying-embed",
        lora("wte", "c_attn", fan_in_fan_out=True, ensure_weight_tying=True),
        stays=False,
        model="gpt2-tied",
    ),
    _case(
        "gpt2-tying-saved-embed",
        lora("c_attn", modules_to_save=["wte"], fan_in_fan_out=True, ensure_weight_tying=True),
        stays=False,
        model="gpt2-tied",
    ),
    _case("bert-embed", lora("word_embeddings", "query"), stays=False, model="bert-masked"),
    _case("bert-head", lora("decoder", "query"), stays=False, model="bert-masked"),
    _case(
        "bert-tokens",
        lora("query", trainable_token_indices={"word_embeddings": [1, 7]}),
        stays=True,
        model="bert-masked",
    ),
)
assert len({case.name for case in TABLE}) == len(TABLE)


def build(kit: Kit, case: Tied, root: Path, base: Path | None = None) -> list[Path]:
    """Each adapter trained (as it were) on its own on the tied base."""
    base = base or kit.base(case.model)
    paths = []
    for i, config in enumerate(case.loras):
        peft_model = new_peft_model(MODELS[case.model].load(base), config, 100 + i)
        paths.append(save_adapter(peft_model, root / f"adapter{i}"))
    return paths


def merge(base: Path, adapters: list[Path], out: Path, **options: Any) -> Path:
    inlay.run_plan(inlay.make_plan(base, adapters, **options), out)
    return out


def tie_in(path: Path) -> bool:
    return bool(json.loads((path / "config.json").read_text()).get("tie_word_embeddings", True))


def assert_computes(kit: Kit, model: str, wanted: Any, merged: Path, untouched: Any) -> None:
    loaded, info = MODELS[model].load_with_info(merged)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tolerance = logits_tolerance(wanted)
    assert (untouched - wanted).abs().max() > 100 * tolerance, "the adapter is too weak to test anything"
    off = (MODELS[model](loaded) - wanted).abs().max()
    assert off <= tolerance, f"off by {off:.3g}, the adapter's effect is {(untouched - wanted).abs().max():.3g}"


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_merged_directory_computes_what_the_adapted_model_does(kit: Kit, case: Tied, tmp_path: Path) -> None:
    model, base = MODELS[case.model], kit.base(case.model)
    adapters = build(kit, case, tmp_path)
    adapted = load_peft(model.load(base), *adapters)
    if case.peft_forward_is_wrong:
        with third_party():
            adapted = adapted.merge_and_unload()
    wanted = model(adapted)
    merged = merge(base, adapters, tmp_path / "merged")
    assert_computes(kit, case.model, wanted, merged, model(model.load(base)))


@pytest.mark.parametrize("targets", [["lm_head"], ["wte", "lm_head"]])
def test_a_pair_for_each_end_of_a_tie_acts_once(kit: Kit, targets: list[str], tmp_path: Path) -> None:
    """PEFT saves both ends, and forgets the tie when it loads them again: the yardstick is the model that was saved."""
    model, base = MODELS["gpt2-tied"], kit.base("gpt2-tied")
    adapted = new_peft_model(model.load(base), {"r": 3, **lora(*targets, ensure_weight_tying=True)}, 100)
    adapter = save_adapter(adapted, tmp_path / "adapter")
    wanted = model(adapted)
    merged = merge(base, [adapter], tmp_path / "merged")
    assert_computes(kit, "gpt2-tied", wanted, merged, model(model.load(base)))
    assert not read(merged).keys() - read(base).keys()


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_the_tie_is_cut_only_where_the_ends_differ(kit: Kit, case: Tied, tmp_path: Path) -> None:
    """A kept tie leaves keys and config as they were; a cut one adds the head and edits one value."""
    base = kit.base(case.model)
    merged = merge(base, build(kit, case, tmp_path), tmp_path / "merged")
    new = read(merged).keys() - read(base).keys()
    if case.stays:
        assert not new
        assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()
        return
    with_bias = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}  # BERT's head ties both
    assert new == (with_bias if case.model.startswith("bert") else {HEAD} & new) and new
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, merged))
    assert after == {**before, "tie_word_embeddings": False}
    assert before["tie_word_embeddings"] is True
    loaded = MODELS[case.model].load(merged)
    ends = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert ends[0].data_ptr() != ends[1].data_ptr(), "tied again on load"
    assert not (ends[0] == ends[1]).all()


@pytest.mark.parametrize("case", [c for c in TABLE if c.model == "qwen2-tied"], ids=lambda case: case.name)
def test_a_tied_base_that_stores_its_head_as_well_gives_the_same_function(kit: Kit, case: Tied, tmp_path: Path) -> None:
    """Some checkpoints hold `lm_head.weight` though the config ties it; loaders ignore that copy, so must a merge."""
    from safetensors.torch import load_file, save_file

    model = MODELS[case.model]
    base = kit.copy_of(kit.base(case.model), tmp_path)
    tensors = read(base)
    for file in shard_files(base):
        file.unlink()
    (base / "model.safetensors.index.json").unlink()
    save_file({**tensors, HEAD: tensors[EMBED].clone()}, base / "model.safetensors", {"format": "pt"})
    adapters = build(kit, case, tmp_path, kit.base(case.model))
    wanted = model(load_peft(model.load(kit.base(case.model)), *adapters))
    merged = merge(base, adapters, tmp_path / "merged")
    assert_computes(kit, case.model, wanted, merged, model(model.load(base)))
    assert load_file(merged / "model.safetensors").keys() == tensors.keys() | {HEAD}
    if case.stays:
        assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()
        assert not differing({HEAD: read(merged)[EMBED]}, read(merged)), "the two ends of a tie differ"


@pytest.mark.parametrize(
    "case", [c for c in TABLE if c.name in ("embed", "head", "tokens", "q-only")], ids=lambda c: c.name
)
@pytest.mark.parametrize("model", ["qwen2-tied", "gpt2-tied"])
def test_a_tie_that_only_the_class_declares_is_seen(kit: Kit, case: Tied, model: str, tmp_path: Path) -> None:
    """config.json without `tie_word_embeddings`: GPT-2 ties by default, and this Qwen2 does not store a head either."""
    names = {"embed_tokens": "wte", "q_proj": "c_attn"} if model == "gpt2-tied" else {}
    config = dict(case.loras[0])
    config["target_modules"] = [names.get(t, t) for t in config["target_modules"]]
    if config.get("trainable_token_indices"):
        config["trainable_token_indices"] = {
            names.get("embed_tokens", "embed_tokens"): config["trainable_token_indices"]
        }
    case = Tied(case.name, (config,), case.stays, model)
    base = kit.copy_of(kit.base(model), tmp_path)
    adapters = build(kit, case, tmp_path, kit.base(model))
    wanted = MODELS[model](load_peft(MODELS[model].load(kit.base(model)), *adapters))
    plain = MODELS[model](MODELS[model].load(kit.base(model)))
    edit_json(base / "config.json", tie_word_embeddings=None)
    merged = merge(base, adapters, tmp_path / "merged")
    assert_same_after_declaring(merged, model, case.stays)
    assert_computes(kit, model, wanted, merged, plain)


def assert_same_after_declaring(merged: Path, model: str, stays: bool) -> None:
    """A cut tie is written down. A kept one stays unsaid, and this test says it, as transformers' default differs."""
    said = json.loads((merged / "config.json").read_text()).get("tie_word_embeddings")
    assert said is (None if stays else False)
    if stays:
        edit_json(merged / "config.json", tie_word_embeddings=True)


def test_an_untied_base_is_not_given_another_head(kit: Kit, tmp_path: Path) -> None:
    peft_model = new_peft_model(MODELS["qwen2"].load(kit.base("qwen2")), lora("embed_tokens", r=2), 5)
    adapter = save_adapter(peft_model, tmp_path / "adapter")
    base = kit.base("qwen2")
    merged = merge(base, [adapter], tmp_path / "merged")
    assert differing(read(base), read(merged)) == [EMBED]
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_classifier_on_a_tied_decoder_keeps_the_tie(kit: Kit, tmp_path: Path) -> None:
    """For SEQ_CLS there is no output head, so a LoRA on the embedding has one end only."""
    import torch
    import transformers

    base = kit.base("qwen2-tied")
    torch.manual_seed(0)
    with third_party():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    peft_model = new_peft_model(model, lora("embed_tokens", "q_proj", r=2, task_type="SEQ_CLS"), 6)
    tokens = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = peft_model(input_ids=tokens).logits
    adapter = save_adapter(peft_model, tmp_path / "adapter")
    merged = merge(base, [adapter], tmp_path / "merged")
    assert read(merged).keys() - read(base).keys() == {"score.weight"}
    with third_party():
        loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            merged, output_loading_info=True, pad_token_id=0
        )
    assert not info["missing_keys"]
    assert loaded.config.num_labels == 3
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["Qwen2ForSequenceClassification"]
    with torch.no_grad():
        found = loaded.eval()(input_ids=tokens).logits
    assert (found - wanted).abs().max() <= logits_tolerance(wanted)


# --- vocabularies that grow ---------------------------------------------------------------------------


def grown(
    kit: Kit, model: str, rows: int, config: Mapping[str, Any], out: Path, save: Any = "auto"
) -> tuple[Path, Any]:
    """An adapter trained after `resize_token_embeddings(rows)`, and the logits of the adapted model."""
    import torch

    torch.manual_seed(3)
    module = MODELS[model].load(kit.base(model))
    with third_party():
        module.resize_token_embeddings(rows)
    peft_model = new_peft_model(module, config, 8)
    with torch.no_grad():
        for p in {module.get_input_embeddings(), module.get_output_embeddings()}:
            weight = p.weight if hasattr(p, "weight") else p.base_layer.weight
            weight[40:] += 0.3 * torch.randn(weight[40:].shape, generator=torch.Generator().manual_seed(4))
    with third_party():
        peft_model.save_pretrained(out, save_embedding_layers=save)
    return out, run_all_tokens(peft_model, rows)


def run_all_tokens(model: Any, rows: int) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(rows).reshape(2, -1)).logits


GROWN = {
    "q": lora("q_proj", r=2),
    "saved-both": lora("q_proj", r=2, modules_to_save=["embed_tokens", "lm_head"]),
    "saved-tying": lora("q_proj", r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora-embed": lora("embed_tokens", "q_proj", r=2),
    "lora-both": lora("embed_tokens", "lm_head", "q_proj", r=2),
    "dora": lora("q_proj", r=2, use_dora=True),
    "tokens": lora("q_proj", r=2, trainable_token_indices=[41, 3]),
}


@pytest.mark.parametrize("rows", [42, 44])
@pytest.mark.parametrize(
    ("model", "name"),
    [(m, n) for m in ("qwen2", "qwen2-tied") for n in GROWN if (m, n) != ("qwen2", "lora-embed")],
)
def test_a_resized_vocabulary_is_appended(kit: Kit, model: str, name: str, rows: int, tmp_path: Path) -> None:
    """PEFT saves resized embeddings in full; rows beyond the base's are new, and `vocab_size` says so."""
    adapter, wanted = grown(kit, model, rows, GROWN[name], tmp_path / "adapter")
    base = kit.base(model)
    merged = merge(base, [adapter], tmp_path / "merged")
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, merged))
    assert after["vocab_size"] == rows
    assert {k: v for k, v in after.items() if k not in ("vocab_size", "tie_word_embeddings")} == {
        k: v for k, v in before.items() if k not in ("vocab_size", "tie_word_embeddings")
    }
    loaded, info = MODELS[model].load_with_info(merged)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (run_all_tokens(loaded, rows) - wanted).abs().max() <= logits_tolerance(wanted)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read(merged).values())


@pytest.mark.parametrize("name", ["q", "dora", "saved-tying", "tokens"])
def test_a_resized_vocabulary_keeps_a_tie(kit: Kit, name: str, tmp_path: Path) -> None:
    """PEFT writes both ends of the resized tie, with equal values: the result is one tensor, as before."""
    adapter, _ = grown(kit, "qwen2-tied", 42, GROWN[name], tmp_path / "adapter")
    merged = merge(kit.base("qwen2-tied"), [adapter], tmp_path / "merged")
    assert tie_in(merged)
    assert HEAD not in read(merged)


def test_a_resized_embedding_without_its_head_is_refused(kit: Kit, tmp_path: Path) -> None:
    """With LoRA on the embedding PEFT saves that one only; the resized head of an untied model is lost."""
    adapter, _ = grown(kit, "qwen2", 44, GROWN["lora-embed"], tmp_path / "adapter")
    with pytest.raises(inlay.InlayError, match=r"lm_head\.weight.*40 rows.*embed_tokens.*44"):
        inlay.make_plan(kit.base("qwen2"), [adapter])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_trained_tokens_beyond_the_vocabulary_are_appended(kit: Kit, dtype: str, tmp_path: Path) -> None:
    """Only the new rows are in the adapter (`save_embedding_layers=False`); the tied embedding grows by them."""
    config = lora("q_proj", r=2, trainable_token_indices=[40, 42, 41, 43, 7])
    adapter, wanted = grown(kit, "qwen2-tied", 44, config, tmp_path / "adapter", save=False)
    assert not [k for k in read(adapter / "adapter_model.safetensors") if k.endswith("embed_tokens.weight")]
    base = kit.base("qwen2-tied", dtype)
    merged = merge(base, [adapter], tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 44
    rows = read(adapter / "adapter_model.safetensors")
    delta = next(t for k, t in rows.items() if k.endswith("trainable_tokens_delta"))
    embedding = read(merged)[EMBED]
    assert embedding.shape == (44, 16)
    for token, row in zip(config["trainable_token_indices"], delta, strict=True):
        assert np.array_equal(float64(embedding[token]), rounded(float64(row), dtype))
    kept = [i for i in range(40) if i != 7]
    assert np.array_equal(bits(embedding)[kept], bits(read(base)[EMBED])[kept])
    if dtype == "F32":
        loaded, info = MODELS["qwen2-tied"].load_with_info(merged)
        assert not info["missing_keys"]
        assert (run_all_tokens(loaded, 44) - wanted).abs().max() <= logits_tolerance(wanted)


def test_a_gap_in_the_new_rows_is_refused(kit: Kit, tmp_path: Path) -> None:
    config = lora("q_proj", r=2, trainable_token_indices=[40, 43])
    adapter, _ = grown(kit, "qwen2-tied", 44, config, tmp_path / "adapter", save=False)
    with pytest.raises(inlay.InlayError, match=r"embed_tokens.*40 rows.*43.*nothing gives row 41"):
        inlay.make_plan(kit.base("qwen2-tied"), [adapter])


def test_new_rows_for_one_end_of_an_untied_model_are_refused(kit: Kit, tmp_path: Path) -> None:
    """Embedding with 44 rows, head with 40: no model could be built."""
    config = lora("q_proj", r=2, trainable_token_indices=[40, 41, 42, 43])
    adapter, _ = grown(kit, "qwen2", 44, config, tmp_path / "adapter", save=False)
    with pytest.raises(inlay.InlayError, match=r"lm_head\.weight.*40 rows.*embed_tokens.*44"):
        inlay.make_plan(kit.base("qwen2"), [adapter])


@pytest.mark.parametrize("model", ["qwen2", "qwen2-tied"])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_lora_for_the_old_vocabulary_does_not_run_past_its_end(
    kit: Kit, model: str, target: str, tmp_path: Path
) -> None:
    """One adapter brings 44 rows, another one's LoRA has 40: its factor ends where the old vocabulary did.

    Either that is refused, or the new rows stay as they were brought; never does anything else reach them.
    """
    longer, _ = grown(kit, model, 44, GROWN["q"], tmp_path / "longer")
    peft_model = new_peft_model(MODELS[model].load(kit.base(model)), {"r": 2, "lora_alpha": 4, **lora(target)}, 21)
    shorter = save_adapter(peft_model, tmp_path / "shorter", copies=False)
    refused = ""
    try:
        merged = read(merge(kit.base(model), [longer, shorter], tmp_path / "merged"))
    except inlay.InlayError as error:
        refused = str(error)
    if refused:
        assert "40" in refused
        assert "44" in refused
        return
    copies = read(longer / "adapter_model.safetensors")
    key = EMBED if target == "embed_tokens" else HEAD
    alone = read(merge(kit.base(model), [shorter], tmp_path / "alone"))
    assert not np.array_equal(bits(alone[key]), bits(read(kit.base(model))[EMBED]))
    assert np.array_equal(bits(merged[key])[40:], bits(copies[f"base_model.model.{key}"])[40:])


def test_perturbation_reaches_both_ends(kit: Kit) -> None:
    """The table's adapters train what they say: without this the tests above could pass on nothing."""
    module = MODELS["qwen2-tied"].load(kit.base("qwen2-tied"))
    peft_model = new_peft_model(module, {"r": 2, **lora("embed_tokens", "lm_head")}, 1)
    perturb(peft_model, 2)
    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3 if n.endswith("weight") else -2] for n in trained} >= {
        "lora_embedding_A",
        "lora_embedding_B",
    }
    assert all(p.abs().min() > 0 for p in trained.values())


# --- GPT-2 as it lies on the Hub ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "stays"),
    [(("c_attn", "c_proj"), True), (("wte", "c_attn"), False), (("lm_head",), False)],
    ids=["attention", "embedding", "head"],
)
def test_a_checkpoint_without_the_prefix_of_its_class_is_merged(
    kit: Kit, targets: tuple[str, ...], stays: bool, tmp_path: Path
) -> None:
    """`h.0.attn.c_attn.weight` on disk, `transformer.h.0.attn.c_attn` in memory and in the adapter."""
    from safetensors.torch import load_file, save_file

    base = kit.copy_of(kit.base("gpt2-tied"), tmp_path)
    for file in shard_files(base):
        tensors = load_file(file)
        save_file({k.removeprefix("transformer."): t for k, t in tensors.items()}, file, {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k.removeprefix("transformer."): f for k, f in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_json(base / "config.json", tie_word_embeddings=None)
    model = MODELS["gpt2-tied"]
    peft_model = new_peft_model(model.load(base), {"r": 2, **lora(*targets, fan_in_fan_out=True)}, 31)
    wanted = model(peft_model)
    merged = merge(base, [save_adapter(peft_model, tmp_path / "adapter")], tmp_path / "merged")
    assert (read(merged).keys() == read(base).keys()) is stays
    assert_computes(kit, "gpt2-tied", wanted, merged, model(model.load(base)))
