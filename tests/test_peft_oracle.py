"""Every feature of PEFT's LoRA against PEFT itself: in float64 to the last bit, in the base's type within
what PEFT's own roundings explain, and as a model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import inlay
from cases import CASES, DTYPES, MODELS, TORCH_NAMES, Case, Kit, load_peft
from oracle import (
    correctly_rounded,
    differing,
    float64,
    header,
    logits_tolerance,
    peft_merged,
    reach,
    read,
    same_bytes,
    shard_files,
    spacing,
    undecided,
)

NEW_KEYS = {"bert-new-classifier": {"classifier.weight", "classifier.bias"}}
PLAIN = [name for name in CASES if name not in NEW_KEYS]
LOADED = [name for name, case in CASES.items() if MODELS[case.model].auto is not None]


def in_memory(key: str, model: str) -> str:
    """Name in the class that PEFT merges: only the headless BERT's differ."""
    return f"bert.{key}" if model == "bert-headless" and not key.startswith("classifier") else key


def _exact_in_float64(case: Case, dimensions: int) -> bool:
    """Whether float64 holds every intermediate value, so that even ties are decided.

    Sums of products of 16-bit floats of similar size take fewer than 53 bits; so does `w + s·b` for a bias.
    """
    return not case.is_dora and (dimensions < 2 or case.stored in ("BF16", "F16"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_every_element_is_the_float64_merge_rounded_once(kit: Kit, name: str, dtype: str) -> None:
    case = CASES[name]
    base = kit.base(case.model, dtype)
    expected = peft_merged(case.model, base, [kit.adapter(name)], "F64")
    before, merged = read(base), read(kit.merged(name, dtype))
    assert merged.keys() == before.keys()
    changed = 0
    for key, tensor in merged.items():
        if not tensor.is_floating_point():
            continue
        stored, exact, weight = float64(tensor), float64(expected[key]), float64(before[key])
        error = 0.0 if _exact_in_float64(case, tensor.dim()) or np.array_equal(exact, weight) else reach(exact, weight)
        wrong = ~correctly_rounded(stored, exact, error, dtype)
        assert not wrong.any(), f"{key}: {wrong.sum()} of {wrong.size} elements, first {np.argwhere(wrong)[0]}"
        assert undecided(exact, error, dtype) < 0.01, key
        changed += not np.array_equal(stored, weight)
    assert changed, "the adapter did nothing, so this test could not fail"


CHANGED_TYPE = (
    "qwen2-everything", "qwen2-tokens-as-dict", "qwen2-dora", "qwen2-dora-embedding", "qwen2-lora-bias", "gpt2-dora",
    "gpt2-embeddings", "bert-saved-pooler", "conv-dora", "conv-bias-lora-only", "resnet-plain",
)  # fmt: skip


@pytest.mark.parametrize(("source", "dtype"), [("F32", "BF16"), ("F32", "F16"), ("BF16", "F32"), ("F16", "BF16")])
@pytest.mark.parametrize("name", CHANGED_TYPE)
def test_a_merge_into_another_type_rounds_once_too(
    kit: Kit, name: str, source: str, dtype: str, tmp_path: Path
) -> None:
    """Base values, copies, token rows, biases and sums: each goes to the asked type in one step."""
    case = CASES[name]
    base, adapter = kit.base(case.model, source), kit.adapter(name)
    inlay.run_plan(
        inlay.make_plan(base, [adapter], torch_dtype=TORCH_NAMES[dtype], max_shard_size="5KB"), tmp_path / "out"
    )
    expected, before = peft_merged(case.model, base, [adapter], "F64"), read(base)
    merged = read(tmp_path / "out")
    assert merged.keys() == before.keys()
    for key, tensor in merged.items():
        if not tensor.is_floating_point():
            assert not differing({key: before[key]}, merged)
            continue
        assert str(tensor.dtype).endswith(TORCH_NAMES[dtype])
        exact, weight = float64(expected[key]), float64(before[key])
        error = 0.0 if _exact_in_float64(case, tensor.dim()) or np.array_equal(exact, weight) else reach(exact, weight)
        assert correctly_rounded(float64(tensor), exact, error, dtype).all(), key


@pytest.mark.parametrize("name", ["qwen2-everything", "qwen2-dora", "bert-classifier", "qwen2-tokens-as-list"])
def test_the_adapters_name_in_its_keys_changes_nothing(kit: Kit, name: str, tmp_path: Path) -> None:
    """Files written from `state_dict()` have `lora_A.default.weight` and `modules_to_save.default.weight`."""
    from safetensors.torch import save_file

    case = CASES[name]
    adapter = kit.copy_of(kit.adapter(name), tmp_path)
    saved = list(json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] or [])
    tensors = {}
    for key, tensor in read(adapter / "adapter_model.safetensors").items():
        module, _, leaf = key.rpartition(".")
        if "lora_embedding" in key or key.endswith(("lora_magnitude_vector", "trainable_tokens_delta")):
            key = f"{key}.default" + (".weight" if key.endswith("vector") else "")
        elif ".lora_" in key:
            key = f"{module}.default.{leaf}"
        elif module.rpartition(".")[2] in saved:
            tensors[f"{module}.original_module.{leaf}"] = tensor * 0
            key = f"{module}.modules_to_save.default.{leaf}"
        tensors[key] = tensor
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    inlay.run_plan(inlay.make_plan(kit.base(case.model), [adapter]), tmp_path / "out")
    assert same_bytes(tmp_path / "out", kit.merged(name))


@pytest.mark.parametrize("name", ["qwen2-everything", "qwen2-dora"])
def test_an_adapter_in_a_bin_file_is_the_same_adapter(kit: Kit, name: str, tmp_path: Path) -> None:
    import torch

    adapter = kit.copy_of(kit.adapter(name), tmp_path)
    torch.save(read(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    inlay.run_plan(inlay.make_plan(kit.base(CASES[name].model), [adapter]), tmp_path / "out")
    assert same_bytes(tmp_path / "out", kit.merged(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_peft_in_the_same_type_differs_by_its_own_roundings_only(kit: Kit, name: str, dtype: str) -> None:
    """PEFT rounds, at worst: a copied base (on load), the delta, the sum; each by half a spacing of the largest
    of base, delta and result. DoRA multiplies once more and divides by a norm of float32. We round once. So
    two neighbours apart for a sum and three for a product, at the largest magnitude in the row."""
    case = CASES[name]
    base = kit.base(case.model, dtype)
    peft = peft_merged(case.model, base, [kit.adapter(name)], dtype)
    before, merged = read(base), read(kit.merged(name, dtype))
    for key, tensor in merged.items():
        ours, theirs, weight = float64(tensor), float64(peft[key]), float64(before[key])
        largest = np.maximum(np.maximum(np.abs(ours), np.abs(weight)), np.abs(ours - weight))
        if case.is_dora or dtype == "F32":  # in float32 the terms of the sum are as coarse as the result
            largest = np.broadcast_to(largest.max(initial=0), ours.shape)
        bound = (3 if case.is_dora else 2) * spacing(largest, dtype) * (4 if dtype == "F32" else 1)
        assert (np.abs(ours - theirs) <= bound).all(), key


@pytest.mark.parametrize("name", LOADED)
def test_merged_directory_computes_what_the_adapted_model_does(kit: Kit, name: str) -> None:
    case = CASES[name]
    model = MODELS[case.model]
    adapted = load_peft(model.load(kit.base(case.model)), kit.adapter(name))
    loaded, info = model.load_with_info(kit.merged(name))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    wanted, found = model(adapted), model(loaded)
    tolerance = logits_tolerance(wanted)
    assert (wanted - found).abs().max() <= tolerance
    if name not in NEW_KEYS:
        plain = model(model.load(kit.base(case.model)))
        assert (plain - wanted).abs().max() > 100 * tolerance, "the adapter is too weak to test anything"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_layout_is_that_of_the_base(kit: Kit, name: str, dtype: str) -> None:
    base, merged = kit.base(CASES[name].model, dtype), kit.merged(name, dtype)
    assert [f.name for f in shard_files(merged)] == [f.name for f in shard_files(base)]
    for a, b in zip(shard_files(base), shard_files(merged), strict=True):
        assert list(header(a).items()) == list(header(b).items()), "names, order, types, shapes and offsets"
        assert a.stat().st_size == b.stat().st_size
    index = "model.safetensors.index.json"
    if (base / index).exists():
        assert list(json.loads((merged / index).read_text())["weight_map"].items()) == list(
            json.loads((base / index).read_text())["weight_map"].items()
        )
        assert (merged / index).read_bytes() == (base / index).read_bytes()
    for file in base.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            assert (merged / file.relative_to(base)).read_bytes() == file.read_bytes(), file.name


def test_a_new_head_is_added_to_a_headless_base(kit: Kit) -> None:
    name, new = "bert-new-classifier", NEW_KEYS["bert-new-classifier"]
    base, merged = kit.base("bert-headless"), kit.merged(name)
    before, after = read(base), read(merged)
    assert after.keys() - before.keys() == new
    expected = peft_merged("bert-headless", base, [kit.adapter(name)], "F64")
    for key, tensor in after.items():
        exact = float64(expected[in_memory(key, "bert-headless")])
        assert correctly_rounded(float64(tensor), exact, reach(exact, exact), "F32").all(), key
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())


@pytest.mark.parametrize("name", ["qwen2-plain", "qwen2-dora", "gpt2-wrong-fan-in-fan-out", "conv-plain"])
def test_the_yardstick_sees_a_single_wrong_element(kit: Kit, name: str) -> None:
    """The oracle itself can fail: one element moved to its neighbour is reported."""
    case = CASES[name]
    expected = peft_merged(case.model, kit.base(case.model, "BF16"), [kit.adapter(name)], "F64")
    key, tensor = next((k, t) for k, t in read(kit.merged(name, "BF16")).items() if t.dim() == 2)
    stored, exact = float64(tensor), float64(expected[key])
    stored[0, 0] += spacing(stored[0, 0], "BF16")
    assert (~correctly_rounded(stored, exact, reach(exact, exact), "BF16")).sum() == 1
