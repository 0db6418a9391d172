"""The record of the base that an adapter was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import build
import inlay
from inlay.cli.main import main
from inlay.errors import InputError, PlanError
from inlay.records.fingerprint import make_fingerprint

KEY = "model.layers.0.self_attn.q_proj.weight"


def record(adapter: Path, base: Path) -> None:
    """What `inlay sft` leaves beside an adapter: the fingerprint of its base."""
    checkpoint = inlay.open_checkpoint(base)
    keys = [f"{module}.weight" for module in inlay.read_adapter(adapter).parts]
    build.write_json(adapter / "inlay_base.json", make_fingerprint(checkpoint, keys))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an adapter that records it."""
    base, adapter = build.write_base(tmp_path / "base", seed=1), build.write_adapter(tmp_path / "adapter")
    record(adapter, base)
    return base, adapter


def test_the_recorded_base_is_accepted(tmp_path: Path, trained: tuple[Path, Path]) -> None:
    base, adapter = trained
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "out")
    assert (tmp_path / "out" / "inlay.json").exists()


@pytest.mark.parametrize("torch_dtype", [None, "float32"])
def test_another_base_of_the_same_shapes_is_refused_and_nothing_is_left(
    tmp_path: Path, trained: tuple[Path, Path], torch_dtype: str | None
) -> None:
    other = build.write_base(tmp_path / "other", seed=2)
    plan = inlay.make_plan(other, [trained[1]], torch_dtype=torch_dtype)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match=r"trained on another base: model\.layers"):
        inlay.run_plan(plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_another_base_of_other_shapes_is_a_problem_of_the_plan(tmp_path: Path, trained: tuple[Path, Path]) -> None:
    other = build.write_base(tmp_path / "other", layers=3)
    with pytest.raises(PlanError, match="was trained on another base"):
        inlay.make_plan(other, [trained[1]])


def test_the_same_base_in_other_shards_is_accepted(tmp_path: Path, trained: tuple[Path, Path]) -> None:
    other = build.write_base(tmp_path / "other", seed=1, shards=3)
    inlay.run_plan(inlay.make_plan(other, [trained[1]]), tmp_path / "out")


def test_one_changed_element_of_the_base_is_noticed(
    tmp_path: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = trained
    tensors = build.base_tensors(seed=1)
    tensors[KEY][3, 5] += 1
    changed = build.write_model(tmp_path / "changed", tensors)
    command = f"export --model {changed} --adapters {adapter} --merge_lora --output_dir {tmp_path / 'out'} --quiet"
    assert main(command.split()) == 2
    assert KEY in capsys.readouterr().err
    assert json.loads((adapter / "inlay_base.json").read_text())["tensors"][KEY].startswith("blake3:")


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("what", ["codes", "scales"])
def test_of_a_base_in_codes_codes_and_scales_are_recorded_and_checked(tmp_path: Path, form: str, what: str) -> None:
    from inlay.train.records import fingerprint

    base, adapter = build.write_base(tmp_path / "base", seed=1), build.write_adapter(tmp_path / "adapter")
    coded = tmp_path / "coded"
    assert main(f"export --model {base} --quant_method {form} --output_dir {coded} --quiet".split()) == 0
    build.write_json(adapter / "inlay_base.json", fingerprint(coded, adapter))
    keys = json.loads((adapter / "inlay_base.json").read_text())["tensors"]
    key = next(k for k in keys if "q_proj" in k and ("scale" in k or k.endswith("SCB")) == (what == "scales"))
    command = f"export --model {coded} --adapters {adapter} --merge_lora --quiet --exist_ok --output_dir {tmp_path}/out"
    assert main(command.split()) == 0
    verify = f"verify --model {coded} --adapters {adapter} --merged {tmp_path}/out --quiet"
    assert main(verify.split()) == 0
    _flip(coded, key)
    shutil.rmtree(tmp_path / "out")
    assert main(command.split()) == 2 and not (tmp_path / "out").exists()


def test_verify_refuses_a_base_that_is_not_the_recorded_one(
    tmp_path: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = trained
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "out")
    other = build.write_base(tmp_path / "other", seed=2)
    assert main(f"verify --model {other} --adapters {adapter} --merged {tmp_path / 'out'}".split()) == 2
    assert "trained on another base" in capsys.readouterr().err


def test_a_base_whose_embedding_a_full_copy_replaces_is_checked_there_too(tmp_path: Path) -> None:
    from inlay.train.records import fingerprint

    base = build.write_base(tmp_path / "base", seed=1)
    tensors = build.adapter_tensors(build.modules_of())
    tensors[f"{build.PREFIX}lm_head.weight"] = build.base_tensors(seed=3)["lm_head.weight"]
    adapter = build.write_adapter(tmp_path / "adapter", tensors=tensors, modules_to_save=["lm_head"])
    record = fingerprint(base, adapter)
    assert "lm_head.weight" in record["tensors"]
    build.write_json(adapter / "inlay_base.json", record)
    inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "out")
    _flip(base, "lm_head.weight")
    with pytest.raises(InputError, match=r"trained on another base: lm_head"):
        inlay.run_plan(inlay.make_plan(base, [adapter]), tmp_path / "no")


def _flip(model: Path, key: str) -> None:
    """One bit of a stored tensor becomes another."""
    checkpoint = inlay.open_checkpoint(model)
    shard, info = checkpoint.tensors[key]
    path = model / shard.file
    data = bytearray(path.read_bytes())
    data[info.start] ^= 1
    path.write_bytes(data)
