"""Laws of plans, layouts and edits, over merges and texts that nobody thought of."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from build import (
    BF16,
    F16,
    F32,
    LINEARS,
    PREFIX,
    adapter_config,
    adapter_tensors,
    base_tensors,
    listing,
    merge_exact,
    modules_of,
    pair,
    raw_file,
    read_arrays,
    read_tensors,
    within,
    write_adapter,
    write_base,
    write_model,
)
from inlay import dumps, loads, make_plan, run_plan, verify
from inlay.digests import digest_json, digest_object
from inlay.output.json_edit import edit_json
from inlay.plan.request import parse_size
from inlay.plan.types import Plan, from_json, to_json

few = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
TYPES = {"BF16": BF16, "F16": F16, "F32": F32}


@dataclass(frozen=True)
class Case:
    """A merge to be built as files."""

    layers: int
    shards: int
    dtype: str
    adapters: tuple[Mapping[str, Any], ...]
    torch_dtype: str | None
    max_shard_size: int | None


one_adapter = st.fixed_dictionaries(
    {
        "targets": st.lists(st.sampled_from(sorted(LINEARS)), min_size=1, max_size=4, unique=True),
        "r": st.integers(1, 6),
        "alpha": st.integers(1, 64),
        "dtype": st.sampled_from(sorted(TYPES)),
        "rslora": st.booleans(),
        "seed": st.integers(0, 5),
    }
)
cases = st.builds(
    Case,
    layers=st.integers(1, 2),
    shards=st.integers(1, 4),
    dtype=st.sampled_from(sorted(TYPES)),
    adapters=st.lists(one_adapter, min_size=1, max_size=3).map(tuple),
    torch_dtype=st.sampled_from([None, "bfloat16", "float16", "float32"]),
    max_shard_size=st.none() | st.integers(1, 8000),
)


@contextmanager
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def built(case: Case, folder: Path) -> list[Path]:
    write_base(folder / "base", layers=case.layers, shards=case.shards, dtype=TYPES[case.dtype])
    return [
        write_adapter(
            folder / f"adapter-{i}",
            modules_of(case.layers, a["targets"]),
            r=a["r"],
            alpha=a["alpha"],
            dtype=TYPES[a["dtype"]],
            seed=a["seed"],
            use_rslora=a["rslora"],
        )
        for i, a in enumerate(case.adapters)
    ]


def planned(case: Case, folder: Path) -> Plan:
    return make_plan(
        folder / "base", built(case, folder), torch_dtype=case.torch_dtype, max_shard_size=case.max_shard_size
    )


# ─── plans ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(cases)
def test_a_plan_survives_json(case: Case) -> None:
    with place() as folder:
        plan = planned(case, folder)
    assert loads(dumps(plan)) == plan
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan
    assert loads(dumps(plan)).digest == plan.digest


@few
@given(cases)
def test_a_plan_from_json_merges_to_the_same_bytes(case: Case) -> None:
    with place() as folder:
        plan = planned(case, folder)
        run_plan(plan, folder / "one")
        run_plan(loads(dumps(plan)), folder / "two")
        assert listing(folder / "one") == listing(folder / "two")


@few
@given(cases)
def test_each_key_of_the_base_is_written_exactly_once(case: Case) -> None:
    with place() as folder:
        plan = planned(case, folder)
    written = [entry.key for shard in plan.shards for entry in shard.entries]
    assert sorted(written) == sorted(base_tensors(layers=case.layers))


@few
@given(cases)
def test_spans_tile_each_output_file_and_the_format_reads_them(case: Case) -> None:
    with place() as folder:
        plan = planned(case, folder)
        run_plan(plan, folder / "out")
        for shard in plan.shards:
            path = folder / "out" / shard.file
            with safe_open(path, "np") as opened:  # refuses holes, overlaps and trailing bytes
                assert sorted(opened.keys()) == sorted(e.key for e in shard.entries)
            for entry in shard.entries:
                dtype, shape, data = read_tensors(path)[entry.key]
                assert (dtype, shape, len(data)) == (entry.dtype.name, entry.shape, entry.nbytes)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(cases)
def test_every_merge_is_the_correctly_rounded_sum(case: Case) -> None:
    """Every element of every tensor against rational arithmetic, and `verify` agrees."""
    with place() as folder:
        plan = planned(case, folder)
        run_plan(plan, folder / "out")
        merged, base = read_arrays(folder / "out"), read_arrays(folder / "base")
        out = {None: TYPES[case.dtype], "bfloat16": BF16, "float16": F16, "float32": F32}[case.torch_dtype]
        for key, array in base.items():
            module = key.removesuffix(".weight")
            pairs = [
                pair(folder / f"adapter-{i}", module, a["alpha"] / (np.sqrt(a["r"]) if a["rslora"] else a["r"]))
                for i, a in enumerate(case.adapters)
                if module in modules_of(case.layers, a["targets"])
            ]
            matrix = array.reshape(-1, array.shape[-1])[:4]
            pairs = [(x, y[:4], scaling) for x, y, scaling in pairs]
            wanted = merge_exact(matrix, pairs, out)
            found = merged[key].reshape(-1, array.shape[-1])[:4]
            assert (found.dtype, found.tobytes()) == (wanted.dtype, wanted.tobytes()), key
        assert verify(
            folder / "base", [folder / f"adapter-{i}" for i in range(len(case.adapters))], folder / "out"
        ).exact


@few
@given(cases)
def test_planning_twice_gives_the_same_plan_and_writes_nothing(case: Case) -> None:
    with place() as folder:
        plan = planned(case, folder)
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
        again = make_plan(
            folder / "base",
            [folder / f"adapter-{i}" for i in range(len(case.adapters))],
            torch_dtype=case.torch_dtype,
            max_shard_size=case.max_shard_size,
            output_dir=folder / "out",
        )
        assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")} == before
    assert dumps(again) == dumps(plan)


def test_a_terabyte_is_planned_without_reading_it(tmp_path: Path) -> None:
    """Headers only: a sparse file of 1 TB, in no time and no memory."""
    rows, cols = 1 << 20, 1 << 18
    nbytes = 2 * rows * cols
    entries = {
        f"layers.{i}.proj.weight": {
            "dtype": "BF16",
            "shape": [rows, cols],
            "data_offsets": [i * nbytes, (i + 1) * nbytes],
        }
        for i in range(2)
    }
    write_model(tmp_path / "base", {})
    with open(tmp_path / "base" / "model.safetensors", "wb") as file:
        file.write(raw_file(entries))
        file.truncate(len(raw_file(entries)) + 2 * nbytes)
    write_adapter(tmp_path / "adapter", tensors={
        f"{PREFIX}layers.0.proj.lora_A.weight": np.zeros((1, cols), np.float32),
        f"{PREFIX}layers.0.proj.lora_B.weight": np.ones((rows, 1), np.float32),
    }, r=1, config=adapter_config(r=1))  # fmt: skip
    with within(10):
        plan = make_plan(tmp_path / "base", [tmp_path / "adapter"])
    assert plan.cost.written == 2 * nbytes > 10**12
    assert plan.cost.memory < 1 << 30


def test_planning_reads_no_tensor_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", shards=3)
    adapter = write_adapter(tmp_path / "adapter")
    read: list[tuple[str, int]] = []
    for name in ("preadv", "pread", "read"):

        def spy(fd: int, *args: Any, _real: Any = getattr(os, name)) -> Any:
            read.append((os.readlink(f"/proc/self/fd/{fd}"), args[-1]))
            return _real(fd, *args)

        monkeypatch.setattr(os, name, spy)
    make_plan(base, [adapter])
    assert {Path(path).parent for path, _ in read} == {adapter}, "the adapter's values are looked at, the base's never"


# ─── digests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pair_of(tmp_path: Path) -> tuple[Path, Path]:
    return write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")


def test_the_digest_does_not_depend_on_where_things_lie(pair_of: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair_of
    plan = make_plan(base, [adapter])
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(base, moved / "base")
    shutil.copytree(adapter, moved / "adapter")
    assert make_plan(moved / "base", [moved / "adapter"]).digest == plan.digest


def test_the_digest_does_not_depend_on_the_name_of_the_base_folder(pair_of: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair_of
    plan = make_plan(base, [adapter])
    base.rename(tmp_path / "renamed")
    assert make_plan(tmp_path / "renamed", [adapter]).digest == plan.digest


def test_the_digest_does_not_depend_on_the_name_of_the_adapter_folder(
    pair_of: tuple[Path, Path], tmp_path: Path
) -> None:
    """ "The same base and adapters in another place make the same plan.\""""
    base, adapter = pair_of
    plan = make_plan(base, [adapter])
    adapter.rename(tmp_path / "checkpoint-100")
    assert make_plan(base, [tmp_path / "checkpoint-100"]).digest == plan.digest


