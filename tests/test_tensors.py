"""`merged_tensors`: the bytes of `run_plan`, without files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import build
import inlay
from inlay.errors import InputError


@pytest.mark.parametrize("torch_dtype", [None, "float16", "float32"])
def test_merged_tensors_are_the_bytes_that_run_plan_writes(tmp_path: Path, torch_dtype: str | None) -> None:
    base = build.write_base(tmp_path / "base", shards=2)
    adapter = build.write_adapter(tmp_path / "adapter")
    plan = inlay.make_plan(base, [adapter], torch_dtype=torch_dtype)
    inlay.run_plan(plan, tmp_path / "out")
    written = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        written |= build.read_tensors(file)
    found = dict(inlay.merged_tensors(plan))
    assert list(found) == list(plan.entries)
    for key, (_, shape, data) in written.items():
        assert tuple(found[key].shape) == shape
        assert found[key].contiguous().view(torch.uint8).numpy().tobytes() == data, key


def test_merged_tensors_yield_the_stored_type(tmp_path: Path) -> None:
    base = build.write_base(tmp_path / "base")
    plan = inlay.make_plan(base, [build.write_adapter(tmp_path / "adapter")])
    assert {t.dtype for _, t in inlay.merged_tensors(plan)} == {torch.bfloat16}


def test_overflow_while_loading_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    tensors = build.base_tensors()
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = np.full_like(tensors[key], 70000.0)
    base = build.write_model(tmp_path / "base", tensors)
    plan = inlay.make_plan(base, [build.write_adapter(tmp_path / "adapter")], torch_dtype="float16")
    with pytest.raises(InputError, match=key):
        list(inlay.merged_tensors(plan))
