"""How the processes of `inlay sft` are started, told to stop, and ended; and which settings of them are refused."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inlay.errors import InputError
from inlay.train.launch import (
    SAME_SECONDS,
    Group,
    adopt,
    check_settings,
    check_sharding,
    group,
    launch,
    wait_for_the_end,
)
from inlay.train.recipe import Recipe
from processes import environment

# --- which processes are started ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"NPROC_PER_NODE": "1"}, None),
        ({"NPROC_PER_NODE": "2"}, Group(2)),
        ({"NPROC_PER_NODE": "2", "LOCAL_RANK": "0", "RANK": "0"}, None),
        ({"NNODES": "1", "NPROC_PER_NODE": "8"}, Group(8)),
        # one process on each of two machines: without a launch each would train alone
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, Group(1, 2, 1)),
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "NPROC_PER_NODE": "4"},
            Group(4, 2, 0),
        ),
    ],
)
def test_the_words_of_the_environment_say_what_is_started(given: dict[str, str], expected: Group | None) -> None:
    assert group(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE=all: must be a whole number, at least 1"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: must be"),
        ({"NNODES": "two"}, "NNODES=two: must be"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NNODES=2: give NODE_RANK, MASTER_PORT too"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "must be below NNODES=2"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "it started one"),
    ],
)
def test_words_that_contradict_each_other_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        group(given)


def test_a_rank_of_mpirun_and_one_of_a_machine_alone_are_taken_over() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    adopt(mpi)
    assert (mpi["RANK"], mpi["WORLD_SIZE"], mpi["LOCAL_RANK"]) == ("3", "4", "1") and group(mpi) is None
    pod = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    adopt(pod)
    assert (pod["LOCAL_RANK"], pod["MASTER_PORT"]) == ("0", "1")
    for untouched in ({}, {"NPROC_PER_NODE": "8", "RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        before = dict(untouched)
        adopt(untouched)
        assert untouched == before


def test_what_would_not_be_divided_as_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="several processes, and here is one"):
        check_sharding(Recipe(fsdp="full_shard"), 1, False)
    with pytest.raises(InputError, match="among GPUs only"):
        check_sharding(Recipe(fsdp="full_shard"), 2, True)
    with pytest.raises(InputError, match="ranks its weights by whole gradients"):
        check_sharding(Recipe(train_type="adalora", deepspeed="ds.json"), 2, False)
    check_sharding(Recipe(train_type="adalora"), 2, True)
    check_sharding(Recipe(fsdp="full_shard"), 2, False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="among GPUs only"):
        check_sharding(Recipe(), 2, True)


def settings(states: str | None = None, differing: Sequence[str] = (), **zero: object) -> SimpleNamespace:
    """Of transformers' arguments what has the settings of FSDP and DeepSpeed, for a run in float32."""
    config = SimpleNamespace(config={"zero_optimization": zero}, mismatches=list(differing))
    plugin = SimpleNamespace(hf_ds_config=config)
    return SimpleNamespace(
        fsdp_plugin_args={"state_dict_type": states}, deepspeed_plugin=plugin, bf16=False, fp16=False
    )