def test_plans_of_one_digest_make_the_same_bytes(pair_of: tuple[Path, Path], tmp_path: Path) -> None:
    """What the digest leaves out decides nothing but the names in card and manifest."""
    base, adapter = pair_of
    one = make_plan(base, [adapter])
    run_plan(one, tmp_path / "one")
    base.rename(tmp_path / "renamed")
    two = make_plan(tmp_path / "renamed", [adapter])
    run_plan(two, tmp_path / "two")
    assert one.digest == two.digest
    written = [listing(tmp_path / name) for name in ("one", "two")]
    for files in written:
        for named in ("README.md", "inlay.json"):
            del files[named]
    assert written[0] == written[1]


def test_the_digest_does_not_depend_on_times_or_spelling_of_paths(
    pair_of: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair_of
    plan = make_plan(base, [adapter])
    os.utime(base / "model.safetensors", ns=(1, 1))
    monkeypatch.chdir(tmp_path)
    for spelling in ("adapter", "./adapter", "adapter/", "base/../adapter"):
        assert make_plan("base", [spelling]).digest == plan.digest, spelling
    os.symlink(adapter, tmp_path / "link")
    assert make_plan("base", [adapter], max_memory="64MB").digest == plan.digest


CHANGES: dict[str, Any] = {
    "alpha": lambda base, adapter: make_plan(base, [write_adapter(adapter, alpha=9)]),
    "values of the adapter": lambda base, adapter: make_plan(base, [write_adapter(adapter, seed=7)]),
    "a target less": lambda base, adapter: make_plan(base, [write_adapter(adapter, modules_of(1))]),
    "rsLoRA": lambda base, adapter: make_plan(base, [write_adapter(adapter, use_rslora=True)]),
    "weight": lambda base, adapter: make_plan(base, [adapter], weights=[0.5]),
    "type of the result": lambda base, adapter: make_plan(base, [adapter], torch_dtype="float32"),
    "shard size": lambda base, adapter: make_plan(base, [adapter], max_shard_size=2000),
    "adapter twice": lambda base, adapter: make_plan(base, [adapter, adapter]),
    "type of the base": lambda base, adapter: make_plan(write_base(base, dtype=F32), [adapter]),
    "a layer more": lambda base, adapter: make_plan(write_base(base, layers=3), [adapter]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_changes_with_what_changes_the_result(pair_of: tuple[Path, Path], change: str) -> None:
    digest = make_plan(pair_of[0], [pair_of[1]]).digest
    assert CHANGES[change](*pair_of).digest != digest


def test_the_plan_does_not_depend_on_the_seed_of_hashes(tmp_path: Path) -> None:
    """Sets of keys come in another order in each process; the plan may not."""
    write_base(tmp_path / "base", tied=True)
    tensors = adapter_tensors(modules_of())
    rng = np.random.default_rng(0)
    for name in ("score.weight", "score.bias", "score.dense.weight", "score.dense.bias", "score.out.weight"):
        shape = (4, 16) if name.endswith("weight") else (4,)
        tensors[f"{PREFIX}{name}"] = rng.standard_normal(shape).astype(np.float32)
    write_adapter(tmp_path / "adapter", tensors=tensors, task_type="SEQ_CLS", modules_to_save=["score"])
    write_adapter(tmp_path / "other", seed=4)
    code = (
        "import sys, inlay; from pathlib import Path\n"
        "plan = inlay.make_plan(sys.argv[1], sys.argv[2:])\n"
        "print(plan.digest, [e.key for s in plan.shards for e in s.entries], plan.notes, plan.overlaps)"
    )
    found = set()
    for seed in range(4):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "other")],
            env={**os.environ, "PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1, found


# ─── shard sizes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(st.integers(1, 12_000), st.integers(1, 4))
def test_shards_keep_below_the_size_and_in_order(limit: int, shards: int) -> None:
    with place() as folder:
        base = write_base(folder / "base", shards=shards)
        plan = make_plan(base, [write_adapter(folder / "adapter")], max_shard_size=limit)
        order = [e.key for s in make_plan(base, [folder / "adapter"]).shards for e in s.entries]
    assert [e.key for shard in plan.shards for e in shard.entries] == order
    for shard in plan.shards:
        assert sum(e.nbytes for e in shard.entries) <= limit or len(shard.entries) == 1
    for one, two in zip(plan.shards, plan.shards[1:], strict=False):
        assert sum(e.nbytes for e in (*one.entries, two.entries[0])) > limit, "a shard is filled before the next begins"
    count = len(plan.shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [s.file for s in plan.shards] == (["model.safetensors"] if count == 1 else names)


@few
@given(st.integers(1, 12_000), st.integers(1, 4))
def test_the_index_names_every_key_at_its_place_with_the_right_size(limit: int, shards: int) -> None:
    with place() as folder:
        base = write_base(folder / "base", shards=shards)
        run_plan(make_plan(base, [write_adapter(folder / "adapter")], max_shard_size=limit), folder / "out")
        files = sorted((folder / "out").glob("*.safetensors"))
        index = folder / "out" / "model.safetensors.index.json"
        if len(files) == 1:
            assert files[0].name == "model.safetensors"
            assert not index.exists()
            return
        content = json.loads(index.read_text())
        found = {key: path.name for path in files for key in read_tensors(path)}
        assert content["weight_map"] == found
        total = sum(len(data) for path in files for _, _, data in read_tensors(path).values())
        assert content["metadata"]["total_size"] == total


@few
@given(st.integers(1, 12_000))
def test_the_layout_does_not_change_a_tensor(limit: int) -> None:
    with place() as folder:
        base, adapter = write_base(folder / "base", shards=2), write_adapter(folder / "adapter")
        run_plan(make_plan(base, [adapter]), folder / "kept")
        run_plan(make_plan(base, [adapter], max_shard_size=limit), folder / "cut")
        kept, cut = read_arrays(folder / "kept"), read_arrays(folder / "cut")
        assert kept.keys() == cut.keys()
        for key in kept:
            assert kept[key].tobytes() == cut[key].tobytes()


SIZES = [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("512MB", 512 * 10**6), ("64MiB", 64 << 20), ("1.5 kB", 1500), ("7", 7),
         ("7B", 7), ("2TB", 2 * 10**12), ("1GiB", 1 << 30), (" 3 MB ", 3 * 10**6), (12, 12)]  # fmt: skip


@pytest.mark.parametrize(("text", "nbytes"), SIZES)
def test_sizes_are_read_as_users_write_them(text: Any, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "1e9", "5GBs", "0x10", "∞", "5,5GB", "1.2.3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


# ─── json_edit ───────────────────────────────────────────────────────────────────────────────────────────────────────

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
objects = st.dictionaries(names, values, max_size=5)


@given(objects, names, st.lists(values, max_size=4))
def test_an_object_spelled_item_by_item_has_the_digest_of_the_whole(
    members: dict[str, Any], listed: str, items: list[Any]
) -> None:
    members.pop(listed, None)
    assert digest_object(members, listed, iter(items)) == digest_json({**members, listed: items})


def test_the_digest_of_a_plan_is_that_of_its_json_without_names_and_times(pair_of: tuple[Path, Path]) -> None:
    plan = make_plan(pair_of[0], [pair_of[1]])
    value = to_json(plan)
    for name in ("inputs", "warnings", "notes", "cost", "base_name"):
        del value[name]
    for adapter in value["adapters"]:
        del adapter["name"], adapter["base_model"]
    assert plan.digest == digest_json(value)


styles = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 1, 2, 4, "\t"]),
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([None, (",", ":"), (" , ", " : ")]),
    }
)


