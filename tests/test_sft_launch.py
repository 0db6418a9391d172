"""Several processes of `inlay sft`: they make the steps that one makes with as many rows, and speak with one voice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cases import Kit
from inlay.errors import InputError
from inlay.train.launch import Group, adopt, check_gathering, check_sharding, group, launch, wait_for_the_end
from inlay.train.recipe import Recipe
from trainable import FAST, copy_base, inlay, log, train, write_rows

SINGLE = "--save_steps 2 --lora_dropout 0"
HALF = f"{SINGLE} --per_device_train_batch_size 2"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
FREE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """That of the tests without a word about processes."""
    return {**{k: v for k, v in os.environ.items() if k not in FREE}, "OMP_NUM_THREADS": "1", **more}


def run(words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=environment(**more), capture_output=True, text=True, timeout=300
    )


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


def settings(states: str | None = None, **zero: object) -> SimpleNamespace:
    """Of transformers' arguments what has the settings of FSDP and DeepSpeed."""
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={"zero_optimization": zero}))
    return SimpleNamespace(fsdp_plugin_args={"state_dict_type": states}, deepspeed_plugin=plugin)


def test_settings_that_leave_a_checkpoint_in_parts_are_refused() -> None:
    fsdp = Recipe(fsdp="true")
    check_gathering(settings("FULL_STATE_DICT"), fsdp)
    with pytest.raises(InputError, match="state_dict_type SHARDED_STATE_DICT would leave checkpoints in parts"):
        check_gathering(settings("SHARDED_STATE_DICT"), fsdp)
    by_config = {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    with pytest.raises(InputError, match="give FULL_STATE_DICT"):
        check_gathering(settings(), Recipe(), by_config)
    check_gathering(settings(), Recipe(), {**by_config, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"})
    full, pissa = Recipe(deepspeed="ds.json", train_type="full"), Recipe(deepspeed="ds.json", init_weights="pissa")
    with pytest.raises(InputError, match="stage3_gather_16bit_weights_on_model_save"):
        check_gathering(settings(stage=3), full)
    with pytest.raises(InputError, match="--init_weights pissa: cannot be taken"):
        check_gathering(settings(stage=3), pissa)
    check_gathering(settings(stage=3, stage3_gather_16bit_weights_on_model_save=True), full)
    check_gathering(settings(stage=3), Recipe(deepspeed="ds.json"))
    check_gathering(settings(stage=2), pissa)
    check_gathering(settings(), Recipe(), {})


# --- how they begin and end ---------------------------------------------------------------------------


def started(folder: Path, code: str, count: Group, **more: str) -> int:
    """`launch` of a program that stands in the place of `inlay`."""
    (folder / "inlay").mkdir()
    (folder / "inlay" / "__init__.py").write_text("")
    (folder / "inlay" / "__main__.py").write_text(f"import os, signal, sys, time\nrank = os.environ['RANK']\n{code}\n")
    return launch([str(folder)], count, environment(PYTHONPATH=str(folder), PYTHONSAFEPATH="1", **more))


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


def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    code = (
        "def stop(*_):\n    time.sleep(float(rank))\n    open(sys.argv[1] + '/saved-' + rank, 'w')\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open(sys.argv[1] + '/ready-' + rank, 'w')\n"
        "while len([n for n in os.listdir(sys.argv[1]) if n.startswith('ready-')]) < 2: time.sleep(0.05)\n"
        "os.kill(os.getppid(), signal.SIGTERM) if rank == '0' else None\n"
        "time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert started(tmp_path, code, Group(2)) == 130
    assert {p.name for p in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert signal.getsignal(signal.SIGTERM) is before


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


# --- what they learn ----------------------------------------------------------------------------------


@pytest.fixture
def base(kit: Kit, tmp_path: Path) -> Path:
    pytest.importorskip("accelerate")
    return copy_base(kit, "qwen2", tmp_path)


def command(base: Path, folder: Path, more: str, steps: int = 3) -> list[str]:
    data = write_rows(folder / "data.jsonl")
    given = f"sft --model {base} --dataset {data} --output_dir {folder / 'several'} --max_steps {steps} {FAST} {more}"
    return given.split()


def same(one: Path, several: Path, weights: str = "adapter_model.safetensors") -> None:
    """Sums in another order differ in the last bits. The steps of both are logged once, in one run folder."""
    from safetensors.torch import load_file

    assert len(list(several.parent.parent.iterdir())) == 1, "each process made a run of its own"
    assert [r["step"] for r in log(several.parent)] == [r["step"] for r in log(one.parent)]
    for a, b in zip(log(one.parent), log(several.parent), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    expected, found = load_file(one / weights), load_file(several / weights)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert tensor.shape == found[key].shape and (tensor - found[key]).abs().max() < 1e-5, key


def exported(checkpoint: Path, out: Path) -> None:
    code, _, err = inlay(f"export --adapters {checkpoint} --merge_lora --output_dir {out}")
    assert code == 0, err
    code, found, err = inlay(f"verify --adapters {checkpoint} --merged {out} --exact")
    assert code == 0 and "passed" in found, found + err


def test_two_processes_learn_what_one_learns_and_speak_once(base: Path, tmp_path: Path) -> None:
    one = train(base, tmp_path, SINGLE, steps=3)
    done = run(["-m", "inlay", *command(base, tmp_path, HALF)], NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    two = Path(done.stdout.strip())
    assert [line[:8] for line in done.stderr.splitlines() if line.startswith("step")] == [
        f"step {i}/3" for i in (1, 2, 3)
    ]
    same(one, two)
    exported(two, tmp_path / "out")


@pytest.mark.slow
def test_what_all_find_wrong_is_said_once(base: Path, tmp_path: Path) -> None:
    words = command(base, tmp_path, "--target_modules q_prok")
    done = run(["-m", "inlay", *words], NPROC_PER_NODE="2")
    assert done.returncode == 2 and not (tmp_path / "several").exists()
    assert done.stderr.count("q_prok") == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_what_one_alone_finds_wrong_is_said_once(base: Path, tmp_path: Path) -> None:
    """Such as data that lie on one machine only: the others wait for it in vain."""
    words = command(base, tmp_path, HALF)
    other = [w.replace("data.jsonl", "nowhere.jsonl") for w in words]
    both = (
        f"import sys, os; from inlay.cli.main import main; sys.exit(main(({words}, {other})[int(os.environ['RANK'])]))"
    )
    (tmp_path / "both.py").write_text(both)
    done = run([*TORCHRUN, str(tmp_path / "both.py")])
    said = [line for line in done.stderr.splitlines() if line.startswith("InputError")]
    assert done.returncode == 1 and len(said) == 1 and "nowhere.jsonl: no such file" in said[0], done.stderr


@pytest.mark.slow
def test_a_run_of_two_that_was_stopped_goes_on_as_if_it_had_not_been(base: Path, tmp_path: Path) -> None:
    whole = train(base, tmp_path, SINGLE, steps=5)
    first = subprocess.Popen(
        [sys.executable, "-m", "inlay", *command(base, tmp_path, HALF, 5)], env=environment(NPROC_PER_NODE="2"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stderr is not None
    said = []
    for line in first.stderr:
        said.append(line)
        if line.startswith("step 1/"):
            first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=300)
    assert first.returncode == 130 and sum("stopping after this step" in line for line in said) == 1, said
    checkpoint = Path(out.strip())
    assert checkpoint.name != "checkpoint-5"
    done = run(["-m", "inlay", "sft", "--resume_from_checkpoint", str(checkpoint)], NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    same(whole, Path(done.stdout.strip()))
    alone = run(["-m", "inlay", "sft", "--resume_from_checkpoint", str(checkpoint)])
    assert alone.returncode == 2 and "processes (2 then, 1 now)" in alone.stderr and "Traceback" not in alone.stderr


@pytest.mark.slow
def test_torchrun_and_two_machines_learn_what_one_process_learns(base: Path, tmp_path: Path) -> None:
    one = train(base, tmp_path, SINGLE, steps=3)
    for name in ("torchrun", "machines"):
        (tmp_path / name).mkdir()
    done = run([*TORCHRUN, "-m", "inlay", *command(base, tmp_path / "torchrun", HALF)])
    assert done.returncode == 0, done.stderr
    same(one, Path(done.stdout.strip()))
    words = ["-m", "inlay", *command(base, tmp_path / "machines", HALF)]
    more = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    second = subprocess.Popen(
        [sys.executable, *words], env=environment(**more, NODE_RANK="1"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    done = run(words, **more, NODE_RANK="0")
    assert second.communicate(timeout=60) == ("", "") and second.returncode == done.returncode == 0, done.stderr
    same(one, Path(done.stdout.strip()))


@pytest.mark.slow
def test_accelerate_that_starts_one_process_for_two_is_refused(base: Path, tmp_path: Path) -> None:
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "inlay"]
    done = run([*words, *command(base, tmp_path, HALF)])
    assert done.returncode != 0 and "several processes were asked for and it started one" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    ["", "--init_weights pissa --lora_rank 4", "--train_type full --learning_rate 1e-3"],
    ids=["lora", "pissa", "full"],
)
def test_a_model_divided_by_fsdp_is_saved_whole_and_goes_on(base: Path, tmp_path: Path, more: str) -> None:
    whole = "full" in more
    weights = "model.safetensors" if whole else "adapter_model.safetensors"
    more += " --save_steps 2" if whole else f" {SINGLE}"
    one = train(base, tmp_path, more, steps=3)
    script = str(Path(__file__).with_name("sharded.py"))
    done = run([*TORCHRUN, script, *command(base, tmp_path, f"{more} --per_device_train_batch_size 2 --fsdp")])
    assert done.returncode == 0, done.stderr
    divided = Path(done.stdout.strip())
    assert (divided / "pytorch_model_fsdp.bin").exists()
    same(one, divided, weights)
    if not whole:
        exported(divided, tmp_path / "out")
    done = run([*TORCHRUN, script, "sft", "--resume_from_checkpoint", str(divided.parent / "checkpoint-2")])
    assert done.returncode == 0, done.stderr
    same(one, divided, weights)
