"""The behaviour check passes right merges, whoever made them, and names wrong ones; its tolerance is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from cases import MODELS, Kit, edit_json, load_peft, third_party
from chatty import source_of, talking
from inlay.cli.main import main
from inlay.datasets.row import make_row
from inlay.errors import InputError
from inlay.infer.behaviour import compare, read_rows
from inlay.infer.distance import Distance, distance, together
from inlay.infer.rounding import neighbour, stochastic
from inlay.infer.verdict import Behaviour
from test_experts import legacy

SHARED = Path(__file__).parents[2] / "shared/data"
if not SHARED.is_dir():
    SHARED = Path(__file__).parents[1] / "shared/data"
PROMPTS = [make_row({"text": text}, f"p:{text}") for text in ("hello", "what is", "a b c")]


def check(base: Path, adapters: list[Path], merged: Path | None = None, **more: Any) -> Behaviour:
    return compare(source_of(base, adapters), merged=merged, prompts=PROMPTS, new_tokens=6, draws=2, **more)


@pytest.mark.parametrize(("name", "dtype"), [
    ("qwen2-plain", "F32"), ("qwen2-plain", "BF16"), ("qwen2-plain", "F16"), ("qwen2-dora", "BF16"), ("gpt2-plain", "BF16"),
    ("qwen2-everything", "BF16"),
])  # fmt: skip
def test_our_merge_behaves_like_base_and_adapter(kit: Kit, tmp_path: Path, name: str, dtype: str) -> None:
    base = talking(kit, tmp_path, name.partition("-")[0], dtype)
    found = check(base, [kit.adapter(name)])
    assert found.ok and not found.reasons
    assert found.merged.rms < found.tolerance.rms < found.base.rms
    assert found.merged.positions == sum(p.merged.positions for p in found.prompts)


def test_draws_differ_and_are_farther_than_the_nearest_rounding(kit: Kit, tmp_path: Path) -> None:
    """Their errors have twice the variance, whatever type the merge is written in, untouched weights included."""
    base = talking(kit, tmp_path)
    source = source_of(base, [kit.adapter("qwen2-plain")], torch_dtype="bfloat16")
    found = compare(source, prompts=PROMPTS, new_tokens=6, draws=6)
    distances = [d.rms for d in found.draws]
    assert len(set(distances)) == 6
    assert 1 < sum(distances) / 6 / found.merged.rms < 2.5 and found.ok


def test_several_adapters_are_compared_by_their_sum(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, dtype="BF16")
    adapters = [kit.adapter("qwen2-plain"), kit.adapter("qwen2-rslora")]
    inlay.run_plan(inlay.make_plan(base, adapters), tmp_path / "both")
    inlay.run_plan(inlay.make_plan(base, adapters[1:]), tmp_path / "last")
    assert check(base, adapters, tmp_path / "both").ok
    assert not check(base, adapters, tmp_path / "last").alike  # what the best-known tool makes of two


def test_weights_and_type_are_taken_from_the_manifest(kit: Kit, tmp_path: Path) -> None:
    base, adapter = talking(kit, tmp_path), kit.adapter("qwen2-plain")
    inlay.run_plan(inlay.make_plan(base, [adapter], weights=[0.5], torch_dtype="bfloat16"), tmp_path / "m")
    assert check(base, [adapter], tmp_path / "m").ok
    (tmp_path / "m/inlay.json").unlink()
    assert not check(base, [adapter], tmp_path / "m").alike


def test_a_merge_by_peft_passes(kit: Kit, tmp_path: Path) -> None:
    """PEFT's own, which rounds the delta before it adds it (safe_merge): off by a unit in many elements."""
    base, adapter = talking(kit, tmp_path, dtype="BF16"), kit.adapter("qwen2-plain")
    with third_party():
        load_peft(MODELS["qwen2"].load(base, "BF16"), adapter).merge_and_unload(safe_merge=True).save_pretrained(
            tmp_path / "m"
        )
    report = inlay.verify(base, [adapter], tmp_path / "m")
    assert report.ok and not report.exact
    assert check(base, [adapter], tmp_path / "m").ok