def test_settings_that_leave_a_checkpoint_in_parts_are_refused() -> None:
    fsdp = Recipe(fsdp="true")
    check_settings(settings("FULL_STATE_DICT"), fsdp)
    with pytest.raises(InputError, match="state_dict_type SHARDED_STATE_DICT would leave checkpoints in parts"):
        check_settings(settings("SHARDED_STATE_DICT"), fsdp)
    by_config = {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    with pytest.raises(InputError, match="give FULL_STATE_DICT"):
        check_settings(settings(), Recipe(), by_config)
    check_settings(settings(), Recipe(), {**by_config, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"})
    full, pissa = Recipe(deepspeed="ds.json", train_type="full"), Recipe(deepspeed="ds.json", init_weights="pissa")
    with pytest.raises(InputError, match="stage3_gather_16bit_weights_on_model_save"):
        check_settings(settings(stage=3), full)
    with pytest.raises(InputError, match="--init_weights pissa: cannot be taken"):
        check_settings(settings(stage=3), pissa)
    check_settings(settings(stage=3, stage3_gather_16bit_weights_on_model_save=True), full)
    check_settings(settings(stage=3), Recipe(deepspeed="ds.json"))
    check_settings(settings(stage=2), pissa)
    check_settings(settings(), Recipe(), {})


def test_settings_of_deepspeed_that_contradict_the_recipe_are_refused() -> None:
    differing = ["- ds bf16.enabled=True vs hf bf16=False", "- ds gradient_clipping=2 vs hf max_grad_norm=1"]
    with pytest.raises(InputError, match=r"bf16.enabled=True vs hf bf16=False, gradient_clipping=2 vs hf max_grad"):
        check_settings(settings(differing=differing, stage=2), Recipe(deepspeed="ds.json"))


@pytest.mark.parametrize(
    ("asked", "trains", "message"),
    [
        ("bf16", "float32", "mixed_precision bf16 .* trains in float32; give --torch_dtype bfloat16, or"),
        ("bf16", "float16", "mixed_precision bf16 .* trains in float16"),
        ("fp16", "bfloat16", "mixed_precision fp16 .* trains in bfloat16; give --torch_dtype float16, or"),
        ("fp8", "bfloat16", "mixed_precision fp8 .* trains in bfloat16; give mixed_precision no"),
        ("bf16", "bfloat16", None),
        ("no", "bfloat16", None),
        ("no", "float32", None),
        ("fp16", "float16", None),
    ],
)
def test_a_type_of_accelerate_that_the_recipe_does_not_train_in_is_refused(
    asked: str, trains: str, message: str | None
) -> None:
    """accelerate itself takes its own type where the recipe's is float32, and else the recipe's."""
    arguments = SimpleNamespace(bf16=trains == "bfloat16", fp16=trains == "float16")
    with contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message):
        check_settings(arguments, Recipe(), {"ACCELERATE_MIXED_PRECISION": asked})


# --- how they begin and end ---------------------------------------------------------------------------


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


def stand_in(folder: Path, code: str) -> dict[str, str]:
    """A program that stands in the place of `inlay`, and the environment in which it does."""
    (folder / "inlay").mkdir()
    (folder / "inlay" / "__init__.py").write_text("")
    (folder / "inlay" / "__main__.py").write_text(f"import os, signal, sys, time\nrank = os.environ['RANK']\n{code}\n")
    return environment(PYTHONPATH=str(folder), PYTHONSAFEPATH="1")


def started(folder: Path, code: str, count: Group, **more: str) -> int:
    """`launch` of a stand-in."""
    return launch([str(folder)], count, stand_in(folder, code) | more)


@contextlib.contextmanager
def starter(folder: Path, code: str) -> Iterator[subprocess.Popen[bytes]]:
    """`launch` of two stand-ins by a process of its own, the first of its group."""
    words = f"""
import sys
from inlay.train.launch import SAME_SECONDS, Group, launch
sys.exit(launch([{str(folder)!r}], Group(2), {stand_in(folder, code)!r}))"""
    with subprocess.Popen([sys.executable, "-c", words], start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for(files: Sequence[Path], size: int = 1) -> None:
    """Until each has at least so many bytes."""
    wait_until(lambda: all(f.exists() and f.stat().st_size >= size for f in files))


def states(processes: Sequence[str]) -> list[str]:
    """Those that `ps` shows of the processes that are alive: T is at rest, Z is ended."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(processes)], capture_output=True, text=True)
    return [s for s in shown.stdout.split() if not s.startswith("Z")]


def test_each_process_is_told_its_place_among_all_machines(tmp_path: Path) -> None:
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"open(sys.argv[1] + '/told-' + rank, 'w').write(' '.join(os.environ[n] for n in {told}))"
    assert started(tmp_path, code, Group(2, 3, 2), MASTER_ADDR="there", MASTER_PORT="1234") == 0
    found = {p.name: p.read_text() for p in tmp_path.glob("told-*")}
    assert found == {"told-4": "4 0 6 2 there 1234", "told-5": "5 1 6 2 there 1234"}


def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    assert started(tmp_path, "sys.exit(2) if rank == '1' else time.sleep(60)", Group(3)) == 2
    assert time.monotonic() - began < 30


def test_a_process_that_is_killed_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else time.sleep(60)"
    assert started(tmp_path, code, Group(2)) == 137
    assert capfd.readouterr().err == "process 1 was ended by SIGKILL\n"


READY = (
    "folder = sys.argv[1]\n"
    "open(f'{folder}/ready-{rank}', 'w').write(str(os.getpid()))\n"
    "while len([n for n in os.listdir(folder) if n.startswith('ready-')]) < 2: time.sleep(0.05)\n"
)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path, name: str) -> None:
    """One that only the starter was told."""
    code = (
        "def stop(*_):\n    time.sleep(float(rank))\n    open(sys.argv[1] + '/saved-' + rank, 'w')\n    sys.exit(130)\n"
        f"signal.signal(signal.{name}, stop)\n{READY}"
        f"os.kill(os.getppid(), signal.{name}) if rank == '0' else None\n"
        "time.sleep(60)"
    )
    before = [signal.getsignal(s) for s in STOPS]
    assert started(tmp_path, code, Group(2)) == 130
    assert {p.name for p in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert [signal.getsignal(s) for s in STOPS] == before


def test_what_the_whole_group_is_told_twice_reaches_each_process_once(tmp_path: Path) -> None:
    """As Ctrl-C does, and `timeout`, which tells the process that it started and then its group."""
    code = (
        "heard = []\n"
        f"for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda n, _: heard.append(n))\n{READY}"
        "end = time.monotonic() + 20\n"
        "while not heard and time.monotonic() < end: time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        "open(f'{folder}/heard-{rank}', 'w').write(str(heard))\n"
        "sys.exit(130)"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        with starter(folder, code) as first:
            wait_for([folder / "ready-0", folder / "ready-1"])
            first.send_signal(number)
            time.sleep(0.2)
            os.killpg(first.pid, number)
            assert first.wait(timeout=30) == 130
        assert [p.read_text() for p in folder.glob("heard-*")] == [f"[{int(number)}]"] * 2


def test_a_second_signal_is_passed_on_too(tmp_path: Path) -> None:
    code = f"signal.signal(signal.SIGINT, lambda *_: open(f'{{folder}}/heard-{{rank}}', 'a').write('x'))\n{READY}"
    with starter(tmp_path, code + "for _ in range(600): time.sleep(0.1)") as first:
        wait_for([tmp_path / "ready-0", tmp_path / "ready-1"])
        for count in (1, 2):
            first.send_signal(signal.SIGINT)
            wait_for([tmp_path / "heard-0", tmp_path / "heard-1"], count)
            time.sleep(SAME_SECONDS)
        first.terminate()
        assert first.wait(timeout=30) == 128 + signal.SIGTERM


def test_all_rest_while_the_starter_does(tmp_path: Path) -> None:
    """Ctrl-Z reaches the starter only."""
    with starter(tmp_path, READY + "time.sleep(60)") as first:
        ready = [tmp_path / "ready-0", tmp_path / "ready-1"]
        wait_for(ready)
        processes = [str(first.pid), *(p.read_text() for p in ready)]
        for number, rest in ((signal.SIGTSTP, True), (signal.SIGCONT, False)):
            first.send_signal(number)
            wait_until(lambda rest=rest: [s[0] == "T" for s in states(processes)] == [rest] * 3)
        first.terminate()
        assert first.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_stop_while_not_all_are_started_ends_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is started later would not hear of it."""
    processes: list[subprocess.Popen[bytes]] = []

    class Told(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if processes:
                os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Told)
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, "time.sleep(60)", Group(3))
    assert len(processes) == 1 and processes[0].returncode == -signal.SIGKILL


def test_helpers_of_a_process_end_with_it(tmp_path: Path) -> None:
    """Such as those that read its data."""
    code = (
        "import subprocess\nfolder = sys.argv[1]\nif rank == '0':\n"
        "    helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    open(f'{folder}/helper', 'w').write(str(helper.pid))\n    helper.wait()\n"
        "while not os.path.exists(f'{folder}/helper') or not open(f'{folder}/helper').read(): time.sleep(0.05)\n"
        "sys.exit(2)"
    )
    assert started(tmp_path, code, Group(2)) == 2
    wait_until(lambda: not states([(tmp_path / "helper").read_text()]))


@pytest.mark.parametrize(
    ("rank", "told", "waits"), [("0", True, False), ("0", False, True), ("1", True, True), ("1", False, True)]
)
def test_who_has_nothing_to_tell_waits_to_be_ended(
    monkeypatch: pytest.MonkeyPatch, rank: str, told: bool, waits: bool
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    wait_for_the_end(told)
    assert not waited
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    wait_for_the_end(told)
    assert bool(waited) is waits
