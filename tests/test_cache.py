"""The cache of merged models: keyed by content, whole entries only, one maker at a time."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import F32, PREFIX, base_tensors, read_arrays, write_adapter, write_model
from inlay.cli.main import main
from inlay.errors import InputError, OutputError, PlanError
from inlay.infer import cache
from inlay.infer.cache import cache_folder, cache_key, clear_cache, is_complete, list_cache, merged_copy
from inlay.plan.build import make_plan
from inlay.plan.types import Plan
from inlay.run.execute import run_plan

SIDECARS = {"tokenizer.json": '{"version": "1.0"}'}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", base_tensors(dtype=F32), sidecars=SIDECARS)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def made(plan: Plan, root: Path) -> Path:
    with merged_copy(plan, root) as path:
        return path


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_an_entry_is_what_an_export_writes(base: Path, adapter: Path, root: Path, tmp_path: Path) -> None:
    plan = make_plan(base, [adapter])
    run_plan(plan, tmp_path / "exported")
    assert files(made(plan, root)) == files(tmp_path / "exported")


def test_a_second_use_takes_the_entry_and_makes_nothing(
    base: Path, adapter: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(make_plan(base, [adapter]), root)
    before = (first / "model.safetensors").stat()
    monkeypatch.setattr(cache, "run_plan", lambda *_, **__: pytest.fail("merged again"))
    assert made(make_plan(base, [adapter]), root) == first
    assert (first / "model.safetensors").stat() == before


def test_the_key_is_one_of_contents_and_not_of_places(base: Path, adapter: Path, root: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base, tmp_path / "elsewhere"), shutil.copytree(adapter, tmp_path / "another")
    assert cache_key(make_plan(base, [adapter]), root) == cache_key(make_plan(moved[0], [moved[1]]), root)


@pytest.mark.parametrize("what", ["adapter", "base", "tokenizer", "weight", "dtype"])
def test_whatever_changes_the_result_changes_the_key(
    base: Path, adapter: Path, root: Path, tmp_path: Path, what: str
) -> None:
    before = cache_key(make_plan(base, [adapter]), root)
    given: dict[str, Any] = {"weight": {"weights": [0.5]}, "dtype": {"torch_dtype": "bfloat16"}}.get(what, {})
    if what == "adapter":  # retrained into the same folder
        write_adapter(adapter, seed=2)
    elif what == "base":  # other values, same names and shapes
        write_model(base, base_tensors(dtype=F32, seed=9), sidecars=SIDECARS)
    elif what == "tokenizer":
        (base / "tokenizer.json").write_text('{"version": "2.0"}')
    assert cache_key(make_plan(base, [adapter], **given), root) != before


def test_a_base_is_read_for_its_digest_once(
    base: Path, adapter: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest_file = cache.digest_file

    def count(path: Path) -> str:
        read.append(path.name)
        return digest_file(path)

    monkeypatch.setattr(cache, "digest_file", count)
    root.mkdir()
    keys = {cache_key(make_plan(base, [adapter]), root) for _ in range(2)}
    assert len(keys) == 1 and read.count("model.safetensors") == 1
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert cache_key(make_plan(base, [adapter]), root) in keys and read.count("model.safetensors") == 2


@pytest.mark.parametrize("damage", ["shard gone", "shard cut", "manifest gone", "manifest changed"])
def test_a_damaged_entry_does_not_count_and_is_made_again(base: Path, adapter: Path, root: Path, damage: str) -> None:
    plan = make_plan(base, [adapter])
    path = made(plan, root)
    whole = files(path)
    if damage == "shard gone":
        (path / "model.safetensors").unlink()
    elif damage == "shard cut":
        os.truncate(path / "model.safetensors", 100)
    elif damage == "manifest gone":
        (path / "inlay.json").unlink()
    else:
        manifest = json.loads((path / "inlay.json").read_text())
        manifest["notes"] = ["another"]
        (path / "inlay.json").write_text(json.dumps(manifest))
    assert not is_complete(path) and [e.complete for e in list_cache(root)] == [False]
    assert files(made(plan, root)) == whole


def test_an_interrupted_merge_is_no_entry_and_is_cleared(
    base: Path, adapter: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(base, [adapter])
    with monkeypatch.context() as patch:
        patch.setattr("inlay.run.execute.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(plan, root)
    [left] = list_cache(root)
    assert not left.complete and left.nbytes > 0 and left.path.name.startswith(".")
    clear_cache(root)
    assert list_cache(root) == [] and sorted(os.listdir(root / "merged")) == []


def _use(plan: Plan, root: Path, how_long: float, ready: Any, paths: Any) -> None:
    with merged_copy(plan, root) as path:
        paths.put(str(path))
        ready.set()
        time.sleep(how_long)


def test_an_entry_in_use_is_not_cleared(base: Path, adapter: Path, root: Path) -> None:
    plan = make_plan(base, [adapter])
    with merged_copy(plan, root) as path:
        removed, used = clear_cache(root)
        assert removed == [] and [e.path for e in used] == [path] and is_complete(path)
    removed, used = clear_cache(root)
    assert [e.path for e in removed] == [path] and used == [] and not path.exists()


def test_an_entry_that_is_cleared_between_making_and_using_is_made_again(
    base: Path, adapter: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is exchanged for a shared one is let go of for a moment (flock(2))."""
    real, cleared = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if how == fcntl.LOCK_SH and not cleared:
            real(fd, fcntl.LOCK_UN)
            cleared.extend(clear_cache(root)[0])
        real(fd, how)

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    with merged_copy(make_plan(base, [adapter]), root) as path:
        assert [e.path for e in cleared] == [path] and is_complete(path)
        assert [e.path for e in clear_cache(root)[1]] == [path]