def test_a_merge_of_another_tool_in_16_bits_is_judged_by_them(kit: Kit, tmp_path: Path) -> None:
    """Of a float32 base, as the commonest script makes it; its manifest would say the type if it had one."""
    base, adapter = talking(kit, tmp_path), kit.adapter("qwen2-plain")
    with third_party():
        merged = load_peft(MODELS["qwen2"].load(base, "BF16"), adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "m")
        merged.model.layers[0].mlp.up_proj.weight.data *= 1.1
        merged.save_pretrained(tmp_path / "wrong")
    assert check(base, [adapter], tmp_path / "m").ok
    assert not check(base, [adapter], tmp_path / "wrong").alike


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_never_pass(kit: Kit, tmp_path: Path, value: float) -> None:
    base, adapter = talking(kit, tmp_path), kit.adapter("qwen2-plain")
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "m")
    for file in (tmp_path / "m").glob("*.safetensors"):
        tensors = load_file(file)
        if (key := "model.layers.1.mlp.up_proj.weight") in tensors:
            tensors[key][:] = value
            save_file(tensors, file, {"format": "pt"})
    found = check(base, [adapter], tmp_path / "m")
    assert not found.ok and "Inf or NaN" in found.reasons[0]
    json.dumps(found.to_json(), allow_nan=False)


def test_nan_in_the_second_of_two_is_nan_in_both() -> None:
    fine, wild = Distance(1.0, 1.0, 0.0, 1.0, 3), Distance(math.nan, 1.0, 0.0, 1.0, 3)
    assert math.isnan(together([fine, wild]).largest) and together([fine, fine]) == Distance(1.0, 1.0, 0.0, 1.0, 6)
    verdict = Behaviour((), fine, Distance(9.0, 9.0, 0.0, 1.0, 3), (fine, wild), "m")
    assert not verdict.ok and "Inf or NaN" in verdict.reasons[0]


def test_a_smaller_vocabulary_is_refused(kit: Kit, tmp_path: Path) -> None:
    base, adapter = talking(kit, tmp_path), kit.adapter("qwen2-plain")
    with third_party():
        model = MODELS["qwen2"].load(base)
        model.resize_token_embeddings(12)
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="a vocabulary of 12 tokens"):
        check(base, [adapter], tmp_path / "m")


