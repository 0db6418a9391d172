"""Codes while they are written and checked: every bit counts, and interruptions, threads and memory do not."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from build import BF16, CONFIG, write_model
from inlay import Quant, make_plan, run_plan, verify
from inlay.errors import InputError, PlanError
from inlay.output.staging import Staging
from inlay.plan.types import Plan
from inlay.run.survival import Survival, Survived
from oracle import header
from quantised_bases import FORMS, LINEARS, TOUCHED, Coded, decode, encode, stored, typed, write_coded, write_lora

every_form = pytest.mark.parametrize("name", FORMS)
SOME = ("bnb-nf4-double", "gptq-desc-act", "awq-gemm", "ct-nvfp4", "fp8-tensor", "hqq-4", "mlx-6")
FRESH = Quant(keep=True, scales="fresh")
FLIPS = 3  # of each part
ALL_KEPT = Survived((), Survival(None, 0, 0.0, 0.0, 1.0), True, False)


@every_form
@pytest.mark.parametrize("scales", ["reuse", "fresh"])
def test_every_changed_bit_is_reported(name: str, scales: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter", TOUCHED[:1])
    quant = Quant(keep=True, scales=scales)
    run_plan(make_plan(base.path, [adapter], quant=quant), tmp_path / "out", accept_loss=True)
    (tmp_path / "out" / "inlay.json").unlink()  # whose digests would tell as well
    file, rng = tmp_path / "out" / "model.safetensors", np.random.default_rng(FLIPS)
    raw, places = file.read_bytes(), header(file)
    data = 8 + int.from_bytes(raw[:8], "little")
    for part in base.parts[TOUCHED[0]]:
        begin, end = places[base.key(TOUCHED[0], part)]["data_offsets"]
        for _ in range(FLIPS):
            changed = bytearray(raw)
            at, bit = data + int(rng.integers(begin, end)), int(rng.integers(8))
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            assert not verify(base.path, [adapter], tmp_path / "out", quant=quant, full=True).exact, (part, at, bit)


def test_the_sign_of_a_zero_is_a_bit(tmp_path: Path) -> None:
    """Of scales that are floats, -0.0 is not 0.0: the table of nf4 holds one."""
    base, adapter = write_coded(tmp_path / "base", "bnb-nf4"), write_lora(tmp_path / "adapter")
    run_plan(make_plan(base.path, [adapter], quant=FRESH), tmp_path / "out", accept_loss=True)
    (tmp_path / "out" / "inlay.json").unlink()
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    start = header(file)[base.key(TOUCHED[0], "quant_map")]["data_offsets"][0]
    at = 8 + int.from_bytes(raw[:8], "little") + start + 4 * 7
    assert raw[at : at + 4] == b"\0\0\0\0"
    raw[at + 3] = 0x80
    file.write_bytes(raw)
    assert not verify(base.path, [adapter], tmp_path / "out", quant=FRESH, full=True).ok


def test_codes_that_were_not_merged_are_told_from_wrong_ones(tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter")
    report = verify(base.path, [adapter], base.path, quant=Quant(keep=True), full=True)
    assert report.counts["unmerged"] == len(TOUCHED) and not report.ok


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("keep", [False, True])
def test_threads_and_memory_do_not_change_bytes(name: str, keep: bool, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name, shards=2), write_lora(tmp_path / "adapter")
    found = []
    for workers, cap in ((1, "1GB"), (4, "1GB"), (3, "150KB")):
        plan = make_plan(base.path, [adapter], quant=FRESH if keep else Quant(), max_memory=cap)
        out = tmp_path / f"{workers}-{cap}"
        run_plan(plan, out, workers=workers, max_memory=cap, survived=ALL_KEPT)
        found.append(stored(out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", SOME)
def test_blocks_of_rows_are_put_together(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a weight too large for one block: every cut gives the bytes of the whole."""
    from inlay.plan import memory

    base, adapter = write_coded(tmp_path / "base", name), write_lora(tmp_path / "adapter")
    plan = make_plan(base.path, [adapter], quant=FRESH)
    run_plan(plan, tmp_path / "whole", survived=ALL_KEPT)
    monkeypatch.setattr(memory, "ENCODED_TILE_BYTES", 1)
    monkeypatch.setattr(memory, "FLOAT64_TILE_BYTES", 1)
    run_plan(plan, tmp_path / "cut", survived=ALL_KEPT)
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


