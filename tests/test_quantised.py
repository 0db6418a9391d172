"""Bases in codes: decoded, merged onto, kept in their codes; every stored form against numpy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from build import listing
from inlay import Quant, make_plan, run_plan, verify
from inlay.verification.report import Report
from oracle import header
from quantised_bases import (
    FORMS,
    TORCH_NAMES,
    TOUCHED,
    Coded,
    config_of,
    decode,
    delta,
    encode,
    floats,
    once,
    plain_tensors,
    stored,
    typed,
    write_coded,
    write_lora,
)

every_form = pytest.mark.parametrize("name", FORMS)


def values_after(base: Coded, adapter: Path) -> dict[str, np.ndarray]:
    """Weights of the touched modules, float32: W + s B A rounded once."""
    return {m: once(base.values[m] + delta(adapter, m), "F32") for m in TOUCHED}


def expected_parts(base: Coded, module: str, values: np.ndarray, *, fresh: bool) -> dict[str, np.ndarray]:
    """Parts of a weight that is encoded again, as they are in a file."""
    settings, codes = base.settings[module], next(iter(base.parts[module]))
    known = {} if fresh else {p: a for p, a in base.parts[module].items() if p != codes}
    if "g_idx" in base.parts[module] and settings["order"] == "given":
        known["g_idx"] = base.parts[module]["g_idx"]
    parts, settings = encode(base.form, values, known, settings)
    return typed(base.form, parts, settings)


def passes(base: Coded, adapters: list[Path], out: Path, **more: object) -> Report:
    return verify(base.path, adapters, out, full=True, **more)


@every_form
@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_a_base_is_decoded_and_rounded_once(name: str, dtype: str, tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", name, shards=2)
    plan = make_plan(base.path, [], torch_dtype=TORCH_NAMES[dtype])
    run_plan(plan, tmp_path / "out")
    plain, found = plain_tensors(), stored(tmp_path / "out")
    assert set(found) == set(plain)
    got = floats(tmp_path / "out")
    for key, weight in plain.items():
        values = base.values.get(key.removesuffix(".weight"), weight.astype(np.float64))
        assert found[key][:2] == (dtype, weight.shape), key
        assert np.array_equal(got[key], once(values, dtype)), key
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config and config["torch_dtype"] == TORCH_NAMES[dtype]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(plain)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in found.values())
    assert passes(base, [], tmp_path / "out", torch_dtype=TORCH_NAMES[dtype]).exact


@every_form
def test_a_merge_adds_to_what_the_codes_mean(name: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter")
    plan = make_plan(base.path, [adapter])
    run_plan(plan, tmp_path / "out")
    found, got, before = stored(tmp_path / "out"), floats(tmp_path / "out"), stored(base.path)
    assert set(found) == set(plain_tensors())
    for module, values in base.values.items():
        wanted = values + delta(adapter, module) if module in TOUCHED else values
        assert found[f"{module}.weight"][0] == "BF16"
        assert np.array_equal(got[f"{module}.weight"], once(wanted, "BF16")), module
    for key in found.keys() & before.keys() - {f"{m}.weight" for m in base.values}:
        assert found[key] == before[key], key
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert any("base_as dequantised" in note for note in plan.notes)
    manifest = json.loads((tmp_path / "out" / "inlay.json").read_text())
    assert any("base_as dequantised" in note for note in manifest["notes"])
    assert passes(base, [adapter], tmp_path / "out").exact


@every_form
@pytest.mark.parametrize("scales", ["reuse", "fresh"])
def test_codes_are_kept(name: str, scales: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name, shards=3), write_lora(tmp_path / "adapter")
    quant = Quant(keep=True, scales=scales)
    run_plan(make_plan(base.path, [adapter], quant=quant), tmp_path / "out", accept_loss=True)
    found, before = stored(tmp_path / "out"), stored(base.path)
    names = [p.name for p in sorted(base.path.glob("*.safetensors"))]
    assert [list(header(tmp_path / "out" / n)) for n in names] == [list(header(base.path / n)) for n in names]
    assert {k: v[:2] for k, v in found.items() if "quant_state" not in k} == {
        k: v[:2] for k, v in before.items() if "quant_state" not in k
    }
    after = values_after(base, adapter)
    touched = {base.key(m, part): (m, part) for m in TOUCHED for part in base.parts[m]}
    wanted = {m: expected_parts(base, m, after[m], fresh=scales == "fresh") for m in TOUCHED}
    for key in before:
        if key in touched:
            module, part = touched[key]
            assert found[key][2] == wanted[module][part].tobytes(), key
        else:
            assert found[key] == before[key], key
    for module in TOUCHED:  # and they mean something else than before
        codes = base.key(module, next(iter(base.parts[module])))
        assert found[codes][2] != before[codes][2]
    for file in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base.path / file).read_bytes()
    assert passes(base, [adapter], tmp_path / "out", quant=quant).exact


@every_form
def test_a_zero_adapter_keeps_the_codes(name: str, tmp_path: Path) -> None:
    """decode then encode with the stored scales is nothing, in a checkpoint too."""
    if name == "ct-nvfp4" or name == "modelopt-nvfp4" or "mxfp4" in name or name == "bnb-fp4":
        same_values = True  # two codes for zero
    else:
        same_values = False
    base = write_coded(tmp_path / "base", name)
    adapter = write_lora(tmp_path / "adapter", size=0.0)
    run_plan(make_plan(base.path, [adapter], quant=Quant(keep=True)), tmp_path / "out")
    if same_values:
        run_plan(make_plan(tmp_path / "out", [], torch_dtype="float32"), tmp_path / "again")
        got = floats(tmp_path / "again")
        assert all(np.array_equal(got[f"{m}.weight"], values) for m, values in base.values.items())
    else:
        assert stored(tmp_path / "out") == stored(base.path)


@every_form
def test_modules_stay_in_16_bits(name: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter")
    quant = Quant(keep=True, keep_16bit="q_proj$", scales="fresh")
    run_plan(make_plan(base.path, [adapter], quant=quant), tmp_path / "out", accept_loss=True)
    left, again = TOUCHED
    found, before, config = stored(tmp_path / "out"), stored(base.path), config_of(tmp_path / "out")
    assert found[f"{left}.weight"][0] == "BF16"
    assert np.array_equal(
        floats(tmp_path / "out")[f"{left}.weight"], once(base.values[left] + delta(adapter, left), "BF16")
    )
    gone = {base.key(left, part) for part in base.parts[left]} - {f"{left}.weight"}
    assert set(found) == set(before) - gone | {f"{left}.weight"}
    assert (
        found[base.key(again, next(iter(base.parts[again])))][0]
        == before[base.key(again, next(iter(base.parts[again])))][0]
    )
    told = json.dumps(config["quantization_config"])
    assert left in told.replace("\\\\", "") and told != json.dumps(config_of(base.path)["quantization_config"])
    assert passes(base, [adapter], tmp_path / "out", quant=quant).exact
    run_plan(make_plan(tmp_path / "out", [], torch_dtype="float32"), tmp_path / "read")  # the new config is understood
    got = floats(tmp_path / "read")
    other = next(m for m in base.values if m not in TOUCHED)
    assert np.array_equal(got[f"{other}.weight"], base.values[other])
    assert np.array_equal(got[f"{left}.weight"], floats(tmp_path / "out")[f"{left}.weight"])


@every_form
def test_excluded_modules_are_merged_in_floats(name: str, tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", name, excluded=["lm_head", TOUCHED[0]])
    adapter = write_lora(tmp_path / "adapter")
    for keep in (False, True):
        out = tmp_path / f"out{keep}"
        run_plan(make_plan(base.path, [adapter], quant=Quant(keep=keep)), out, accept_loss=True)
        weight = plain_tensors()[f"{TOUCHED[0]}.weight"].astype(np.float64)
        got = floats(out)[f"{TOUCHED[0]}.weight"]
        assert np.array_equal(got, once(weight + delta(adapter, TOUCHED[0]), "BF16"))
        assert ("quantization_config" in config_of(out)) == keep
        assert passes(base, [adapter], out, quant=Quant(keep=keep)).exact


@pytest.mark.parametrize("name", ["bnb-nf4-double", "gptq-desc-act", "awq-gemm", "ct-w4-asym", "fp8-block", "mlx-4"])
@pytest.mark.parametrize("keep", [False, True])
def test_partners_may_lie_in_other_shards(name: str, keep: bool, tmp_path: Path) -> None:
    """Scales far away from their codes: the same tensors as from one file."""
    adapter, quant = write_lora(tmp_path / "adapter"), Quant(keep=keep, scales="fresh" if keep else None)

    def apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        codes = [k for k in tensors if k.endswith((".weight", ".qweight", ".weight_packed"))]
        return {k: tensors[k] for k in [*codes, *(k for k in tensors if k not in codes)]}

    one = write_coded(tmp_path / "one", name)
    many = write_coded(tmp_path / "many", name, shards=5, arrange=apart)
    for base in (one, many):
        out = tmp_path / f"{base.path.name}-out"
        run_plan(make_plan(base.path, [adapter], quant=quant), out, accept_loss=True)
        assert passes(base, [adapter], out, quant=quant).exact
    assert stored(tmp_path / "many-out") == stored(tmp_path / "one-out")
    index = json.loads((tmp_path / "many-out" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "many-out").glob("*.safetensors")}
    assert set(index["weight_map"]) == set(stored(tmp_path / "many-out"))
    assert set(index["weight_map"].values()) == files


def test_partners_are_apart_in_that_test(tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", "awq-gemm", shards=5)
    index = json.loads((base.path / "model.safetensors.index.json").read_text())["weight_map"]
    stems = [m for m in base.values if len({index[base.key(m, p)] for p in base.parts[m]}) > 1]
    assert stems and set(listing(base.path)) > {"config.json"}


def test_shards_that_grow_beyond_the_usual_are_laid_out_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.plan import layout

    base = write_coded(tmp_path / "base", "bnb-nf4", shards=2)
    sizes = [p.stat().st_size for p in base.path.glob("*.safetensors")]
    monkeypatch.setattr(layout, "USUAL_SHARD_BYTES", max(sizes))
    kept = make_plan(base.path, [write_lora(tmp_path / "adapter")], quant=Quant(keep=True))
    assert len(kept.shards) == 2  # nothing grows
    run_plan(make_plan(base.path, [], torch_dtype="bfloat16"), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(f.name.endswith(f"-of-{len(files):05d}.safetensors") for f in files)
    assert all(f.stat().st_size <= max(sizes) + 4096 for f in files)
    got = floats(tmp_path / "out")
    assert all(np.array_equal(got[f"{m}.weight"], once(v, "BF16")) for m, v in base.values.items())


def test_golden_decode_is_the_oracle() -> None:
    """The values of a form here are those of its formula: an nf4 weight by hand."""
    form = FORMS["bnb-nf4"]
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    parts, settings = encode(form, weight)
    byte = parts["weight"].reshape(-1)
    codes = np.stack([byte >> 4, byte & 15], 1).reshape(4, 64)
    by_hand = parts["quant_map"][codes] * parts["absmax"].reshape(4, 1)
    assert np.array_equal(decode(form, parts, settings), by_hand.astype(np.float32).astype(np.float64))
