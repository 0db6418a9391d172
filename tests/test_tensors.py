"""`merged_tensors`: the bytes of `run_plan`, without files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import build
import inlay
from inlay.errors import InputError
from inlay.run.blocks import Blocks


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


@pytest.mark.parametrize("kernel", [True, False])
def test_threads_that_share_a_tensor_make_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    base = build.write_base(tmp_path / "base")
    adapter = build.write_adapter(tmp_path / "adapter")
    plan = inlay.make_plan(base, [adapter])
    alone = dict(inlay.merged_tensors(plan))
    for name in ("KERNEL_TILE_BYTES", "FLOAT64_TILE_BYTES"):
        monkeypatch.setattr(f"inlay.plan.memory.{name}", 1)  # blocks of one row
    monkeypatch.setattr("inlay.run.tensors.threads", lambda: 3)
    if not kernel:
        monkeypatch.setattr("inlay.run.tensors.by_kernel", lambda entry: False)
    workers = set()
    of = Blocks.of

    def seen(self: Blocks, first: int, last: int, into: Any = None) -> Any:
        workers.add((self.entry.key, first))
        return of(self, first, last, into)

    monkeypatch.setattr(Blocks, "of", seen)
    together = dict(inlay.merged_tensors(plan))
    changed = [key for key, entry in plan.entries.items() if not entry.copied]
    assert len(workers) == 3 * len(changed)
    assert all(torch.equal(together[key], alone[key]) for key in plan.entries)
    base_values = build.read_arrays(base)
    assert not any(np.array_equal(together[k].float().numpy(), base_values[k].astype(np.float32)) for k in changed)


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
