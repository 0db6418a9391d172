"""Codes through the command line: what each option gives, and what is refused with exit code 2 and nothing left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import HIDDEN, write_base, write_json, write_model
from inlay.cli.main import main
from quantised_bases import (
    FORMS,
    TOUCHED,
    Form,
    config_of,
    encode,
    floats,
    once,
    plain_tensors,
    stored,
    typed,
    write_coded,
    write_lora,
)
from quantised_bases import decode as decoded
from quantised_bases import delta as added

# --quant_method and its options -> the form of which all linear weights are
METHODS: dict[str, tuple[list[str], Form]] = {
    "bnb-4": (["--quant_method", "bnb", "--quant_bits", "4"], Form("bnb4")),
    "bnb-fp4": (
        ["--quant_method", "bnb", "--quant_bits", "4", "--quant_config", '{"quant_type": "fp4", "double_quant": false}'],
        Form("bnb4", {"quant_type": "fp4", "double_quant": False}),
    ),
    "bnb-8": (["--quant_method", "bnb", "--quant_bits", "8"], Form("bnb8")),
    "fp8": (["--quant_method", "fp8"], Form("compressed", {"scheme": "FP8_DYNAMIC"})),
    "fp8-block": (
        ["--quant_method", "fp8", "--quant_config", '{"strategy": "block"}'], Form("fp8", {"strategy": "block"}),
    ),
    "fp8-tensor": (
        ["--quant_method", "fp8", "--quant_config", '{"strategy": "tensor"}'], Form("fp8", {"strategy": "tensor"}),
    ),
    "int8": (["--quant_method", "int8"], Form("compressed", {"scheme": "W8A8"})),
    "mxfp4": (["--quant_method", "mxfp4"], Form("compressed_fp4", {"scheme": "MXFP4A16"})),
    "rtn-4": (
        ["--quant_method", "rtn", "--quant_bits", "4", "--group_size", "32"],
        Form("compressed_pack", {"scheme": "W4A16", "group_size": 32}),
    ),
    "rtn-8": (
        ["--quant_method", "rtn", "--quant_bits", "8", "--group_size", "32"],
        Form("compressed_pack", {"scheme": "W8A16", "group_size": 32}),
    ),
}  # fmt: skip


def plain_base(place: Path) -> Path:
    from build import CONFIG
    from quantised_bases import HIDDEN as WIDE

    return write_model(place, plain_tensors(), shards=2, config={**CONFIG, "hidden_size": WIDE})


def export(*words: Any) -> int:
    return main(["export", *map(str, words), "--quiet"])


@pytest.mark.parametrize("name", METHODS)
def test_the_merged_weights_are_quantised_in_one_command(name: str, tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), write_lora(tmp_path / "adapter")
    words, form = METHODS[name]
    out = tmp_path / "out"
    assert not export(
        "--model", base, "--adapters", adapter, "--merge_lora", "true", "--output_dir", out, "--accept_loss", "true",
        "--verify", "full", *words,
    )  # fmt: skip
    plain, found, config = plain_tensors(), stored(out), config_of(out)["quantization_config"]
    layout: dict[str, Any] = {}
    for key, weight in plain.items():
        module = key.removesuffix(".weight")
        if "layers" not in key or len(weight.shape) != 2:
            assert found[key][2] == weight.tobytes(), key
            layout[key] = found[key][:2]
            continue
        values = weight.astype(np.float64) + (added(adapter, module) if module in TOUCHED else 0)
        parts, settings = encode(form, once(values, "F32"))
        stem = key.removesuffix(form.file.NAME_SUFFIX)
        for part, array in typed(form, parts, settings).items():
            at = stem + {**form.file.PARTS, **form.file.OPTIONAL}[part]
            assert found[at][2] == array.tobytes(), at
            layout[at] = found[at][:2]
        assert config == json.loads(json.dumps(form.file.config(settings, ["model.embed_tokens", "lm_head"]))), name
    assert {k: v[:2] for k, v in found.items()} == layout
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(len(v[2]) for v in found.values())
    assert not export("--model", out, "--torch_dtype", "float32", "--output_dir", tmp_path / "read")
    module = TOUCHED[1]
    parts, settings = encode(form, once(plain[f"{module}.weight"].astype(np.float64) + added(adapter, module), "F32"))
    assert np.array_equal(floats(tmp_path / "read")[f"{module}.weight"], decoded(form, parts, settings))


def test_16_bits_are_kept_where_asked(tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), write_lora(tmp_path / "adapter")
    assert not export(
        "--model", base, "--adapters", adapter, "--merge_lora", "true", "--output_dir", tmp_path / "out",
        *METHODS["rtn-4"][0], "--keep_16bit", r"layers\.0\.self_attn", "--accept_loss", "true",
    )  # fmt: skip
    assert stored(tmp_path / "out")[f"{TOUCHED[0]}.weight"][0] == "BF16"
    assert TOUCHED[0] in config_of(tmp_path / "out")["quantization_config"]["ignore"]


def test_auto_leaves_the_worst_in_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two modules one has a delta far below the steps of its codes."""
    base = write_coded(tmp_path / "base", "ct-w4")
    small = write_lora(tmp_path / "small", TOUCHED[:1], size=0.004)
    large = write_lora(tmp_path / "large", TOUCHED[1:], size=0.3)
    words = ["--model", base.path, "--adapters", small, large, "--merge_lora", "true", "--keep_quant", "true"]
    assert not export(*words, "--keep_16bit", "auto", "--output_dir", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert f"{TOUCHED[0]}.weight" in found and f"{TOUCHED[1]}.weight" not in found


# --- what is refused ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown method": (["--quant_method", "exl9"], "exl9"),
    "bits of another method": (["--quant_method", "fp8", "--quant_bits", "4"], "8 bits, not 4"),
    "no bits": (["--quant_method", "rtn"], "needs it"),
    "bits without a method": (["--quant_bits", "4"], "--quant_method"),
    "groups without a method": (["--group_size", "64"], "--quant_method"),
    "groups that do not divide": (["--quant_method", "rtn", "--quant_bits", "4", "--group_size", "40"], "40"),
    "an option that is not there": (["--quant_method", "int8", "--quant_config", '{"colour": 1}'], "colour"),
    "a strategy that is not there": (["--quant_method", "fp8", "--quant_config", '{"strategy": "row"}'], "row"),
    "no JSON": (["--quant_method", "int8", "--quant_config", "{"], "not JSON"),
    "JSON that is no object": (["--quant_method", "int8", "--quant_config", "[1]"], "object"),
    "keeping codes that are not there": (["--keep_quant", "true"], "not stored in codes"),
    "scales without codes": (["--scales", "fresh"], "--keep_quant"),
    "16 bits without codes": (["--keep_16bit", "q_proj"], "in floats"),
    "the worst without codes": (["--keep_16bit", "auto"], "in floats"),
    "no pattern": (["--quant_method", "int8", "--keep_16bit", "("], "no pattern"),
    "dequantised floats": (["--base_as", "dequantised"], "not stored in codes"),
    "simulated without saying how": (["--base_as", "simulated"], "--trained_quant"),
    "trained on something else": (["--base_as", "simulated", "--trained_quant", "q4_k"], "q4_k"),
    "calibration for what needs none": (["--quant_method", "int8", "--quant_n_samples", "4"], "quant_n_samples"),
}  # fmt: skip
REFUSED_ON_CODES: dict[str, tuple[list[str], str]] = {
    "two ways to store it": (["--keep_quant", "true", "--quant_method", "int8"], "contradict"),
    "codes in another type": (["--keep_quant", "true", "--fp16", "true"], "leave --torch_dtype"),
    "simulated codes": (["--base_as", "simulated", "--trained_quant", "nf4"], "16-bit original"),
    "original codes": (["--base_as", "original"], "16-bit original"),
    "16 bits of a result in floats": (["--keep_16bit", "q_proj"], "in floats"),
}