@pytest.mark.parametrize(("more", "said"), [
    ({"prompts": []}, "no prompt"), ({"draws": 0}, "--draws"), ({"new_tokens": 0}, "--new_tokens"),
])  # fmt: skip
def test_nothing_to_measure_is_refused(kit: Kit, more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compare(source_of(kit.base("qwen2"), [kit.adapter("qwen2-plain")]), **more)


def test_a_base_with_other_weights_than_recorded_is_refused(kit: Kit, tmp_path: Path) -> None:
    base, adapter = talking(kit, tmp_path), kit.copy_of(kit.adapter("qwen2-plain"), tmp_path / "x")
    known = inlay.open_checkpoint(base)
    key = "model.norm.weight"
    record = {"format": 1, "headers": known.fingerprint, "tensors": {key: "blake3:" + "0" * 64}}
    (adapter / "inlay_base.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        check(base, [adapter])


def test_a_directory_that_is_the_base_fails_and_is_named(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, dtype="BF16")
    found = check(base, [kit.adapter("qwen2-plain")], base)
    assert found.acts and not found.alike and not found.ok
    assert "behaves like the base" in found.reasons[0]


def test_a_scaling_wrong_by_a_tenth_fails(kit: Kit, tmp_path: Path) -> None:
    base, adapter = talking(kit, tmp_path, dtype="BF16"), kit.adapter("qwen2-plain")
    inlay.run_plan(inlay.make_plan(base, [adapter], weights=[1.1]), tmp_path / "m")
    (tmp_path / "m/inlay.json").unlink()  # which says so
    found = check(base, [adapter], tmp_path / "m")
    assert not found.alike and "does not behave" in found.reasons[0]


def test_one_wrong_tensor_fails(kit: Kit, tmp_path: Path) -> None:
    base, adapter = talking(kit, tmp_path, dtype="BF16"), kit.adapter("qwen2-plain")
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "m")
    for file in (tmp_path / "m").glob("*.safetensors"):
        tensors = load_file(file)
        if "model.layers.1.self_attn.v_proj.weight" in tensors:
            original = load_file(base / file.name)
            key = "model.layers.1.self_attn.v_proj.weight"
            tensors[key] = original[key].clone()
            save_file(tensors, file, {"format": "pt"})
    assert not check(base, [adapter], tmp_path / "m").ok


def test_an_adapter_that_does_nothing_fails(kit: Kit, tmp_path: Path) -> None:
    base, adapter = talking(kit, tmp_path, dtype="BF16"), kit.copy_of(kit.adapter("qwen2-plain"), tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = {k: t * (1e-6 if "lora_B" in k else 1) for k, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    found = check(base, [adapter])
    assert found.alike and not found.acts and not found.ok and "do nothing" in found.reasons[0]


def test_logits_of_the_reference_are_those_of_peft(kit: Kit, tmp_path: Path) -> None:
    """Distances recomputed from PEFT's logits and those of what a run writes, with numpy."""
    base, adapter = talking(kit, tmp_path, dtype="BF16"), kit.adapter("qwen2-plain")
    found = compare(source_of(base, [adapter]), prompts=PROMPTS[:1], new_tokens=1, draws=1)
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "m")
    peft = load_peft(MODELS["qwen2"].load(base), adapter)
    merged = MODELS["qwen2"].load(tmp_path / "m")
    from transformers import AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(base)("hello")["input_ids"]])
    with torch.no_grad():
        following = peft(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], 1)
        a, b = (m(input_ids=ids).logits[0].double().numpy() for m in (peft, merged))
    assert found.merged.positions == ids.shape[1]
    assert found.merged.largest == pytest.approx(np.abs(a - b).max(), rel=0.05)
    assert found.merged.rms == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=0.05)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    assert found.merged.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=0.1)


def test_distance_of_logits_by_hand() -> None:
    a, b = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = distance(a, b)
    p, q = (math.exp(2) / (1 + math.exp(2)), 1 / (1 + math.e))
    kl = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert found == Distance(2.0, pytest.approx(math.sqrt(5) / 2), pytest.approx(kl), 0.5, 2)


# --- rounding in another way ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_to_a_neighbour(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(400, generator=generator).repeat(2000, 1)
    rounded = stochastic(exact, dtype, generator)
    assert rounded.dtype == dtype
    near = exact.to(dtype)
    unit = (neighbour(near, exact > near.float()).float() - near.float()).abs()
    error = rounded.float() - exact
    assert bool((error.abs() <= unit).all())
    # The mean of 2000 draws of an error of at most half a unit's deviation, at six standard deviations.
    assert bool((error.mean(0).abs() <= 6 * unit[0] / 2 / math.sqrt(2000)).all())
    variance = float((error / unit).square().mean())
    assert variance == pytest.approx(1 / 6, rel=0.15)


def test_what_the_type_holds_exactly_is_kept() -> None:
    exact = torch.randn(100).to(torch.bfloat16)
    assert torch.equal(stochastic(exact.float(), torch.bfloat16, torch.Generator().manual_seed(1)), exact)