def put(value: dict[str, Any], path: str, new: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        value = value.setdefault(name, {})
    value[last] = new


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A text, edits, and the object that the edited text must mean."""
    value = draw(objects)
    text = (
        draw(st.sampled_from(["", "\n", " "]))
        + json.dumps(value, **draw(styles))
        + draw(st.sampled_from(["", "\n", " \n"]))
    )
    edits: dict[str, Any] = {}
    wanted = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 3))):
        here, path = wanted, []
        while True:
            name = draw(st.sampled_from(sorted(here)) if here and draw(st.booleans()) else names)
            path.append(name)
            if isinstance(here.get(name), dict) and draw(st.booleans()):
                here = here[name]
                continue
            break
        if any(other.startswith(".".join(path)) or ".".join(path).startswith(other) for other in edits):
            continue
        edits[".".join(path)] = draw(values)
        put(wanted, ".".join(path), edits[".".join(path)])
    return text, edits, wanted


def same_json(a: Any, b: Any) -> bool:
    """Equal with types: 1, 1.0 and True are three values of JSON; the order of members counts."""
    return json.dumps(a) == json.dumps(b)


@settings(max_examples=400)
@given(edited())
def test_an_edited_text_means_the_edited_object(case: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    text, edits, wanted = case
    assert same_json(json.loads(edit_json(text, edits)), wanted)


@given(objects, styles)
def test_no_edit_is_no_change(value: dict[str, Any], style: dict[str, Any]) -> None:
    text = json.dumps(value, **style)
    assert edit_json(text, {}) == text


@given(st.lists(st.tuples(names, values), min_size=1, max_size=4, unique_by=lambda m: m[0]), values, st.data())
def test_replacing_a_value_keeps_every_other_byte(
    members: list[tuple[str, Any]], new: Any, data: st.DataObject
) -> None:
    """Text of any spacing, put together from pieces, so that what lies around the value is known."""
    space = st.sampled_from(["", " ", "\n  ", "\t", "\r\n"])
    chosen = data.draw(st.integers(0, len(members) - 1))
    before, after, old = "{", "", ""
    for i, (name, value) in enumerate(members):
        head = data.draw(space) + json.dumps(name) + data.draw(space) + ":" + data.draw(space)
        tail = data.draw(space) + ("," if i + 1 < len(members) else "}")
        rendered = json.dumps(value, indent=data.draw(st.sampled_from([None, 2])))
        if i < chosen:
            before += head + rendered + tail
        elif i == chosen:
            before += head
            old, after = rendered, tail
        else:
            after += head + rendered + tail
    assert json.loads(before + old + after) is not None
    result = edit_json(before + old + after, {members[chosen][0]: new})
    assert result.startswith(before)
    assert result.endswith(after)
    assert same_json(json.loads(result[len(before) : len(result) - len(after)]), new)


@given(objects, names, values, styles)
def test_adding_a_member_keeps_every_byte(value: dict[str, Any], name: str, new: Any, style: dict[str, Any]) -> None:
    text = json.dumps(value, **style)
    result = edit_json(text, {name: new}) if name not in value else text
    if name in value:
        return
    added = len(result) - len(text)
    assert any(result[:i] + result[i + added :] == text for i in range(len(text) + 1)), result


def test_an_added_member_takes_the_style_of_its_object() -> None:
    assert edit_json('{\n  "a": 1\n}\n', {"b": False}) == '{\n  "a": 1,\n  "b": false\n}\n'
    assert edit_json('{"a": 1}', {"b": False}) == '{"a": 1, "b": false}'
    text = '{\n    "t": {\n        "a": 1\n    }\n}'
    assert edit_json(text, {"t.b": 2}) == '{\n    "t": {\n        "a": 1,\n        "b": 2\n    }\n}'


def test_the_last_of_two_equal_members_is_the_one_that_counts() -> None:
    assert json.loads(edit_json('{"a": 1, "a": 2}', {"a": 3})) == {"a": 3}


def test_braces_and_quotes_inside_strings_do_not_mislead() -> None:
    text = '{"s": "}, \\"dtype\\": 1, {", "k\\u00e9\\"}": [{"dtype": 2}], "dtype": "a"}'
    assert json.loads(edit_json(text, {"dtype": "b"})) == {**json.loads(text), "dtype": "b"}