def refused(place: Path, capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What is said; exit code 2, for export and plan, and nothing is there that was not before."""
    before = sorted(str(p) for p in place.rglob("*"))
    said = []
    for command in ("export", "plan"):
        where = ["--output_dir", str(place / "out")] if command == "export" else []
        more = [w for w in map(str, words) if command == "export" or w not in ("--merge_lora",)]
        assert main([command, *more, *where]) == 2
        said.append(capsys.readouterr().err)
        assert sorted(str(p) for p in place.rglob("*")) == before
    assert "Traceback" not in said[0]
    return said[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = plain_base(tmp_path / "base"), write_lora(tmp_path / "adapter")
    words, message = REFUSED[name]
    inputs = ["--model", base, "--adapters", adapter, "--merge_lora"]
    if name.startswith("calibration"):
        assert export(*inputs, *words, "--output_dir", tmp_path / "out") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
        return
    assert message in refused(tmp_path, capsys, *inputs, *words)


@pytest.mark.parametrize("name", REFUSED_ON_CODES)
def test_what_codes_contradict_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter")
    words, message = REFUSED_ON_CODES[name]
    said = refused(tmp_path, capsys, "--model", base.path, "--adapters", adapter, "--merge_lora", *words)
    assert message in said


@pytest.mark.parametrize("name", ["bnb-nf4", "gptq-4", "awq-gemm", "ct-w4", "fp8-block", "mlx-4"])
def test_quantising_what_is_quantised_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_coded(tmp_path / "base", name)
    said = refused(tmp_path, capsys, "--model", base.path, "--quant_method", "int8")
    assert "in codes already" in said


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["unknown", "partner", "shape"])
def test_codes_that_cannot_be_understood_are_refused(
    name: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown quant_method, codes without their scales, and scales of another shape."""
    adapter = write_lora(tmp_path / "adapter")
    module, form = TOUCHED[0], FORMS[name]
    endings = {**form.file.PARTS, **form.file.OPTIONAL}
    stem = f"{module}.weight".removesuffix(form.file.NAME_SUFFIX)
    partners = ("scales", "absmax", "SCB", "scale", "weight_scale", "weight_scale_inv")
    places = [stem + endings[partner] for partner in partners if partner in endings]

    def arrange(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        where = next(place for place in places if place in tensors)
        if how == "partner":
            return {k: v for k, v in tensors.items() if k != where}
        if how == "shape":
            return {**tensors, where: np.concatenate([np.atleast_1d(tensors[where])] * 3)}
        return tensors

    base = write_coded(tmp_path / "base", name, arrange=arrange)
    if how == "unknown":
        config = config_of(base.path)
        quant = {**config["quantization_config"], "quant_method": "exl9"}
        write_json(base.path / "config.json", {**config, "quantization_config": quant})
    said = refused(tmp_path, capsys, "--model", base.path, "--adapters", adapter, "--merge_lora")
    assert ("exl9" if how == "unknown" else module.rpartition(".")[0]) in said


def test_a_config_without_codes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from build import CONFIG

    quant = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    base = write_base(tmp_path / "base", config={**CONFIG, "quantization_config": quant})
    from build import write_adapter

    adapter = write_adapter(tmp_path / "adapter")
    assert HIDDEN == 16
    said = refused(tmp_path, capsys, "--model", base, "--adapters", adapter, "--merge_lora")
    assert "holds no codes" in said


def test_half_of_the_adapter_must_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter", size=0.004)
    words = ["--model", base.path, "--adapters", adapter, "--merge_lora", "--keep_quant", "true"]
    said = refused(tmp_path, capsys, *words)
    for alternative in ("--accept_loss", "16 bits", "--scales fresh", "--keep_16bit", "gptq or awq"):
        assert alternative in said
    assert not export(*words, "--accept_loss", "true", "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "inlay.json").read_text())["survival"]["kept"] < 0.5
    assert not export(*words[:-2], "--output_dir", tmp_path / "floats")  # 16 bits need no leave
