"""The loop of `inlay sft`: how losses are counted, which checkpoints stay, and going on as if nothing had been."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import build
from cases import MODELS, Kit, third_party
from inlay.errors import OutputError
from inlay.train import records
from inlay.train.stop import Stop
from trainable import FAST, ROWS, copy_base, inlay, log, train, write_rows

pytest.importorskip("accelerate")

# Answers of unequal lengths, so that a mean over rows is not one over tokens.
UNEQUAL = [*ROWS, {"query": "how?", "response": "as long as it takes"}]
ADALORA = "--train_type adalora --adalora_init_r 4 --adalora_target_r 2"


@pytest.fixture
def base(kit: Kit, tmp_path: Path) -> Path:
    return copy_base(kit, "qwen2", tmp_path)


def run(base: Path, folder: Path, more: str, steps: int) -> Path:
    """The last checkpoint of a run on UNEQUAL, one row in a batch unless `more` says otherwise."""
    data = write_rows(folder / "unequal.jsonl", UNEQUAL)
    code, out, err = inlay(
        f"sft --model {base} --dataset {data} --output_dir {folder / 'runs'} --max_steps {steps} "
        f"--gradient_checkpointing false --learning_rate 3e-2 {more}"
    )
    assert code == 0, err
    return Path(out.strip())


def losses(checkpoint: Path, name: str = "loss") -> list[tuple[float, float]]:
    lines = map(json.loads, (checkpoint.parent / "logging.jsonl").read_text().splitlines())
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.parametrize("method", ["--train_type lora", ADALORA])
def test_a_step_is_the_same_in_one_batch_and_in_many(base: Path, tmp_path: Path, method: str) -> None:
    """Batches hold unequal numbers of tokens; AdaLoRA's penalty is added once a step, not once a batch."""
    more = f"{method} --lora_dropout 0 --logging_steps 1"
    one = run(base, tmp_path, f"{more} --per_device_train_batch_size 5 --gradient_accumulation_steps 1", 3)
    many = run(base, tmp_path, f"{more} --per_device_train_batch_size 1 --gradient_accumulation_steps 5", 3)
    for (_, a), (_, b) in zip(losses(one), losses(many), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("method", ["", ADALORA])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_on_held_out_rows_is_a_mean_over_their_tokens(
    base: Path, tmp_path: Path, batch: int, method: str
) -> None:
    """The oracle is PEFT with the saved adapter, row by row; AdaLoRA's penalty is no part of it."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from inlay.datasets.read import read_dataset
    from inlay.train.examples import UNLABELLED, Encoder

    data = write_rows(tmp_path / "held.jsonl", UNEQUAL)
    more = f"{method} --val_dataset {data} --per_device_eval_batch_size {batch} --gradient_accumulation_steps 2"
    checkpoint = run(base, tmp_path, more, 3)
    total, tokens = 0.0, 0
    with third_party(), torch.no_grad():
        examples, _ = Encoder(AutoTokenizer.from_pretrained(base), 32, "raise").encode(read_dataset(str(data)))
        model = PeftModel.from_pretrained(MODELS["qwen2"].load(base), checkpoint).eval()
        for example in examples:
            scores = model.base_model.model(input_ids=torch.tensor([example.ids])).logits[0, :-1].double()
            wanted = torch.tensor(example.labels[1:])
            total += float(torch.nn.functional.cross_entropy(scores, wanted, ignore_index=UNLABELLED, reduction="sum"))
            tokens += int((wanted != UNLABELLED).sum())
    assert losses(checkpoint, "eval_loss") == [(3, pytest.approx(total / tokens, rel=1e-4))]


@pytest.mark.parametrize(
    "more",
    [
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --lora_dropout 0.3",
        "--packing --max_length 30 --gradient_accumulation_steps 1",
        f"{ADALORA} --gradient_accumulation_steps 2 --lora_dropout 0.3 --modules_to_save lm_head",
    ],
)
def test_a_run_that_goes_on_logs_and_learns_the_same(base: Path, tmp_path: Path, more: str) -> None:
    """Checkpoints lie between two lines of the log, and in the middle of an epoch."""
    more = f"{more} --save_steps 3 --logging_steps 5 --val_dataset {write_rows(tmp_path / 'held.jsonl', ROWS[:2])}"
    last = run(base, tmp_path, more, 11)
    expected = losses(last), losses(last, "eval_loss"), (last / "adapter_model.safetensors").read_bytes()
    assert [step for step, _ in expected[0]] == [1, 5, 10]
    for step in (3, 9):
        code, _, err = inlay(f"sft --resume_from_checkpoint {last.parent / f'checkpoint-{step}'}")
        assert code == 0, err
        found = losses(last), losses(last, "eval_loss"), (last / "adapter_model.safetensors").read_bytes()
        assert found == expected


def test_what_adalora_learned_after_going_on_exports_and_verifies(base: Path, tmp_path: Path) -> None:
    last = run(base, tmp_path, f"{ADALORA} --save_steps 2 --gradient_accumulation_steps 1", 4)
    assert inlay(f"sft --resume_from_checkpoint {last.parent / 'checkpoint-2'}")[0] == 0
    code, _, err = inlay(f"export --adapters {last} --merge_lora --output_dir {tmp_path / 'out'}")
    assert code == 0, err
    assert inlay(f"verify --adapters {last} --merged {tmp_path / 'out'} --exact")[0] == 0
    assert json.loads((last / "adapter_config.json").read_text())["orth_reg_weight"] == 0.5
    (last.parent / "checkpoint-2" / "adalora_state.safetensors").unlink()
    code, _, err = inlay(f"sft --resume_from_checkpoint {last.parent / 'checkpoint-2'}")
    assert code == 2 and "lacks adalora_state.safetensors" in err


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_and_the_newest_checkpoints_stay(base: Path, tmp_path: Path, limit: int) -> None:
    """The rows that are held out contradict those that are learned, so the first checkpoint is the best."""
    other = write_rows(tmp_path / "other.jsonl", [{"query": q["query"], "response": "zzzzz"} for q in ROWS])
    last = run(
        base, tmp_path,
        f"--val_dataset {other} --eval_steps 3 --save_steps 2 --save_total_limit {limit} "
        "--gradient_accumulation_steps 4 --lr_scheduler_type constant",
        9,
    )  # fmt: skip
    held_out = dict(losses(last, "eval_loss"))
    assert set(held_out) == {2, 3, 4, 6, 8, 9}, "each checkpoint is evaluated"
    best = min((2, 4, 6, 8, 9), key=lambda step: held_out[step])
    assert best < 8, held_out
    left = {p.name for p in last.parent.glob("checkpoint-*")}
    assert left == {f"checkpoint-{step}" for step in {best, *(8, 9)[-limit:]}}
    assert (last.parent / "last").resolve() == last
    assert (last.parent / "best").resolve() == last.parent / f"checkpoint-{best}"


def test_checkpoints_that_are_to_be_written_anew_do_not_push_out_the_current_one(tmp_path: Path) -> None:
    from inlay.train.records import remove_old

    for step in (1, 2, 3, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, 1, 3, best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (1, 3, 8, 9)]


def test_moved_data_and_other_held_out_rows_are_no_other_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "d.jsonl")
    code, out, err = inlay(
        f"sft --model {base} --dataset d.jsonl#4 --val_dataset d.jsonl --output_dir r --max_steps 4 --save_steps 2 {FAST}"
    )
    assert code == 0, err
    last = Path(out.strip())
    assert json.loads((last / "args.json").read_text())["dataset"] == [f"{tmp_path / 'd.jsonl'}#4"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = losses(last)
    held_out = write_rows(tmp_path / "held.jsonl", ROWS[:1])
    moved = shutil.copy(tmp_path / "d.jsonl", tmp_path / "moved.jsonl")
    for more in ("", f"--val_dataset {held_out}", f"--dataset {moved}#4"):
        code, _, err = inlay(f"sft --resume_from_checkpoint {last.parent / 'checkpoint-2'} {more}")
        assert code == 0 and losses(last) == expected, err


def test_another_tokenizer_is_another_run(base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path, steps=2)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["e"], words["h"] = words["h"], words["e"]
    build.write_json(base / "tokenizer.json", tokenizer)
    code, _, err = inlay(f"sft --resume_from_checkpoint {checkpoint}")
    assert code == 2 and "belongs to another run: data" in err


def test_a_disk_that_is_full_leaves_no_half_checkpoint(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl")
    command = f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'runs'} --max_steps 2 {FAST}"
    (tmp_path / "whole").mkdir()
    size = (train(base, tmp_path / "whole", steps=2) / "optimizer.pt").stat().st_size
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, limits[1]))
        code, _, err = inlay(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert code == 2 and "checkpoint-2: cannot be saved" in err and "Traceback" not in err
    (made,) = (tmp_path / "runs").iterdir()
    assert not list(made.glob("checkpoint-*")) and not (made / "last").exists() and len(log(made)) == 2


KILLED = """
import os, signal, sys
import torch
from inlay.cli.main import main

save = torch.save

def dying(obj, path, *args, **kwargs):
    save(obj, path, *args, **kwargs)
    if "checkpoint-4" in str(path) and str(path).endswith(sys.argv[1]):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = dying
main(sys.argv[2:])
"""


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth"])
def test_a_run_that_is_killed_while_it_saves_leaves_whole_checkpoints_alone(
    base: Path, tmp_path: Path, file: str
) -> None:
    (tmp_path / "a").mkdir()
    whole = train(base, tmp_path / "a", "--save_steps 2", steps=4)
    data = write_rows(tmp_path / "data.jsonl")
    more = f"--model {base} --dataset {data} --output_dir {tmp_path / 'runs'} --max_steps 4 --save_steps 2 {FAST}"
    ended = subprocess.run([sys.executable, "-c", KILLED, file, "sft", *more.split()], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    (made,) = (tmp_path / "runs").iterdir()
    assert [p.name for p in made.glob("checkpoint-*")] == ["checkpoint-2"] == [(made / "last").resolve().name]
    code, _, err = inlay(f"sft --resume_from_checkpoint {made / 'last'}")
    assert code == 0, err
    assert (made / "last").resolve().name == "checkpoint-4" and not (made / ".saving").exists()
    one, other = ((p / "adapter_model.safetensors").read_bytes() for p in (whole, made / "checkpoint-4"))
    assert one == other and {p.name for p in whole.iterdir()} == {p.name for p in (made / "last").iterdir()}


def test_a_stop_that_is_told_twice_at_once_still_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("inlay.train.stop.time.monotonic", lambda: clock[0])
    stop = Stop()
    stop(signal.SIGTERM, None)
    stop(signal.SIGINT, None)
    assert stop.asked
    clock[0] += 5
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from before a checkpoint writes it anew."""
    old = records.checkpoint_path(tmp_path, 2)
    old.mkdir()
    (old / "weights").write_text("whole")
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("inlay.train.records.os.rename", failing)
    with pytest.raises(OutputError, match="cannot be saved"), records.whole_or_gone(tmp_path, 2, True):
        records.checkpoint_path(records.draft_folder(tmp_path), 2).mkdir(parents=True)
    assert (old / "weights").read_text() == "whole" and len(calls) > 1


def test_a_checkpoint_on_its_way_out_when_a_run_was_killed_comes_back(tmp_path: Path) -> None:
    drafts = records.draft_folder(tmp_path)
    (drafts / "former-checkpoint-2").mkdir(parents=True)
    (drafts / "former-checkpoint-2" / "weights").write_text("whole")
    with records.whole_or_gone(tmp_path, 4, True):
        records.checkpoint_path(drafts, 4).mkdir(parents=True)
    assert (records.checkpoint_path(tmp_path, 2) / "weights").read_text() == "whole"
    assert records.checkpoint_path(tmp_path, 4).is_dir() and not drafts.exists()


def test_an_error_without_words_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="OSError"), records.whole_or_gone(tmp_path, 2, True):
        raise OSError