def test_an_entry_that_goes_away_while_it_is_listed_is_left_out(
    base: Path, adapter: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(make_plan(base, [adapter]), root)

    def removed(path: Path) -> bool:
        shutil.rmtree(path)
        return False

    monkeypatch.setattr(cache, "is_complete", removed)
    assert list_cache(root) == []


def test_processes_that_want_the_same_entry_make_it_once(base: Path, adapter: Path, root: Path) -> None:
    plan = make_plan(base, [adapter])
    context = multiprocessing.get_context("fork")
    ready, paths = context.Event(), context.Queue()
    workers = [context.Process(target=_use, args=(plan, root, 0.0, ready, paths)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {paths.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert found == {str(e.path) for e in list_cache(root)} and len(found) == 1


def test_clearing_touches_nothing_that_the_cache_did_not_make(base: Path, adapter: Path, root: Path) -> None:
    made(make_plan(base, [adapter]), root)
    (root / "merged" / "notes").mkdir()
    (root / "merged" / "notes" / "mine.txt").write_text("mine")
    removed, _ = clear_cache(root)
    assert len(removed) == 1
    assert (root / "merged" / "notes" / "mine.txt").read_text() == "mine"


def test_single_entries_are_cleared_by_the_beginning_of_their_keys(base: Path, adapter: Path, root: Path) -> None:
    one = made(make_plan(base, [adapter]), root)
    two = made(make_plan(base, [adapter], weights=[0.5]), root)
    clear_cache(root, [one.name[:10]])
    assert [e.path for e in list_cache(root)] == [two]
    with pytest.raises(InputError, match="no such entry"):
        clear_cache(root, ["zz"])


def test_a_disk_without_room_is_refused_before_anything_is_written(
    base: Path, adapter: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("inlay.output.destination.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with (
        pytest.raises(PlanError, match=r"(?s)bytes are needed.*--cache_dir"),
        merged_copy(make_plan(base, [adapter]), root),
    ):
        pass
    assert list_cache(root) == []


def test_a_cache_that_cannot_be_made_says_what_to_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--cache_dir"), merged_copy(make_plan(base, [adapter]), tmp_path / "file"):
        pass


def test_a_file_is_no_empty_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["cache", "list", "--cache_dir", str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert main(["cache", "list", "--cache_dir", str(tmp_path / "nowhere")]) == 0


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("INLAY_CACHE_DIR", raising=False)
    assert cache_folder() == tmp_path / "x" / "inlay"
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path / "y"))
    assert cache_folder() == tmp_path / "y"
    assert cache_folder(tmp_path / "z") == tmp_path / "z"


def test_the_command_lists_and_clears(
    base: Path, adapter: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(make_plan(base, [adapter]), root)
    assert main(["cache", "list", "--cache_dir", str(root), "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["entries"]
    nbytes = sum(p.stat().st_size for p in path.rglob("*"))
    assert (entry["key"], entry["nbytes"], entry["base"], entry["adapters"]) == (path.name, nbytes, "base", ["adapter"])
    assert main(["cache", "list", "--cache_dir", str(root)]) == 0
    assert f"{path.name[:12]}" in (shown := capsys.readouterr().out) and "base + adapter" in shown
    with merged_copy(make_plan(base, [adapter]), root):
        assert main(["cache", "clear", "--cache_dir", str(root)]) == 1
    assert "is in use" in capsys.readouterr().out
    assert main(["cache", "clear", "--cache-dir", str(root)]) == 0
    assert "removed 1 merged model" in capsys.readouterr().out and not path.exists()
    assert main(["cache", "clear", "nothing", "--cache_dir", str(root)]) == 2
    assert main(["cache", "forget"]) == 2


def test_merged_values_in_the_cache_are_base_plus_delta(base: Path, adapter: Path, root: Path) -> None:
    path = made(make_plan(base, [adapter], weights=[2.0]), root)
    key = "model.layers.0.self_attn.q_proj"
    pair = read_arrays(adapter)
    a, b = (pair[f"{PREFIX}{key}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    scaling = json.loads((adapter / "adapter_config.json").read_text())
    delta = 2.0 * scaling["lora_alpha"] / scaling["r"] * (b @ a)
    wanted = read_arrays(base)[f"{key}.weight"].astype(np.float64) + delta
    np.testing.assert_array_equal(read_arrays(path)[f"{key}.weight"], wanted.astype(np.float32))
