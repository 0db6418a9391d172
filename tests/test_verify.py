"""`verify` sees every bit of its own output, and knows the mistakes of other tools by name.

Merges "by other means" are made here with numpy in float64 and rounded by the definition.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import (
    BF16,
    CONFIG,
    F16,
    F32,
    adapter_config,
    base_tensors,
    listing,
    merge_exact,
    modules_of,
    pair,
    read_arrays,
    round_exact,
    write_adapter,
    write_base,
    write_json,
    write_model,
)
from inlay import make_plan, run_plan, verify
from inlay.cli.main import main
from inlay.errors import InlayError, InputError
from inlay.verification.report import Report

# ─── every bit ───────────────────────────────────────────────────────────────────────────────────────────────────────

SIDECARS = {
    "README.md": "---\nlicense: mit\n---\nThe base.\n",
    "generation_config.json": '{"temperature": 0.7}\n',
    "tokenizer.json": '{"model": {"vocab": {"a": 0}}}\n',
    "code/model.py": "x = 1\n",
    "empty.txt": "",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with an index, sidecars, an edited config: `base`, `adapter`, `merged`."""
    place = tmp_path_factory.mktemp("made")
    config = {**CONFIG, "torch_dtype": "float32"}
    write_base(place / "base", layers=1, shards=2, dtype=F32, sidecars=SIDECARS, config=config)
    write_adapter(place / "adapter", modules_of(1), dtype=BF16)
    run_plan(make_plan(place / "base", [place / "adapter"], torch_dtype="bfloat16"), place / "merged")
    return place


def found_out(made: Path, merged: Path, *, full: bool = True) -> bool:
    """Whether a directory is reported; nothing but a report or a clear error may come of it."""
    try:
        report = verify(made / "base", [made / "adapter"], merged, full=full)
    except InlayError as error:
        assert str(error)
        return True
    assert report.ok == report.exact, "a directory of inlay has to be exact"
    return not report.ok


def files_of(merged: Path) -> list[Path]:
    return sorted(path for path in merged.rglob("*") if path.is_file())


def test_the_directory_of_these_tests_passes(made: Path) -> None:
    report = verify(made / "base", [made / "adapter"], made / "merged")
    assert report.ok
    assert report.exact
    assert report.own
    assert report.counts == {"base": 6, "exact": 2}
    assert {p.relative_to(made / "merged").as_posix() for p in files_of(made / "merged")} >= {
        "inlay.json", "config.json", "README.md", "README.base.md", "code/model.py", "model.safetensors.index.json"
    }  # fmt: skip


def flips(path: Path, count: int) -> list[tuple[int, int]]:
    """Bits to flip: some at both ends of the file and of its parts, the rest anywhere."""
    size = path.stat().st_size
    pick = random.Random(path.name)
    places = {0, size - 1, size // 2}
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        places |= {1, 7, 8, header - 1, header, content.index(b'"shape"'), content.index(b"data_offsets")}
    places |= {pick.randrange(size) for _ in range(count)}
    found = [(at, pick.randrange(8)) for at in sorted(places) if size]
    if path.suffix == ".safetensors":  # metadata, which no tensor depends on
        found.append((path.read_bytes().index(b'"pt"') + 1, 0))
    return found


def missed(made: Path, tmp_path: Path, count: int, *, full: bool, only: Callable[[Path], bool]) -> list[str]:
    """Flips that verify does not report."""
    shutil.copytree(made / "merged", tmp_path / "merged", dirs_exist_ok=True)
    found = []
    for path in files_of(tmp_path / "merged"):
        if not only(path):
            continue
        content = path.read_bytes()
        for at, bit in flips(path, count) if content else []:
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            what = f"{path.name} byte {at} bit {bit}: {content[max(0, at - 15) : at + 15]!r}"
            try:
                if not found_out(made, tmp_path / "merged", full=full):
                    found.append(f"not reported: {what}")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}: {what}")
        path.write_bytes(content)
    return found


def test_every_flipped_bit_is_reported(made: Path, tmp_path: Path) -> None:
    """Sampled bits of all files: tensors, headers and their padding, sidecars, index, manifest."""
    found = missed(made, tmp_path, 40, full=True, only=lambda path: True)
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_a_sample_of_rows_still_reports_every_bit_outside_of_tensors(made: Path, tmp_path: Path) -> None:
    found = missed(made, tmp_path, 25, full=False, only=lambda path: path.suffix != ".safetensors")
    assert not found, f"{len(found)}:\n" + "\n".join(found)


