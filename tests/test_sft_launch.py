"""Several processes of `inlay sft`: they make the steps that one makes with as many rows, and speak with one voice."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cases import Kit
from processes import environment, run
from trainable import FAST, copy_base, inlay, log, train, write_rows

SINGLE = "--save_steps 2 --lora_dropout 0"
HALF = f"{SINGLE} --per_device_train_batch_size 2"
QUARTER = f"{SINGLE} --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]

ACCELERATE = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_processes: 2
mixed_precision: {}
"""


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
    """Rows of one step lie in two processes and in two batches of each, with different numbers of learned tokens."""
    one = train(base, tmp_path, SINGLE, steps=3)
    done = run(["-m", "inlay", *command(base, tmp_path, QUARTER)], NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    two = Path(done.stdout.strip())
    said = [line[:8] for line in done.stderr.splitlines() if line.startswith("step")]
    assert said == ["step 1/3", "step 2/3", "step 3/3"]
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
def test_accelerate_with_a_config_learns_what_one_process_learns(base: Path, tmp_path: Path) -> None:
    """Its config may name a type to train in: the recipe's is taken, another one is refused."""
    one = train(base, tmp_path, SINGLE, steps=3)
    config = tmp_path / "config.yaml"
    words = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    words += ["-m", "inlay", *command(base, tmp_path, HALF)]
    config.write_text(ACCELERATE.format("bf16"))
    done = run(words)
    assert done.returncode == 1 and not (tmp_path / "several").exists()
    assert done.stderr.count("mixed_precision bf16 of accelerate launch: this run trains in float32") == 1, done.stderr
    config.write_text(ACCELERATE.format("'no'"))
    done = run(words)
    assert done.returncode == 0, done.stderr
    same(one, Path(done.stdout.strip()))


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