def test_float32_moves_by_a_unit_in_a_quarter_of_the_elements() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100_000, generator=generator)
    moved = stochastic(exact, torch.float32, generator)
    bits = (moved.view(torch.int32) - exact.view(torch.int32)).abs()
    assert int(bits.max()) == 1 and float((bits > 0).float().mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_neighbours_are_those_of_nextafter(dtype: torch.dtype) -> None:
    """Over all 16-bit patterns, or a sample of 32-bit ones; numpy and steps of the sorted values are the judges."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(dtype) if dtype != torch.float32 else torch.randn(1000)
    values = values[values.isfinite()]
    known = values.unique(sorted=True)
    for up in (True, False):
        found = neighbour(values, torch.full(values.shape, up))
        if dtype == torch.float32:
            expected = torch.from_numpy(np.nextafter(values.numpy(), np.float32(np.inf if up else -np.inf)))
        else:
            at = torch.searchsorted(known.float(), values.float()) + (1 if up else -1)
            inside = (at >= 0) & (at < len(known))
            values_in, found, expected = values[inside], found[inside], known[at.clamp(0, len(known) - 1)][inside]
            assert len(values_in) >= len(values) - 2
        assert torch.equal(found.float(), expected.float())


def test_no_draw_overflows() -> None:
    largest = torch.tensor([65519.0] * 1000)
    assert bool(stochastic(largest, torch.float16, torch.Generator().manual_seed(0)).isfinite().all())


# --- requests ---------------------------------------------------------------------------------------


def test_what_cannot_stay_unmerged_cannot_be_compared(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, "qwen3moe")
    legacy(tmp_path / "a", {"model.layers.0.mlp.experts.0.gate_proj": (12, 16)}, rslora=True)
    with pytest.raises(InputError, match=r"cannot run unmerged .*inlay verify"):
        check(base, [tmp_path / "a"])


def test_codes_are_not_judged_by_roundings(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path)
    coded = kit.copy_of(base, tmp_path / "x")
    edit_json(coded / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})
    with pytest.raises(InputError, match="holds codes"):
        check(base, [kit.adapter("qwen2-plain")], coded)


def test_no_adapters_no_comparison(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--adapters"):
        check(talking(kit, tmp_path), [])


def test_prompts_come_with_the_package() -> None:
    rows = read_rows(None)
    assert len(rows) == 12 and all(row.prompt and row.prompt[-1]["content"].strip() for row in rows)


def test_compare_prints_a_verdict_and_writes_the_figures(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = talking(kit, tmp_path, dtype="BF16")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hello"}\n{"query": "what"}\n')
    words = [
        "compare", "--model", str(base), "--adapters", str(kit.adapter("qwen2-plain")), "--prompts", str(prompts),
        "--new_tokens", "4", "--draws", "1", "--quiet",
    ]  # fmt: skip
    assert main([*words, "--result_path", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("passed") and "base + adapters" in out
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["ok"] and len(saved["prompts"]) == 2 and saved["merged"]["rms"] <= saved["tolerance"]["rms"]
    assert main([*words, "--merged", str(base), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["alike"] is False
    assert main([*words, "--result_path", str(tmp_path / "none/r.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([*words, "--prompts", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_verify_can_check_behaviour_too(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = talking(kit, tmp_path, dtype="BF16"), kit.adapter("qwen2-plain")
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "m")
    words = [
        "verify",
        "--model",
        str(base),
        "--adapters",
        str(adapter),
        "--behaviour",
        "true",
        "--draws",
        "1",
        "--quiet",
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    words += ["--prompts", str(prompts), "--new_tokens", "4"]
    assert main([*words, "--merged", str(tmp_path / "m")]) == 0
    assert capsys.readouterr().out.count("passed") == 2
    assert main([*words, "--merged", str(base), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False and found["behaviour"]["alike"] is False


@pytest.mark.skipif(not SHARED.is_dir(), reason="no trained models here")
@pytest.mark.parametrize("name", ["stories260K_shakespeare_lora_r16", "stories260K_shakespeare_dora_rslora_r8_embed"])
def test_trained_adapters_say_the_same_merged_and_unmerged(name: str) -> None:
    adapter = SHARED / "adapters" / name
    known = json.loads((adapter / "RESULT.json").read_text())
    rows = [make_row({"text": known["prompt"]}, "p")]
    found = compare(source_of(SHARED / "models/stories260K", [adapter]), prompts=rows, new_tokens=24, draws=1)
    assert found.ok and found.prompts[0].text_merged == found.prompts[0].text_adapters
    for text, recorded in (
        (found.prompts[0].text_base, "greedy_before"),
        (found.prompts[0].text_merged, "greedy_after"),
    ):
        assert known[recorded].removeprefix(known["prompt"]).startswith(text.rstrip()[:30])