@pytest.mark.parametrize("name", ["bnb-nf4-double", "gptq-4", "fp8-block"])
def test_a_killed_run_is_taken_up(name: str, tmp_path: Path) -> None:
    """Killed once a shard is done: the rest is made, and the result is that of a run in one go."""
    base, adapter = write_coded(tmp_path / "base", name, shards=3), write_lora(tmp_path / "adapter")
    plan = make_plan(base.path, [adapter], quant=FRESH)
    run_plan(plan, tmp_path / "clean", survived=ALL_KEPT)
    child = os.fork()
    if child == 0:  # a child that ends at once, as if killed, when the second shard would be recorded
        done = []
        record = Staging.put_record

        def put_record(self: Staging, file: str, value: dict[str, object]) -> None:
            done.append(file)
            if len(done) > 1:
                os._exit(9)
            record(self, file, value)

        Staging.put_record = put_record  # type: ignore[method-assign]
        run_plan(plan, tmp_path / "out", survived=ALL_KEPT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    run_plan(plan, tmp_path / "out", survived=ALL_KEPT)
    assert stored(tmp_path / "out") == stored(tmp_path / "clean")


# --- a weight that is larger than the cap ------------------------------------------------------------

SIDE = 1536


def large(place: Path, name: str) -> tuple[Coded, Path]:
    """A base with one weight of 2.4 million values, and a LoRA on it."""
    form, module = FORMS[name], "model.layers.0.self_attn.q_proj"
    weight = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32) * 0.05
    parts, settings = encode(form, weight)
    base = Coded(form, place / "base", {module: settings}, {module: parts}, {module: decode(form, parts, settings)})
    tensors = {base.key(module, part): array for part, array in typed(form, parts, settings).items()}
    tensors["model.norm.weight"] = np.ones(SIDE, BF16)
    write_model(base.path, tensors, config={**CONFIG, "quantization_config": form.file.config(settings, [])})
    rng = np.random.default_rng(1)
    from build import PREFIX, write_adapter

    pair = {f"{PREFIX}{module}.lora_{x}.weight": rng.standard_normal(s).astype(np.float32) * 0.02
            for x, s in (("A", (4, SIDE)), ("B", (SIDE, 4)))}  # fmt: skip
    return base, write_adapter(place / "adapter", tensors=pair, target_modules=["q_proj"])


@pytest.mark.parametrize("name", ["bnb-nf4-double", "gptq-desc-act", "ct-fp8-block", "hqq-4", "hqq-3", "mlx-6"])
def test_a_large_weight_stays_below_the_cap(name: str, tmp_path: Path) -> None:
    base, adapter = large(tmp_path, name)
    cap = 20 << 20
    for words in ({"torch_dtype": "float32"}, {"quant": FRESH}):
        plan = make_plan(base.path, [adapter], max_memory=cap, **words)
        assert plan.cost.memory <= cap
        tracemalloc.start()
        try:
            run_plan(plan, tmp_path / "out", max_memory=cap, exist_ok=True, survived=ALL_KEPT)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < cap
        for full in (False, True):  # the sample looks at one block of several
            assert verify(base.path, [adapter], tmp_path / "out", full=full, **words).exact


@pytest.mark.parametrize("method", ["bnb", "rtn"])
def test_quantising_what_no_adapter_changes_stays_below_the_cap(method: str, tmp_path: Path) -> None:
    weight = (np.random.default_rng(0).standard_normal((SIDE, SIDE)) * 0.05).astype(BF16)
    write_model(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": weight})
    quant, cap = Quant(method=method, bits=4), 20 << 20
    plan: Plan = make_plan(tmp_path / "base", [], quant=quant, max_memory=cap)
    assert plan.cost.memory <= cap
    tracemalloc.start()
    try:
        run_plan(plan, tmp_path / "out", max_memory=cap)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < cap
    assert verify(tmp_path / "base", [], tmp_path / "out", quant=quant).exact


def test_a_cap_that_codes_do_not_fit_under_is_a_problem_once(tmp_path: Path) -> None:
    base, adapter = large(tmp_path, "gptq-4")
    with pytest.raises(PlanError) as error:
        make_plan(base.path, [adapter], quant=FRESH, max_memory="1MB")
    assert len(error.value.problems) == 1 and "its codes" in error.value.problems[0].what


def test_a_merged_weight_that_codes_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", "ct-w4"), write_lora(tmp_path / "adapter", size=1e30)
    with pytest.raises(InputError, match=r"NaN|[Ii]nf|finite"):
        run_plan(make_plan(base.path, [adapter], quant=FRESH), tmp_path / "out", survived=ALL_KEPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    assert set(LINEARS) and base.values