@pytest.mark.slow
def test_thousands_of_flipped_bits_are_reported(made: Path, tmp_path: Path) -> None:
    found = missed(made, tmp_path, 700, full=True, only=lambda path: True)
    assert not found, f"{len(found)}:\n" + "\n".join(found)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a file more": lambda d: (d / "extra.txt").write_text("x"),
    "a hidden file more": lambda d: (d / ".hidden").write_text("x"),
    "a file more in a folder": lambda d: (d / "code" / "more.py").write_text("x"),
    "a file named like a record": lambda d: (d / ".inlay-records.json").write_text("x"),
    "left-over records": lambda d: ((d / ".inlay-records").mkdir(), (d / ".inlay-records" / "lock").write_text("")),
    "a shard more": lambda d: shutil.copy(d / "model-00001-of-00002.safetensors", d / "model.bak.safetensors"),
    "a sidecar missing": lambda d: (d / "generation_config.json").unlink(),
    "the index missing": lambda d: (d / "model.safetensors.index.json").unlink(),
    "the card missing": lambda d: (d / "README.md").unlink(),
    "an empty file missing": lambda d: (d / "empty.txt").unlink(),
    "a shard missing": lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
    "the config of the base": lambda d: write_json(d / "config.json", {**CONFIG, "torch_dtype": "float32"}),
    "a byte appended to a shard": lambda d: _append(d / "model-00001-of-00002.safetensors"),
    "a byte appended to a sidecar": lambda d: _append(d / "generation_config.json"),
    "a byte appended to the manifest": lambda d: _append(d / "inlay.json"),
    "a byte appended to the index": lambda d: _append(d / "model.safetensors.index.json"),
    "shards swapped": lambda d: _swap(d / "model-00001-of-00002.safetensors", d / "model-00002-of-00002.safetensors"),
    "manifest written again in another style": lambda d: write_json(d / "inlay.json", json.loads((d / "inlay.json").read_text())),
    "manifest empty": lambda d: (d / "inlay.json").write_text("{}"),
    "manifest of nothing": lambda d: (d / "inlay.json").write_text('{"format": 1}'),
    "manifest with settings null": lambda d: _manifest(d, settings=None),
    "manifest with adapters null": lambda d: _manifest(d, adapters=None),
    "manifest with files null": lambda d: _manifest(d, files=None),
    "manifest with strange files": lambda d: _manifest(d, files={"config.json": None}),
    "manifest with a strange type": lambda d: _manifest(d, settings={"dtype": "BF17", "combine": "sum", "max_shard_bytes": None}),
    "manifest with a strange combine": lambda d: _manifest(d, settings={"dtype": None, "combine": [], "max_shard_bytes": None}),
    "manifest of other adapters": lambda d: _manifest(d, adapters=[{"digest": "x", "weight": "1"}]),
    "manifest of another base": lambda d: _manifest(d, base={"name": "x", "headers": "x"}),
    "manifest with other digests": lambda d: _manifest(d, tensors={}),
    "manifest that names files outside": lambda d: _manifest(d, files={"../../etc/passwd": {"nbytes": 1}}),
}  # fmt: skip


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _swap(a: Path, b: Path) -> None:
    a.rename(a.with_name("x"))
    b.rename(a)
    a.with_name("x").rename(b)


