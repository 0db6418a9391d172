"""Codes that hold each row's whole delta: what is kept, at what cost, and nothing else changes.

The oracle is the definition: errors by decoding with the form's own `decode`, sums in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from build import write_adapter
from coded import IN, MODULES, OUT, decoded, new_parts, write_coded
from inlay.cli.main import main
from inlay.codecs.compensation import bits_of, compensated
from inlay.codecs.table import codec
from inlay.errors import PlanError
from inlay.plan.quant import Quant
from inlay.verification import report

FORMS = [
    pytest.param("gptq", {"group_size": 32}, id="gptq"),
    pytest.param("gptq", {"group_size": 64, "bits": 2, "sym": False}, id="gptq-2bit"),
    pytest.param("awq", {"group_size": 32}, id="awq"),
    pytest.param("compressed_pack", {"scheme": "W4A16", "group_size": 32}, id="compressed"),
    pytest.param("compressed_pack", {"scheme": "W4A16_ASYM", "group_size": 64}, id="compressed-asym"),
    pytest.param("bnb4", {"double_quant": True}, id="nf4-double"),
    pytest.param("bnb4", {"quant_type": "fp4", "double_quant": False}, id="fp4"),
    pytest.param("hqq", {"group_size": 64}, id="hqq"),
    pytest.param("hqq", {"group_size": 64, "nbits": 2}, id="hqq-2bit"),
    pytest.param("mlx", {"group_size": 32}, id="mlx"),
]
KEEP, CHOSEN = Quant(keep=True), Quant(keep=True, compensate="adapter")
SMALL = 0.007  # of a LoRA's factors: deltas far below the steps of 4-bit codes


def cut(form: Any, settings: Any, parts: dict[str, Any], first: int, last: int, but: str = "") -> dict[str, Any]:
    """Slices of the parts that these rows need."""
    return {
        part: parts[part] if span is None else parts[part][(slice(None),) * span[0] + (slice(*span[1:]),)]
        for part, span in form.spans(settings, first, last).items()
        if part != but
    }


class Case:
    """A weight in codes, and a merged one that differs from it by a small low-rank delta."""

    def __init__(self, name: str, options: dict[str, Any], size: float = SMALL) -> None:
        rng = np.random.default_rng(5)
        weight = (rng.standard_normal((OUT, IN)) * 0.3).astype(np.float32)
        self.name, self.form = name, codec(name)
        self.settings, self.parts = new_parts(name, weight, options)
        self.codes = next(iter(self.form.layout(self.settings)))
        self.base = self.form.decode(self.parts, self.settings, 0, OUT)
        delta = size * rng.standard_normal((OUT, 4)) @ rng.standard_normal((4, IN))
        self.merged = (self.base + delta).astype(np.float32)

    @property
    def delta(self) -> np.ndarray:
        return self.merged.astype(np.float64) - self.base

    def values(self, first: int = 0, last: int = OUT, merged: np.ndarray | None = None) -> np.ndarray:
        rows, known = slice(first, last), cut(self.form, self.settings, self.parts, first, last, self.codes)
        wanted = self.merged if merged is None else merged
        return compensated(self.form, self.name, self.settings, first, wanted[rows], self.base[rows], known)

    def encoded(self, values: np.ndarray) -> np.ndarray:
        """What the codes of these values decode to."""
        known = {part: a for part, a in self.parts.items() if part != self.codes}
        made = self.form.encode(values, self.settings, 0, known)
        made = {**made, **self.form.finish(made, self.settings)} if self.name == "hqq" else made
        return self.form.decode({**known, self.codes: made[self.codes]}, self.settings, 0, OUT).astype(np.float64)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_each_row_keeps_its_whole_delta(name: str, options: dict[str, Any]) -> None:
    case = Case(name, options)
    plain, chosen = case.encoded(case.merged), case.encoded(case.values())
    energy = np.square(case.delta).sum(axis=1)
    kept = [((q - case.base) * case.delta).sum(axis=1) / energy for q in (plain, chosen)]
    assert kept[0].mean() < 0.6, "the deltas are not small: nothing is shown"
    # What is left is at most half of what one code makes: the largest step that a value went, times its delta.
    largest = np.abs(chosen - plain).max(axis=1)
    bound = largest * np.abs(case.delta).max(axis=1) / energy
    assert (np.abs(kept[1] - 1) <= bound).all()
    assert np.abs(kept[1] - 1).mean() < np.abs(kept[0] - 1).mean() / 2


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_a_value_goes_to_one_of_the_codes_beside_it(name: str, options: dict[str, Any]) -> None:
    case = Case(name, options)
    plain, chosen = case.encoded(case.merged), case.encoded(case.values())
    moved = plain != chosen
    assert 0 < moved.mean() < 0.5
    between = (np.minimum(plain, chosen) <= case.merged) & (case.merged <= np.maximum(plain, chosen))
    assert between[moved].all()
    half = (plain + chosen)[moved] / 2  # no code lies between the two
    filled = np.where(moved, case.merged, case.merged).astype(np.float64)
    filled[moved] = half
    nearest = case.encoded(filled.astype(np.float32))
    assert ((nearest == plain) | (nearest == chosen))[moved].all()


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_rows_do_not_depend_on_the_blocks(name: str, options: dict[str, Any]) -> None:
    case = Case(name, options)
    step = case.form.align(case.settings)
    whole = case.values()
    for size in (step, 3 * step):
        blocks = [case.values(at, min(OUT, at + size)) for at in range(0, OUT, size)]
        assert np.array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_a_row_without_a_delta_has_its_nearest_codes(name: str, options: dict[str, Any]) -> None:
    case = Case(name, options)
    assert np.array_equal(case.values(merged=case.base), case.base)


def test_three_tenths_of_a_step_on_ten_values_are_three_codes() -> None:
    form = codec("gptq")
    settings, parts = new_parts("gptq", np.tile(np.float32([-7.5, 7.5]), (32, 16)), {"group_size": 32})
    base = np.zeros((32, 32), np.float32)  # scale 1, and 0 is a code
    merged = base.copy()
    merged[:, 4:14] = 0.3
    known = {"scales": parts["scales"], "qzeros": parts["qzeros"]}
    values = compensated(form, "gptq", settings, 0, merged, base, known)
    codes = form.encode(values, settings, 0, known)
    result = form.decode({**known, "qweight": codes["qweight"]}, settings, 0, 32)
    assert np.array_equal(result[:, 4:7], np.ones((32, 3)))
    assert not result[:, :4].any()
    assert not result[:, 7:].any()


def test_the_cheapest_values_go() -> None:
    form = codec("gptq")
    weight = np.concatenate([np.tile(np.float32([-s, s]), (32, 16)) for s in (7.5, 30)], axis=1)
    settings, parts = new_parts("gptq", weight, {"group_size": 32})  # scales 1 and 4
    merged = np.zeros((32, 64), np.float32)
    merged[:, 3], merged[:, 20], merged[:, 40] = 0.2, 0.45, 0.5  # the next codes add 0.6, 0.1 and 12 to the squares
    known = {"scales": parts["scales"], "qzeros": parts["qzeros"]}
    values = compensated(form, "gptq", settings, 0, merged, np.zeros_like(merged), known)
    wanted = merged.copy()
    wanted[:, 20] = 1
    assert np.array_equal(values, wanted)


@pytest.mark.parametrize(("name", "options"), [p.values for p in (FORMS[0], FORMS[5], FORMS[7])])
def test_a_merge_keeps_what_plain_rounding_loses(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", name, options)
    adapter = write_adapter(tmp_path / "adapter", MODULES, size=0.05)
    plain, plan = (inlay.make_plan(base, [adapter], quant=quant) for quant in (KEEP, CHOSEN))
    before, after = inlay.survival(plain, full=True), inlay.survival(plan, full=True)
    assert before is not None
    assert after is not None
    assert before.overall.kept < 0.4
    assert after.overall.kept == pytest.approx(1, abs=0.03)
    assert inlay.loads(inlay.dumps(plan)) == plan
    assert any("codes of 2 weights" in note for note in plan.notes)
    inlay.run_plan(plan, tmp_path / "out")  # which refuses what keeps less than half
    held = decoded(tmp_path / "out")
    for module, weight in decoded(base).items():
        delta = next(t.kept for t in after.tensors if t.key == f"{module}.weight")
        assert not np.array_equal(held[module], weight)
        assert delta == pytest.approx(1, abs=0.03)
    for full in (True, False):
        assert inlay.verify(base, [adapter], tmp_path / "out", full=full, quant=CHOSEN).ok
    other = inlay.verify(base, [adapter], tmp_path / "out", full=True, quant=KEEP)
    assert report.WRONG in {t.verdict for t in other.tensors}


def test_a_smaller_cap_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_coded(tmp_path / "base", "gptq", {"group_size": 32})
    adapter = write_adapter(tmp_path / "adapter", MODULES, size=0.05)
    results = []
    for i, nbytes in enumerate((1 << 24, 1 << 13)):  # 8 rows at once
        monkeypatch.setattr("inlay.plan.memory.ENCODED_TILE_BYTES", nbytes)
        monkeypatch.setattr("inlay.codecs.compensation.CHUNK", nbytes >> 4)
        inlay.run_plan(inlay.make_plan(base, [adapter], quant=CHOSEN), tmp_path / f"out{i}")
        results.append((tmp_path / f"out{i}" / "model.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        (Quant(compensate="adapter"), "it is for --keep_quant true"),
        (Quant(keep=True, scales="fresh", compensate="adapter"), "leave --scales fresh out"),
        (Quant(keep=True, compensate="text"), "'text' is not adapter"),
    ],
)
def test_what_cannot_be_meant_is_refused(quant: Quant, words: str, tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", "gptq", {"group_size": 32})
    with pytest.raises(PlanError, match=words):
        inlay.make_plan(base, [write_adapter(tmp_path / "adapter", MODULES)], quant=quant)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptq", {"bits": 8, "group_size": 32}),
        ("gptq", {"bits": 3, "group_size": 32}),
        ("bnb8", {}),
        ("hqq", {"nbits": 3}),
    ],
)
def test_other_codes_are_refused_by_name(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", name, options)
    with pytest.raises(PlanError, match=rf"(?s)_proj.* and 1 more.*a form of {name}.*2 and 4 bits"):
        inlay.make_plan(base, [write_adapter(tmp_path / "adapter", MODULES)], quant=CHOSEN)
    assert bits_of(name, new_parts(name, np.ones((OUT, IN), np.float32), options)[0]) is None


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_coded(tmp_path / "base", "gptq", {"group_size": 32})
    adapter = write_adapter(tmp_path / "adapter", MODULES, size=0.05)
    given = ["--model", str(base), "--adapters", str(adapter), "--merge_lora", "true", "--keep_quant", "true"]
    out = str(tmp_path / "out")
    assert main(["export", *given, "--compensate", "adapter", "--output_dir", out, "--quiet", "true"]) == 0
    assert json.loads((tmp_path / "out" / "inlay.json").read_text())
    assert main(["verify", "--model", str(base), "--adapters", str(adapter), "--merged", out]) == 0
    capsys.readouterr()
