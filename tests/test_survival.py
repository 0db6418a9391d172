"""How much of an adapter is in what is stored, against numpy; and what a base in floats is taken for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import BF16, CONFIG, F16, F32, write_json, write_model
from inlay import Quant, make_plan, run_plan, survival, verify
from inlay.cli.main import main
from inlay.errors import InputError
from inlay.run.survival import Survived, require_survival
from quantised_bases import (
    FORMS,
    HIDDEN,
    TOUCHED,
    Coded,
    Form,
    config_of,
    decode,
    delta,
    encode,
    floats,
    once,
    plain_tensors,
    stored,
    write_coded,
    write_lora,
)


def numbers(base: np.ndarray, merged: np.ndarray, kept: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """Elements, changed elements, squared error, product and squared length, by their definitions."""
    wanted, applied = merged - base, kept - base
    return np.array(
        [base.size, (kept != alone).sum(), ((applied - wanted) ** 2).sum(), (applied * wanted).sum(), (wanted**2).sum()]
    )


def check(found: Survived, wanted: Mapping[str, np.ndarray]) -> None:
    """Every tensor, and all of them together."""
    assert not found.sampled and {t.key for t in found.tensors} == set(wanted)
    every = [*((t, wanted[t.key or ""]) for t in found.tensors), (found.overall, sum(wanted.values()))]
    for got, (elements, changed, error, product, length) in every:
        assert got.elements == elements and got.changed == pytest.approx(changed / elements, abs=1e-12)
        assert got.kept == pytest.approx(product / length, rel=1e-9)
        assert got.error == pytest.approx(math.sqrt(error / length), rel=1e-6)


def coded_again(base: Coded, module: str, values: np.ndarray, fresh: bool) -> np.ndarray:
    settings, parts = base.settings[module], base.parts[module]
    known = {} if fresh else {p: a for p, a in parts.items() if p != next(iter(parts))}
    if settings.get("order") == "given":
        known["g_idx"] = parts["g_idx"]
    return decode(base.form, *encode(base.form, values, known, settings))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("scales", ["reuse", "fresh"])
def test_what_survives_in_codes(name: str, scales: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter", size=0.05)
    plan = make_plan(base.path, [adapter], quant=Quant(keep=True, scales=scales))
    wanted = {}
    for module in TOUCHED:
        before, merged = base.values[module], once(base.values[module] + delta(adapter, module), "F32")
        kept, alone = (coded_again(base, module, w, scales == "fresh") for w in (merged, before))
        wanted[f"{module}.weight"] = numbers(before, merged, kept, alone)
    check(survival(plan, full=True), wanted)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_survives_in_floats(dtype: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", "gptq-4"), write_lora(tmp_path / "adapter", size=0.01)
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    plan = make_plan(base.path, [adapter], torch_dtype=names[dtype])
    wanted = {}
    for module in TOUCHED:
        before, merged = base.values[module], once(base.values[module] + delta(adapter, module), "F32")
        wanted[f"{module}.weight"] = numbers(before, merged, once(merged, dtype), once(before, dtype))
    found = survival(plan, full=True)
    check(found, wanted)
    assert not found.lost and not found.coded


def test_an_adapter_that_adds_nothing_survives(tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter", size=0.0)
    found = survival(make_plan(base.path, [adapter], quant=Quant(keep=True)), full=True)
    assert (found.overall.kept, found.overall.error, found.overall.changed) == (1.0, 0.0, 0.0)
    assert survival(make_plan(base.path, [], torch_dtype="bfloat16")) is None


def test_less_than_half_is_refused(tmp_path: Path) -> None:
    """A delta far below the steps of four bits: nearly no code changes."""
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter", size=0.004)
    plan = make_plan(base.path, [adapter], quant=Quant(keep=True))
    found = survival(plan, full=True)
    assert found.lost and found.overall.kept < 0.5
    with pytest.raises(InputError, match="accept_loss"):
        require_survival(found)
    with pytest.raises(InputError, match="accept_loss"):
        run_plan(plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    run_plan(plan, tmp_path / "out", accept_loss=True)
    record = json.loads((tmp_path / "out" / "inlay.json").read_text())["survival"]
    assert record["kept"] == pytest.approx(found.overall.kept, rel=5e-3) and record["tensors"] == len(TOUCHED)


def test_a_sample_is_near_the_whole_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.run import survival as module

    monkeypatch.setattr(module, "SAMPLE_IN_CODES", (48, 1 << 11))
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter", size=0.05)
    plan = make_plan(base.path, [adapter], quant=Quant(keep=True))
    some, again, every = survival(plan), survival(plan), survival(plan, full=True)
    assert some == again and some.sampled and not every.sampled
    assert 0 < some.overall.elements < every.overall.elements
    assert some.overall.kept == pytest.approx(every.overall.kept, abs=0.1)


# --- a base in floats, and an adapter that was trained on a quantised load of it ----------------------

TRAINED = {
    "nf4": Form("bnb4", {"double_quant": True}),
    "nf4-single": Form("bnb4", {"double_quant": False}),
    "fp4": Form("bnb4", {"quant_type": "fp4", "double_quant": True}),
    "int8": Form("bnb8"),
}


def plain_base(place: Path, dtype: np.dtype = BF16) -> Path:
    return write_model(place, plain_tensors(dtype), config={**CONFIG, "hidden_size": HIDDEN})


def simulated(name: str, weight: np.ndarray) -> np.ndarray:
    """decode(encode(W)); a layer of int8 casts W to float16 before."""
    values = once(weight.astype(np.float64), "F16") if name == "int8" else weight.astype(np.float64)
    return decode(TRAINED[name], *encode(TRAINED[name], values))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_simulated_is_decode_of_encode(name: str, dtype: np.dtype, tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base", dtype), write_lora(tmp_path / "adapter")
    quant = Quant(base_as="simulated", trained_quant=name)
    plan = make_plan(base, [adapter], quant=quant)
    run_plan(plan, tmp_path / "out")
    kind = {BF16: "BF16", F16: "F16", F32: "F32"}[dtype]
    got, found = floats(tmp_path / "out"), stored(tmp_path / "out")
    for key, weight in plain_tensors(dtype).items():
        module = key.removesuffix(".weight")
        if "layers" not in key or len(weight.shape) != 2:
            assert found[key][2] == weight.tobytes(), key
            continue
        values = simulated(name, weight) + (delta(adapter, module) if module in TOUCHED else 0)
        assert np.array_equal(got[key], once(values, kind)), key
    assert any(f"decode(encode(W)) with {name}" in note for note in plan.notes)
    assert verify(base, [adapter], tmp_path / "out", quant=quant, full=True).exact


SWIFT: dict[str, tuple[dict[str, Any], str]] = {
    "nf4": ({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
    "nf4-single": ({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_use_double_quant": False}, "nf4-single"),
    "fp4": ({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    "int8": ({"quant_method": "bnb", "quant_bits": 8}, "int8"),
    "load_in_4bit": ({"load_in_4bit": True}, "nf4"),
    "load_in_8bit": ({"load_in_8bit": True}, "int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", SWIFT)
def test_how_it_was_trained_is_read_from_args_json(name: str, tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), write_lora(tmp_path / "adapter")
    args, form = SWIFT[name]
    write_json(adapter / "args.json", {"model": str(base), "train_type": "lora", **args})
    asked = make_plan(base, [adapter], quant=Quant(base_as="simulated", trained_quant=form))
    found = make_plan(base, [adapter], quant=Quant(base_as="simulated"))
    assert [e.source for e in found.entries.values()] == [e.source for e in asked.entries.values()]
    silent = make_plan(base, [adapter])
    assert any("base_as original" in w and "simulated" in w for w in silent.warnings)
    said = make_plan(base, [adapter], quant=Quant(base_as="original"))
    assert any("base_as original" in n for n in said.notes) and not any("base_as" in w for w in said.warnings)
    assert [e.source for e in said.entries.values()] == [e.source for e in silent.entries.values()]


def test_an_adapter_of_a_plain_base_is_not_warned_of(tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), write_lora(tmp_path / "adapter")
    write_json(adapter / "args.json", {"model": str(base), "train_type": "lora", "quant_method": None, "quant_bits": 0})
    assert not make_plan(base, [adapter]).warnings


def test_original_is_the_base_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = plain_base(tmp_path / "base"), write_lora(tmp_path / "adapter")
    words = ["--model", str(base), "--adapters", str(adapter), "--trained_quant", "nf4"]
    assert main(["plan", *words, "--base_as", "original"]) == 0
    assert "closer to training is --base_as simulated" in capsys.readouterr().out
    more = ["--merge_lora", "true", "--quiet", "--base_as", "original", "--output_dir", str(tmp_path / "out")]
    assert main(["export", *words, *more]) == 0
    got = floats(tmp_path / "out")
    for module in TOUCHED:
        weight = plain_tensors()[f"{module}.weight"].astype(np.float64)
        assert np.array_equal(got[f"{module}.weight"], once(weight + delta(adapter, module), "BF16"))
    assert config_of(tmp_path / "out") == config_of(base)
