"""Where a checkpoint says how its codes are stored: sections of config.json, files of their own, or nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import write_json
from inlay import Quant, make_plan, run_plan, verify
from inlay.errors import PlanError
from quantised_bases import TOUCHED, config_of, delta, floats, once, write_coded, write_lora

OWN_FILE = {"gptq-4": "quantize_config.json", "awq-gemm": "quant_config.json"}


def without_section(base: Path) -> dict[str, Any]:
    """Takes `quantization_config` out of config.json."""
    config = config_of(base)
    section: dict[str, Any] = config.pop("quantization_config")
    write_json(base / "config.json", config)
    return section


@pytest.mark.parametrize("name", ["fp8-block", "fp8-tensor"])
def test_fp8_saved_without_its_config_is_decoded(name: str, tmp_path: Path) -> None:
    """transformers 5.19 to 5.23 save an FP8 model so, and load it as noise."""
    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter")
    without_section(base.path)
    run_plan(make_plan(base.path, [adapter]), tmp_path / "out")
    got = floats(tmp_path / "out")
    for module, values in base.values.items():
        wanted = values + (delta(adapter, module) if module in TOUCHED else 0)
        assert np.array_equal(got[f"{module}.weight"], once(wanted, "BF16"))
    assert verify(base.path, [adapter], tmp_path / "out", full=True).exact


@pytest.mark.parametrize("name", OWN_FILE)
def test_a_file_of_its_own_describes_the_codes(name: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter")
    section = without_section(base.path)
    write_json(base.path / OWN_FILE[name], {k: v for k, v in section.items() if k != "quant_method"})
    plan = make_plan(base.path, [adapter])
    run_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out" / OWN_FILE[name]).exists() and OWN_FILE[name] in plan.left_out
    got = floats(tmp_path / "out")[f"{TOUCHED[0]}.weight"]
    assert np.array_equal(got, once(base.values[TOUCHED[0]] + delta(adapter, TOUCHED[0]), "BF16"))


@pytest.mark.parametrize("name", OWN_FILE)
@pytest.mark.parametrize("both", [False, True])
def test_what_stays_in_16_bits_is_said_wherever_codes_are_described(name: str, both: bool, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter")
    section = config_of(base.path)["quantization_config"] if both else without_section(base.path)
    write_json(base.path / OWN_FILE[name], section)
    quant = Quant(keep=True, keep_16bit="q_proj$")
    run_plan(make_plan(base.path, [adapter], quant=quant), tmp_path / "out", accept_loss=True)
    told = [json.loads((tmp_path / "out" / OWN_FILE[name]).read_text())]
    told += [config_of(tmp_path / "out")["quantization_config"]] if both else []
    for description in told:
        assert TOUCHED[0] in json.dumps(description).replace("\\\\", "")
        assert {
            k: v for k, v in section.items() if k not in ("dynamic", "modules_to_not_convert")
        }.items() <= description.items()
    run_plan(make_plan(tmp_path / "out", [], torch_dtype="float32"), tmp_path / "read")
    got = floats(tmp_path / "read")
    assert np.array_equal(got[f"{TOUCHED[0]}.weight"], floats(tmp_path / "out")[f"{TOUCHED[0]}.weight"])


def test_a_section_of_the_language_model_is_edited_in_its_place(tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter")
    section = without_section(base.path)
    write_json(base.path / "config.json", {**config_of(base.path), "text_config": {"quantization_config": section}})
    quant = Quant(keep=True, keep_16bit="q_proj$")
    run_plan(make_plan(base.path, [adapter], quant=quant), tmp_path / "out", accept_loss=True)
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert config["text_config"]["quantization_config"]["ignore"] == [*section["ignore"], TOUCHED[0]]
    run_plan(make_plan(base.path, [adapter]), tmp_path / "floats")
    assert config_of(tmp_path / "floats")["text_config"] == {}


def test_codes_in_another_form_replace_every_description(tmp_path: Path) -> None:
    """A base in one form, merged onto and stored in another: nothing tells of the first."""
    base, adapter = write_coded(tmp_path / "base", "gptq-4"), write_lora(tmp_path / "adapter")
    section = config_of(base.path)["quantization_config"]
    write_json(base.path / "quantize_config.json", section)
    write_json(base.path / "config.json", {**config_of(base.path), "compression_config": {"was": "here"}})
    run_plan(make_plan(base.path, [adapter], quant=Quant(method="int8")), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "compression_config" not in config and not (tmp_path / "out" / "quantize_config.json").exists()
    assert verify(base.path, [adapter], tmp_path / "out", quant=Quant(method="int8"), full=True).exact


def test_codes_for_modules_that_the_config_excludes_are_a_contradiction(tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter")
    config = config_of(base.path)
    config["quantization_config"]["ignore"].append(TOUCHED[0])
    write_json(base.path / "config.json", config)
    with pytest.raises(PlanError) as error:
        make_plan(base.path, [adapter])
    assert "ignore" in str(error.value) and TOUCHED[0] in str(error.value)


def test_transformers_is_told_which_modules_of_gptq_have_codes(tmp_path: Path) -> None:
    """optimum makes a layer of codes of every linear layer in a block, whatever `dynamic` says."""
    base, adapter = write_coded(tmp_path / "base", "gptq-4"), write_lora(tmp_path / "adapter")
    quant = Quant(keep=True, keep_16bit="q_proj$")
    run_plan(make_plan(base.path, [adapter], quant=quant), tmp_path / "out", accept_loss=True)
    section = config_of(tmp_path / "out")["quantization_config"]
    kept = [module.removeprefix("model.") for module in base.values if module != TOUCHED[0]]
    assert [sorted(names) for names in section["modules_in_block_to_quantize"]] == [sorted(kept)] and kept[
        0
    ].startswith("layers.0.")
    assert list(section["dynamic"])[-1:] == [f"-:^{TOUCHED[0].replace('.', chr(92) + '.')}$"]