def _manifest(folder: Path, **changes: Any) -> None:
    """A manifest with other content, sealed again as if inlay had written it."""
    from inlay.records.manifest import seal

    content = json.loads((folder / "inlay.json").read_text())
    del content["digest"]
    (folder / "inlay.json").write_text(seal({**content, **changes}))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_file_is_reported(made: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(made / "merged", tmp_path / "merged")
    CHANGES[change](tmp_path / "merged")
    assert found_out(made, tmp_path / "merged")


def test_two_tensors_of_one_shape_swapped_are_reported(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "merged", tmp_path / "merged")
    arrays = read_arrays(made / "merged")
    one, two = (arrays[k].tobytes() for k in ("model.embed_tokens.weight", "lm_head.weight"))
    for path in files_of(tmp_path / "merged"):
        if path.suffix == ".safetensors":
            content = path.read_bytes()
            path.write_bytes(
                content.replace(one, b"\0" * 8 + one[8:]).replace(two, one).replace(b"\0" * 8 + one[8:], two)
            )
    report = verify(made / "base", [made / "adapter"], tmp_path / "merged")
    assert {t.key for t in report.tensors if t.verdict == "changed"} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_removed_manifest_leaves_a_merge_by_another_tool(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "inlay.json").unlink()
    report = verify(made / "base", [made / "adapter"], tmp_path / "merged", torch_dtype="bfloat16")
    assert report.exact
    assert not report.own


def test_verifying_changes_nothing(made: Path) -> None:
    before = listing(made)
    verify(made / "base", [made / "adapter"], made / "merged")
    assert listing(made) == before


def test_the_recorded_weights_are_used_and_others_are_reported(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    run_plan(make_plan(base, [adapter], weights=[0.5], max_shard_size=1500), tmp_path / "merged")
    assert verify(base, [adapter], tmp_path / "merged").exact
    assert not verify(base, [adapter], tmp_path / "merged", weights=[1.0]).ok


# ─── merges by other means ───────────────────────────────────────────────────────────────────────────────────────────

Q, D, U = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"


def rounded(x: np.ndarray, dtype: np.dtype = BF16) -> np.ndarray:
    """float64 values to the nearest stored ones, as float64."""
    result = np.empty(x.shape)
    for place in np.ndindex(*x.shape):
        result[place] = round_exact(Fraction(float(x[place])), dtype) if x[place] else 0.0
    return result


class Bench:
    """A base with adapters, and directories made from them by any formula."""

    def __init__(self, place: Path, adapters: list[Mapping[str, Any]], dtype: np.dtype = BF16) -> None:
        self.place = place
        self.dtype = dtype
        self.base = write_base(place / "base", layers=1, dtype=dtype)
        self.adapters = [write_adapter(place / f"a{i}", modules_of(1), **a) for i, a in enumerate(adapters)]
        self.scalings = [
            a.get("alpha", 8) / (a.get("r", 4) ** 0.5 if a.get("use_rslora") else a.get("r", 4)) for a in adapters
        ]

    def deltas(self, module: str, scalings: list[float] | None = None) -> list[np.ndarray]:
        found = []
        for adapter, scaling in zip(self.adapters, scalings or self.scalings, strict=True):
            a, b, s = pair(adapter, module, scaling)
            found.append(s * (b.astype(np.float64) @ a.astype(np.float64)))
        return found

    def write(
        self, formula: Callable[[np.ndarray, list[np.ndarray]], np.ndarray], scalings: list[float] | None = None,
        dtype: np.dtype | None = None, **changes: Any,
    ) -> Path:  # fmt: skip
        """A merged directory: touched weights by `formula` (base, deltas) in float64, the rest as it is."""
        dtype = dtype or self.dtype
        tensors = {k: a.astype(np.float32).astype(dtype) for k, a in read_arrays(self.base).items()}
        for module in (Q, D):
            base = read_arrays(self.base)[f"{module}.weight"].astype(np.float64)
            value = formula(base, self.deltas(module, scalings))
            tensors[f"{module}.weight"] = rounded(value, dtype).astype(np.float32).astype(dtype)
        tensors = {k: a for k, a in {**tensors, **changes}.items() if a is not None}
        return write_model(self.place / "merged", tensors)

    def verify(self, merged: Path, **more: Any) -> Report:
        return verify(self.base, self.adapters, merged, **more)


def verdicts(report: Report) -> dict[str, str]:
    return {t.key: t.verdict for t in report.tensors}


def causes(report: Report) -> set[str]:
    return {t.cause for t in report.tensors if t.key in (f"{Q}.weight", f"{D}.weight")}


def total(base: np.ndarray, deltas: list[np.ndarray]) -> np.ndarray:
    return base + sum(deltas)


ONE: list[Mapping[str, Any]] = [{"size": 0.3}]
TWO: list[Mapping[str, Any]] = [{"size": 0.3}, {"size": 0.3, "seed": 2, "alpha": 20}]
THREE: list[Mapping[str, Any]] = [*TWO, {"size": 0.3, "seed": 3, "r": 2, "alpha": 3}]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("adapters", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_the_correctly_rounded_sum_is_exact_whoever_made_it(tmp_path: Path, adapters: Any, dtype: np.dtype) -> None:
    bench = Bench(tmp_path, adapters, dtype)
    tensors = read_arrays(bench.base)
    for module in (Q, D):
        pairs = [pair(a, module, s) for a, s in zip(bench.adapters, bench.scalings, strict=True)]
        tensors[f"{module}.weight"] = merge_exact(tensors[f"{module}.weight"], pairs)
    report = bench.verify(write_model(tmp_path / "merged", tensors))
    assert report.exact
    assert not report.own
    assert report.counts == {"base": 6, "exact": 2}


MISTAKES: dict[str, tuple[Any, Callable[..., np.ndarray], str, str]] = {
    "delta rounded first": (
        ONE, lambda w, d: w + rounded(d[0]),
        "rounded", "the delta rounded to the stored type before it was added",
    ),
    "sum of deltas rounded first": (
        TWO, lambda w, d: w + rounded(d[0] + d[1]),
        "rounded", "the delta rounded to the stored type before it was added",
    ),
    "rounded after each adapter": (
        TWO, lambda w, d: rounded(w + d[0]) + d[1],
        "rounded", "rounded after each adapter",
    ),
    "each delta rounded, and after each adapter": (
        TWO, lambda w, d: rounded(w + rounded(d[0])) + rounded(d[1]),
        "rounded", "each delta rounded, and the sum rounded after each adapter",
    ),
    "applied twice": (ONE, lambda w, d: w + 2 * d[0], "wrong", "the adapter applied twice"),
    "applied twice, rounded between": (
        ONE, lambda w, d: rounded(w + d[0]) + d[0], "wrong", "the adapter applied twice",
    ),
    "applied twice with rounded deltas": (
        ONE, lambda w, d: rounded(w + rounded(d[0])) + rounded(d[0]), "wrong", "the adapter applied twice",
    ),
    "scaling left out": (
        [{"size": 0.3, "r": 3, "alpha": 7}], lambda w, d: w + d[0] * 3 / 7, "wrong", "the scaling left out",
    ),
    "rsLoRA where there is none": (
        ONE, lambda w, d: w + d[0] * 2, "wrong", "",  # rank 4: the same as applied twice, so either name is right
    ),
    "rsLoRA where there is none, rank 3": (
        [{"size": 0.3, "r": 3, "alpha": 7}], lambda w, d: w + d[0] * 3**0.5,
        "wrong", "scaled with alpha/√r instead of alpha/r",
    ),
    "rsLoRA ignored": (
        [{"size": 0.3, "r": 3, "alpha": 7, "use_rslora": True}], lambda w, d: w + d[0] / 3**0.5,
        "wrong", "scaled with alpha/r instead of alpha/√r (rsLoRA ignored)",
    ),
    "only the last": (TWO, lambda w, d: w + d[1], "wrong", "only the adapter a1"),
    "only the first": (TWO, lambda w, d: w + d[0], "wrong", "only the adapter a0"),
    "only the last, with the scaling of the first": (
        TWO, lambda w, d: w + d[1] * (2 / 5),
        "wrong", "only the last adapter, a1, with the scaling of the first",
    ),
    "one of three left out": (THREE, lambda w, d: w + d[0] + d[2], "wrong", "without the adapter a1"),
    "not merged": (ONE, lambda w, d: w, "unmerged", "equals the base"),
    "not merged, two": (TWO, lambda w, d: w, "unmerged", "equals the base"),
    "subtracted": (ONE, lambda w, d: w - d[0], "wrong", "× the wanted change"),
    "half of it": (ONE, lambda w, d: w + 0.4 * d[0], "wrong", "0.4 × the wanted change"),
    "only noise": (
        ONE, lambda w, d: w + np.random.default_rng(9).normal(size=w.shape), "wrong", "× the wanted change",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_of_another_tool_is_classified_and_named(tmp_path: Path, case: str) -> None:
    adapters, formula, verdict, cause = MISTAKES[case]
    bench = Bench(tmp_path, adapters)
    report = bench.verify(bench.write(formula))
    found = verdicts(report)
    assert (found[f"{Q}.weight"], found[f"{D}.weight"]) == (verdict, verdict), causes(report)
    assert all(cause in name for name in causes(report)), causes(report)
    assert all(v == "base" for k, v in found.items() if not k.startswith((Q, D)))
    assert report.ok == (verdict == "rounded")
    assert not report.exact


@pytest.mark.parametrize("case", MISTAKES)
def test_the_command_line_names_the_cause(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    adapters, formula, verdict, cause = MISTAKES[case]
    bench = Bench(tmp_path, adapters)
    words = [
        "verify",
        "--model",
        str(bench.base),
        "--adapters",
        *map(str, bench.adapters),
        "--merged",
        str(bench.write(formula)),
    ]
    assert main(words) == (0 if verdict == "rounded" else 1)
    out = capsys.readouterr().out
    if verdict != "unmerged":
        assert cause in out
    assert {"rounded": "off by roundings", "wrong": "WRONG", "unmerged": "NOT MERGED"}[verdict] in out
    assert main([*words, "--exact"]) == 1
    assert capsys.readouterr().out.endswith("FAILED\n")


def test_transposed_by_a_guess_is_wrong(tmp_path: Path) -> None:
    """A square weight with its delta the wrong way round."""
    bench = Bench(tmp_path, ONE)
    report = bench.verify(bench.write(lambda w, d: w + (d[0].T if w.shape[0] == w.shape[1] else d[0])))
    assert verdicts(report)[f"{Q}.weight"] == "wrong"
    assert verdicts(report)[f"{D}.weight"] in ("exact", "rounded")
    assert not report.ok


def test_an_untouched_tensor_that_changed_is_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    changed = read_arrays(bench.base)[f"{U}.weight"].copy()
    changed.view(np.uint16)[3, 5] ^= 1
    report = bench.verify(bench.write(total, **{f"{U}.weight": changed}))
    assert [k for k, v in verdicts(report).items() if v == "changed"] == [f"{U}.weight"]
    assert not report.ok


def test_a_negative_zero_lost_in_an_untouched_tensor_is_a_change(tmp_path: Path) -> None:
    """-0.0 + 0.0 is +0.0: what a tool leaves that sends copies through arithmetic."""
    bench = Bench(tmp_path, ONE)
    tensors = base_tensors(layers=1)
    tensors["model.norm.weight"][3] = -0.0
    write_model(bench.base, tensors)
    report = bench.verify(bench.write(total, **{"model.norm.weight": np.abs(tensors["model.norm.weight"]) * np.sign(tensors["model.norm.weight"].astype(np.float32)).astype(BF16) + 0}))  # fmt: skip
    assert verdicts(report)["model.norm.weight"] == "changed"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_wrong(tmp_path: Path, value: float) -> None:
    bench = Bench(tmp_path, ONE)
    merged = bench.write(total)
    spoiled = read_arrays(merged)[f"{Q}.weight"].copy()
    spoiled[2, 3] = value
    report = bench.verify(bench.write(total, **{f"{Q}.weight": spoiled}))
    assert verdicts(report)[f"{Q}.weight"] == "wrong"


def test_one_element_two_steps_off_is_wrong_and_one_step_is_a_rounding(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    whole = read_arrays(bench.write(total))[f"{Q}.weight"]
    i, j = np.unravel_index(np.argmax(np.abs(whole.astype(np.float32))), whole.shape)
    for steps, verdict in ((1, "rounded"), (8, "wrong")):
        spoiled = whole.copy()
        spoiled.view(np.uint16)[i, j] -= steps
        report = bench.verify(bench.write(total, **{f"{Q}.weight": spoiled}))
        (found,) = [t for t in report.tensors if t.key == f"{Q}.weight"]
        assert (found.verdict, found.max_ulps) == (verdict, steps)
        assert found.off >= 1


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    extra = np.zeros((2, 2), BF16)
    report = bench.verify(bench.write(total, **{f"{U}.weight": None, "model.extra.weight": extra}))
    found = verdicts(report)
    assert (found[f"{U}.weight"], found["model.extra.weight"]) == ("missing", "extra")
    assert not report.ok


def test_a_tensor_of_another_shape_is_wrong(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    turned = np.ascontiguousarray(read_arrays(bench.base)[f"{U}.weight"].T)
    report = bench.verify(bench.write(total, **{f"{U}.weight": turned}))
    assert verdicts(report)[f"{U}.weight"] == "wrong"
    assert "shape" in next(t.cause for t in report.tensors if t.key == f"{U}.weight")


def test_a_tensor_of_integers_is_wrong(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    report = bench.verify(bench.write(total, **{f"{Q}.weight": np.zeros((16, 16), np.int8)}))
    assert verdicts(report)[f"{Q}.weight"] == "wrong"
    assert not report.ok


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_merge_in_another_type_is_judged_in_that_type(tmp_path: Path, dtype: np.dtype) -> None:
    """Another tool, asked for float32 from a bfloat16 base; the widened copies are the base's values."""
    bench = Bench(tmp_path, ONE)
    report = bench.verify(bench.write(total, dtype=dtype))
    assert report.ok, report
    assert set(verdicts(report).values()) <= {"base", "exact", "rounded"}


def test_a_merge_rounded_to_a_narrower_type_and_widened_again_is_told_from_an_exact_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    report = bench.verify(bench.write(lambda w, d: rounded(w + d[0], BF16), dtype=F32))
    assert not report.exact


def test_a_wrong_total_size_of_the_index_is_reported(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", shards=2), write_adapter(tmp_path / "adapter")
    run_plan(make_plan(base, [adapter]), tmp_path / "merged")
    (tmp_path / "merged" / "inlay.json").unlink()
    assert verify(base, [adapter], tmp_path / "merged").exact
    index = tmp_path / "merged" / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    for wrong in (value["metadata"]["total_size"] + 1, None, "x"):
        write_json(index, {**value, "metadata": {"total_size": wrong}})
        report = verify(base, [adapter], tmp_path / "merged")
        assert not report.exact
        assert "total_size" in report.files[0].what


def test_sidecars_that_a_tool_forgot_are_reported(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    (bench.base / "generation_config.json").write_text("{}")
    report = bench.verify(bench.write(total))
    assert [(f.file, f.what) for f in report.files] == [("generation_config.json", "missing")]
    assert report.ok
    assert not report.exact


@pytest.mark.parametrize("what", ["empty", "adapter", "nowhere"])
def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, what: str) -> None:
    bench = Bench(tmp_path, ONE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        bench.verify({"empty": tmp_path / "empty", "adapter": bench.adapters[0], "nowhere": tmp_path / "nowhere"}[what])


def test_the_base_itself_is_unmerged(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    report = bench.verify(bench.base)
    assert report.counts == {"base": 6, "unmerged": 2}
    assert not report.ok


def test_the_sample_is_the_same_every_time_and_finds_what_is_wrong_everywhere(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ONE)
    merged = bench.write(lambda w, d: w + 2 * d[0])
    reports = [bench.verify(merged, full=False) for _ in range(3)]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0].sampled
    assert verdicts(reports[0])[f"{Q}.weight"] == "wrong"


# ─── PEFT's own merge ────────────────────────────────────────────────────────────────────────────────────────────────


def merged_by_peft(base: Path, adapter: Path, out: Path, dtype: str) -> Path:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out)
    for name in ("config.json", "generation_config.json"):
        if (base / name).exists():
            shutil.copy(base / name, out / name)
        elif (out / name).exists():
            os.unlink(out / name)
    return out


@pytest.mark.parametrize(("dtype", "stored"), [("float32", F32), ("bfloat16", BF16), ("float16", F16)])
def test_the_merge_of_peft_passes_as_base_and_adapter_up_to_roundings(
    tmp_path: Path, dtype: str, stored: np.dtype
) -> None:
    config = {**CONFIG, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 8, "torch_dtype": dtype, "max_position_embeddings": 32}  # fmt: skip
    linears = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
               "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16),
               "mlp.down_proj": (16, 24)}  # fmt: skip
    tensors = base_tensors(layers=1, dtype=stored, linears=linears)
    tensors["model.layers.0.post_attention_layernorm.weight"] = tensors["model.norm.weight"]
    base = write_model(tmp_path / "base", tensors, config=config)
    adapter = write_adapter(
        tmp_path / "adapter", modules_of(1), config=adapter_config(base_model_name_or_path=str(base))
    )
    merged = merged_by_peft(base, adapter, tmp_path / "merged", dtype)
    report = verify(base, [adapter], merged)
    assert report.ok, report
    assert report.counts["base"] == len(tensors) - 2
    assert report.counts.get("rounded", 0) + report.counts.get("exact", 0) == 2
