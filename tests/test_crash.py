"""Stop at every step: the destination is absent, old or whole, and a rerun gives what a clean run gives.

Three ways to stop: an interruption (KeyboardInterrupt, clean-up runs), a full disk (ENOSPC from one step on), and a
kill (a forked child that ends at once, in the middle of a write). `fsync` is counted and left out: what it is for is
checked once, by the order of calls.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import listing, modules_of, read_arrays, write_adapter, write_base
from inlay import make_plan, run_plan, verify
from inlay.errors import InputError, OutputError
from inlay.output import staging as staging_module
from inlay.output.staging import Staging
from inlay.plan.types import Plan
from inlay.run import shard as shard_module

WRITES = ("pwrite", "copy_file_range", "sendfile", "ftruncate", "fsync", "mkdir")
STEPS = (*WRITES, "open", "rename", "replace", "unlink", "rmdir")
REAL = {name: getattr(os, name) for name in STEPS if hasattr(os, name)}


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


Outcome = Callable[[str, tuple[Any, ...]], None]


@dataclass
class Steps:
    """Counts the steps of a run; at number `at` something happens."""

    at: int = -1
    what: Outcome = lambda name, args: None
    count: int = 0
    last: str = ""

    def call(self, name: str, *args: Any, **more: Any) -> Any:
        self.count += 1
        if self.count >= self.at > 0:
            self.last = name
            self.what(name, args)
        return None if name == "fsync" else REAL[name](*args, **more)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in REAL:
            patch.setattr(os, name, lambda *args, _name=name, **more: self.call(_name, *args, **more))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and what a clean run makes of them."""
    place = tmp_path_factory.mktemp("made")
    write_base(place / "base", layers=1, shards=2, sidecars={"code/model.py": "x = 1\n", "README.md": "base\n"})
    write_adapter(place / "adapter", modules_of(1))
    run_plan(plan_of(place), place / "clean")
    return place


def plan_of(place: Path, **more: Any) -> Plan:
    return make_plan(place / "base", [place / "adapter"], **more)


@pytest.fixture
def clean(made: Path) -> dict[str, bytes | None]:
    return listing(made / "clean")


OLD = {"config.json": b"{}", "model.safetensors": b"the old one"}


def prepared(folder: Path, old: bool) -> Path:
    """A destination in a folder of its own, with an older result in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old:
        (folder / "out").mkdir()
        for name, content in OLD.items():
            (folder / "out" / name).write_bytes(content)
    return folder / "out"


def go(made: Path, out: Path, **more: Any) -> None:
    run_plan(plan_of(made), out, exist_ok=True, workers=1, **more)


def state(out: Path, clean: dict[str, bytes | None]) -> str:
    if not os.path.lexists(out):
        return "absent"
    found = listing(out)
    return "old" if found == OLD else "whole" if found == clean else f"broken: {sorted(found)}"


def broken_laws(made: Path, out: Path, old: bool, clean: dict[str, bytes | None]) -> Iterator[str]:
    """What is wrong after a stop, and after a rerun."""
    if (left := state(out, clean)) not in ({"old", "whole"} if old else {"absent", "whole"}):
        yield f"left the destination {left}"
    try:
        go(made, out)
    except Exception as error:
        yield f"rerun: {type(error).__name__}: {str(error).replace(str(out.parent), '')}"
        return
    if (made_again := state(out, clean)) != "whole":
        yield f"rerun left the destination {made_again}"
    if [p.name for p in out.parent.iterdir()] != ["out"]:
        yield f"rerun left behind {[p.name for p in out.parent.iterdir()]}"


def report(problems: list[str]) -> str:
    return f"{len(problems)} problems:\n" + "\n".join(problems)


def steps_of_a_clean_run(made: Path, tmp_path: Path, old: bool) -> int:
    steps = Steps()
    with pytest.MonkeyPatch.context() as patch:
        steps.install(patch)
        go(made, prepared(tmp_path / "counted", old))
    assert steps.count > 40
    return steps.count


WITH_AND_WITHOUT = pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])


@WITH_AND_WITHOUT
def test_an_interruption_at_any_step_leaves_all_or_nothing(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], old: bool
) -> None:
    total, left, problems = steps_of_a_clean_run(made, tmp_path, old), [], []

    def interrupt(name: str, args: tuple[Any, ...]) -> None:
        if steps.count == steps.at:
            raise KeyboardInterrupt

    for at in range(1, total + 1):
        out = prepared(tmp_path / f"place{at}", old)
        steps = Steps(at, interrupt)
        with pytest.MonkeyPatch.context() as patch:
            steps.install(patch)
            try:
                go(made, out)
            except KeyboardInterrupt:
                left.append(state(out, clean))
        problems += [f"step {at}, {steps.last}: {p}" for p in broken_laws(made, out, old, clean)]
    assert len(left) > total / 2
    assert set(left) == {"old" if old else "absent", "whole"}
    assert not problems, report(problems)


@WITH_AND_WITHOUT
def test_a_disk_that_fills_at_any_step_leaves_all_or_nothing(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], old: bool
) -> None:
    total, stopped, problems = steps_of_a_clean_run(made, tmp_path, old), 0, []

    def full(name: str, args: tuple[Any, ...]) -> None:
        if name in WRITES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for at in range(1, total + 1):
        out = prepared(tmp_path / f"place{at}", old)
        steps = Steps(at, full)
        with pytest.MonkeyPatch.context() as patch:
            steps.install(patch)
            try:
                go(made, out)
            except OutputError as error:
                stopped += 1
                if "No space left" not in str(error):
                    problems.append(f"step {at}, {steps.last}: {error}")
            except OSError as error:
                stopped += 1
                problems.append(f"step {at}, {steps.last}: not an OutputError: {error!r}")
        if extra := {p.name for p in out.parent.iterdir()} - {"out"}:
            problems.append(f"step {at}, {steps.last}: left behind {extra}")
        problems += [f"step {at}, {steps.last}: {p}" for p in broken_laws(made, out, old, clean)]
    assert stopped > total / 2
    assert not problems, report(problems)


@WITH_AND_WITHOUT
def test_a_kill_at_any_step_leaves_all_or_nothing(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], old: bool
) -> None:
    total, left, problems = steps_of_a_clean_run(made, tmp_path, old), [], []

    def kill(name: str, args: tuple[Any, ...]) -> None:
        if name == "pwrite":
            REAL[name](args[0], args[1][: len(args[1]) // 2], *args[2:])
        if name == "copy_file_range":
            REAL[name](args[0], args[1], args[2] // 2, *args[3:])
        os._exit(9)

    def child(out: Path, at: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            Steps(at, kill).install(patch)
            go(made, out)

    for at in range(1, total + 1):
        out = prepared(tmp_path / f"place{at}", old)
        in_a_child(lambda out=out, at=at: child(out, at))
        left.append(state(out, clean))
        problems += [f"step {at}: {p}" for p in broken_laws(made, out, old, clean)]
    assert set(left) == {"old" if old else "absent", "whole"}
    assert not problems, report(problems)


def in_a_child(do: Callable[[], None]) -> int:
    """Fork, run, end without clean-up; the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            do()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_swap_that_the_system_cannot_do_in_one_step_still_ends_whole(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without renameat2: a kill between the two renames must not cost the user both models."""

    class NoSwap:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

    monkeypatch.setattr(staging_module.ctypes, "CDLL", NoSwap)
    total = steps_of_a_clean_run(made, tmp_path, old=True)

    def child(out: Path, at: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            Steps(at, lambda name, args: os._exit(9)).install(patch)
            go(made, out)

    for at in range(total // 2, total + 1):
        out = prepared(tmp_path / "place", old=True)
        in_a_child(lambda out=out, at=at: child(out, at))
        if state(out, clean) == "absent":
            kept = [listing(p) for p in out.parent.iterdir()]
            assert OLD in kept, f"step {at}: the old result is gone"
        go(made, out)
        assert state(out, clean) == "whole", f"step {at}"
        assert [p.name for p in out.parent.iterdir()] == ["out"], f"step {at}"


def test_calls_that_move_fewer_bytes_than_asked_change_nothing(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals, network file systems and full pipes do that."""
    real = {name: getattr(os, name) for name in ("pwrite", "pread", "preadv", "copy_file_range", "sendfile")}
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real["pwrite"](fd, bytes(data)[:7], at))
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real["pread"](fd, min(n, 5), at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real["preadv"](fd, [buffers[0][:11]], at))
    monkeypatch.setattr(
        os, "copy_file_range", lambda a, b, n, *where: real["copy_file_range"](a, b, min(n, 13), *where)
    )
    go(made, tmp_path / "kernel")
    assert listing(tmp_path / "kernel") == clean

    def unsupported(*_: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", unsupported)
    go(made, tmp_path / "buffer")
    assert listing(tmp_path / "buffer") == clean


def test_an_unreadable_input_is_told_from_an_unwritable_output(made: Path, tmp_path: Path) -> None:
    """A failing disk under the base: the message names that, and nothing is left behind."""
    base = str(made / "base")
    real = os.preadv

    def failing(fd: int, *args: Any) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(base):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(real(fd, *args))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="Input/output error"):
        patch.setattr(os, "preadv", failing)
        go(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ─── going on ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the bands that are computed."""
    found: list[str] = []
    real = shard_module.Bands.run

    def run(self: Any, *args: Any) -> None:
        found.append(self.entry.key)
        real(self, *args)

    monkeypatch.setattr(shard_module.Bands, "run", run)
    return found


FIRST = {"model.layers.0.self_attn.q_proj.weight"}
SECOND = {"model.layers.0.mlp.down_proj.weight"}


def interrupted(made: Path, out: Path, **more: Any) -> Path:
    """A run that ends after the first shard; its staging folder."""
    real = shard_module.Bands.run

    def run(self: Any, *args: Any) -> None:
        if self.entry.key in SECOND:
            raise KeyboardInterrupt
        real(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_module.Bands, "run", run)
        run_plan(plan_of(made, **more), out)
    (staged,) = [p for p in out.parent.iterdir() if p.is_dir() and p != out]
    return staged


def test_a_rerun_computes_only_what_is_not_finished(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], computed: list[str]
) -> None:
    interrupted(made, tmp_path / "out")
    assert set(computed) == FIRST
    computed.clear()
    go(made, tmp_path / "out")
    assert set(computed) == SECOND
    assert listing(tmp_path / "out") == clean


def test_progress_counts_every_byte_once_on_a_rerun_too(made: Path, tmp_path: Path) -> None:
    plan = plan_of(made)
    for again in (False, True):
        if again:
            interrupted(made, prepared(tmp_path / "place", old=False))
        done: list[int] = []
        run_plan(plan, tmp_path / ("place/out" if again else "out"), progress=done.append, workers=1)
        assert sum(done) == plan.cost.written


@pytest.mark.parametrize(
    "what", ["computed tensor", "copied tensor", "header", "size", "record", "missing", "record without keys"]
)
def test_a_finished_shard_that_was_changed_is_done_again(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], computed: list[str], what: str
) -> None:
    staged = interrupted(made, tmp_path / "out")
    (shard,) = [p for p in staged.iterdir() if p.name.startswith("model-00001")]
    (record,) = [p for p in staged.rglob("*.json") if shard.name in p.name]
    content = bytearray(shard.read_bytes())
    key = {"computed tensor": b"q_proj", "copied tensor": b"embed_tokens"}.get(what)
    if key:
        raw = read_arrays(staged)
        name = next(k for k in raw if key.decode() in k)
        content[bytes(content).index(raw[name].tobytes()) + 5] ^= 1
        shard.write_bytes(content)
    elif what == "header":
        content[content.index(b'"pt"') + 1] ^= 1
        shard.write_bytes(content)
    elif what == "size":
        shard.write_bytes(bytes(content) + b"\0")
    elif what == "record":
        record.write_text("{")
    elif what == "record without keys":
        record.write_text("{}")
    else:
        shard.unlink()
    computed.clear()
    go(made, tmp_path / "out")
    assert listing(tmp_path / "out") == clean
    assert set(computed) == FIRST | SECOND


def test_another_plan_removes_the_old_staging(made: Path, tmp_path: Path, computed: list[str]) -> None:
    staged = interrupted(made, tmp_path / "out")
    computed.clear()
    run_plan(plan_of(made, torch_dtype="float32"), tmp_path / "out")
    assert not staged.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert set(computed) > FIRST | SECOND


@WITH_AND_WITHOUT
def test_another_plan_removes_what_a_kill_left_at_any_step(made: Path, tmp_path: Path, old: bool) -> None:
    """Also what was left while it was being published, when the records are gone."""
    total = steps_of_a_clean_run(made, tmp_path, old)

    def child(out: Path, at: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            Steps(at, lambda name, args: os._exit(9)).install(patch)
            go(made, out)

    for at in range(total // 2, total + 1, 2):
        out = prepared(tmp_path / "place", old)
        in_a_child(lambda out=out, at=at: child(out, at))
        run_plan(plan_of(made, torch_dtype="float32"), out, exist_ok=True)
        assert [p.name for p in out.parent.iterdir()] == ["out"], f"step {at}"


def test_a_folder_of_a_like_name_is_left_alone(made: Path, tmp_path: Path) -> None:
    for name in (
        ".out.inlay",
        ".out2.inlay-0123456789abcdef",
        "out.inlay-0123456789abcdef",
        ".outXinlay-0123456789abcdef",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    go(made, tmp_path / "out")
    assert len(list(tmp_path.glob("*/mine"))) == 4


def test_an_input_that_changed_is_not_merged_by_an_old_plan(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    plan = make_plan(made / "base", [tmp_path / "adapter"])
    write_adapter(tmp_path / "adapter", modules_of(1), seed=5)
    os.utime(tmp_path / "adapter" / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match="changed"):
        run_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_made_from_other_inputs_is_not_gone_on_from(made: Path, tmp_path: Path, computed: list[str]) -> None:
    """A base with the same header and other values makes the same plan; its finished shards are another base's."""
    shutil.copytree(made / "base", tmp_path / "in" / "base")
    shutil.copytree(made / "adapter", tmp_path / "in" / "adapter")
    out = prepared(tmp_path / "place", old=False)
    interrupted(tmp_path / "in", out)
    write_base(tmp_path / "in" / "base", layers=1, shards=2, seed=77)
    computed.clear()
    run_plan(plan_of(tmp_path / "in"), out)
    assert set(computed) == FIRST | SECOND
    assert verify(tmp_path / "in" / "base", [tmp_path / "in" / "adapter"], out).exact


# ─── two at once ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_run_of_the_same_merge_is_refused(made: Path, tmp_path: Path, clean: dict[str, bytes | None]) -> None:
    refused: list[str] = []

    def second(folder: Path) -> None:
        with pytest.raises(OutputError, match="another run") as error:
            go(made, tmp_path / "out")
        refused.append(str(error.value))

    go(made, tmp_path / "out", check=second)
    assert len(refused) == 1
    assert listing(tmp_path / "out") == clean


def test_a_second_run_in_another_process_is_refused(made: Path, tmp_path: Path, clean: dict[str, bytes | None]) -> None:
    codes: list[int] = []

    def second() -> None:
        try:
            go(made, tmp_path / "out")
        except OutputError:
            os._exit(42)

    go(made, tmp_path / "out", check=lambda folder: codes.append(in_a_child(second)))
    assert codes == [42]
    assert listing(tmp_path / "out") == clean


def test_a_second_run_while_the_first_is_being_published_spoils_nothing(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None]
) -> None:
    """The same command started again in the last moments of the first one, at every step of its publication."""
    published = staging_module.Staging.publish
    problems: list[str] = []
    for at in itertools.count(1):
        out = prepared(tmp_path / f"place{at}", old=False)
        steps = Steps(at)

        def second(name: str, args: tuple[Any, ...], steps: Steps = steps, out: Path = out) -> None:
            if steps.count == steps.at:
                in_a_child(lambda: run_plan(plan_of(made), out, exist_ok=True))

        steps.what = second

        def publish(self: Staging, steps: Steps = steps) -> None:
            with pytest.MonkeyPatch.context() as patch:
                steps.install(patch)
                published(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(staging_module.Staging, "publish", publish)
            try:
                go(made, out)
            except Exception as error:
                problems.append(f"step {at}, {steps.last}: first run: {type(error).__name__}: {error}")
        if (now := state(out, clean)) != "whole":
            problems.append(f"step {at}, {steps.last}: the destination is {now}")
        problems += [f"step {at}, {steps.last}: {p}" for p in broken_laws(made, out, False, clean)]
        if steps.count < at:
            break
    assert at > 5
    assert not problems, report(problems)


def test_a_lock_that_cannot_be_made_leaves_the_work_of_another_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.output import staging as module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    work = module.Staging(tmp_path / "out", plan_of(made).digest, {})
    (work.path / "kept").mkdir(parents=True)
    monkeypatch.setattr(module._Lock, "acquire", full)
    with pytest.raises(InputError, match="No space left"):
        run_plan(plan_of(made), tmp_path / "out")
    assert (work.path / "kept").is_dir()


def test_a_destination_that_appears_during_the_run_is_not_replaced_without_exist_ok(made: Path, tmp_path: Path) -> None:
    """Hours may pass between the check and the publication."""

    def appear(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")

    with pytest.raises(InputError):
        run_plan(plan_of(made), tmp_path / "out", check=appear)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_foreign_directory_that_appears_during_the_run_is_not_replaced_with_exist_ok_either(
    made: Path, tmp_path: Path
) -> None:
    def appear(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")

    with pytest.raises(InputError):
        run_plan(plan_of(made), tmp_path / "out", exist_ok=True, check=appear)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_check_that_fails_publishes_nothing(made: Path, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise InputError("not good")

    with pytest.raises(InputError, match="not good"):
        go(made, tmp_path / "out", check=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
def test_any_failure_leaves_no_lock_and_no_open_file_behind(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], error: type[BaseException]
) -> None:
    """In a notebook the process lives on: the same cell, run again, must work."""

    def fail(folder: Path) -> None:
        raise error

    go(made, tmp_path / "warm")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        go(made, tmp_path / "out", check=fail)
    assert len(os.listdir("/proc/self/fd")) == before
    go(made, tmp_path / "out")
    assert listing(tmp_path / "out") == clean


def test_no_task_writes_after_its_file_is_closed(made: Path, tmp_path: Path) -> None:
    """A descriptor that is closed may be another file's a moment later."""
    open_targets: set[int] = set()
    wrong: list[str] = []
    real_run = shard_module.Bands.run
    count = itertools.count()

    def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
        fd = REAL["open"](path, flags, *args, **more)
        if flags & os.O_RDWR:
            open_targets.add(fd)
        return fd

    real_close, real_pwrite = os.close, os.pwrite

    def close(fd: int) -> None:
        open_targets.discard(fd)
        real_close(fd)

    def pwrite(fd: int, *args: Any) -> int:
        time.sleep(0.02)
        if fd not in open_targets:
            wrong.append(f"write to closed descriptor {fd}")
        return real_pwrite(fd, *args)

    def run(self: Any, *args: Any) -> None:
        if next(count) == 1:
            raise KeyboardInterrupt
        real_run(self, *args)

    write_base(tmp_path / "base", layers=8)
    write_adapter(tmp_path / "adapter", modules_of(8))
    plan = make_plan(tmp_path / "base", [tmp_path / "adapter"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "open", opened)
        patch.setattr(os, "close", close)
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(shard_module.Bands, "run", run)
        run_plan(plan, tmp_path / "out", workers=4)
    assert not wrong


# ─── durability ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_file_and_folder_is_synced_before_it_is_published(made: Path, tmp_path: Path) -> None:
    """What is renamed into place must be on disk: each file after its last write, each folder after its last name."""
    synced: set[str] = set()
    unsynced_at_publication: list[str] = []

    def path_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def fsync(fd: int) -> None:
        synced.add(path_of(fd))

    def pwrite(fd: int, *args: Any) -> int:
        synced.discard(path_of(fd))
        return int(REAL["pwrite"](fd, *args))

    def copy_file_range(source: int, target: int, *args: Any) -> int:
        synced.discard(path_of(target))
        return int(REAL["copy_file_range"](source, target, *args))

    def rename(old: Any, new: Any, **more: Any) -> None:
        old, new = os.path.abspath(old), os.path.abspath(new)
        if new == str(tmp_path / "out"):
            there = [old, *(str(p) for p in Path(old).rglob("*"))]
            unsynced_at_publication.extend(sorted(set(there) - synced))
        REAL["rename"](old, new, **more)
        if old in synced:
            synced.discard(old)
            synced.add(new)
        synced.discard(os.path.dirname(new))
        synced.discard(os.path.dirname(old))

    with pytest.MonkeyPatch.context() as patch:
        for name, function in (
            ("fsync", fsync),
            ("pwrite", pwrite),
            ("copy_file_range", copy_file_range),
            ("rename", rename),
        ):
            patch.setattr(os, name, function)
        run_plan(plan_of(made), tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    assert unsynced_at_publication == []
    assert str(tmp_path) in synced, "the folder that holds the new name"


def test_a_record_is_written_after_its_shard_is_synced(made: Path, tmp_path: Path) -> None:
    order: list[str] = []

    def fsync(fd: int) -> None:
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        run_plan(plan_of(made), tmp_path / "out")
    for i in (1, 2):
        shard = f"model-{i:05d}-of-00002.safetensors"
        assert order.index(shard) < order.index(f".{shard}.json.part")


# ─── a real kill ─────────────────────────────────────────────────────────────────────────────────────────────────────

SLOW_EXPORT = """
import os, sys, time
from inlay.cli.main import main
for name in ("pwrite", "copy_file_range", "fsync", "rename", "mkdir", "unlink"):
    def slow(*args, _real=getattr(os, name), **more):
        time.sleep(0.004)
        return _real(*args, **more)
    setattr(os, name, slow)
print("started", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def killed(made: Path, tmp_path: Path) -> Iterator[Callable[[float], int]]:
    words = ["export", "--model", str(made / "base"), "--adapters", str(made / "adapter"), "--merge_lora", "--quiet",
             "--output_dir", str(tmp_path / "place" / "out"), "--exist_ok"]  # fmt: skip

    def run(seconds: float) -> int:
        process = subprocess.Popen([sys.executable, "-c", SLOW_EXPORT, *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        return process.wait()

    yield run


@WITH_AND_WITHOUT
def test_a_killed_process_leaves_all_or_nothing(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], killed: Callable[[float], int], old: bool
) -> None:
    codes = []
    for part in range(4):
        out = prepared(tmp_path / "place", old)
        codes.append(killed(0.05 + random.uniform(0.15, 0.25) * part))
        assert not list(broken_laws(made, out, old, clean)), f"killed in part {part}"
    assert -signal.SIGKILL in codes


def test_a_killed_run_that_is_started_again_and_again_gets_done(
    made: Path, tmp_path: Path, clean: dict[str, bytes | None], killed: Callable[[float], int]
) -> None:
    out = prepared(tmp_path / "place", old=False)
    for i in range(5):
        killed(0.1 + 0.1 * i)
        assert state(out, clean) in ("absent", "whole")
    assert not list(broken_laws(made, out, False, clean))


def test_the_material_of_these_tests_has_both_kinds_of_tensors_in_both_shards(made: Path) -> None:
    plan = plan_of(made)
    for shard, touched in zip(plan.shards, (FIRST, SECOND), strict=True):
        assert {e.key for e in shard.entries if e.touched} == touched
        assert any(e.copied for e in shard.entries)
    assert np.prod(plan.shards[0].entries[0].shape) > 0
