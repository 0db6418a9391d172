"""The command line: every spelling that users type, what goes to which stream, and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import inlay
from build import BF16, F16, F32, listing, modules_of, read_arrays, write_adapter, write_base, write_json
from inlay.cli.main import COMMANDS, main

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base` and adapters `a`, `b`; the working directory lies there too."""
    write_base(tmp_path / "base", layers=1)
    write_adapter(tmp_path / "a", modules_of(1))
    write_adapter(tmp_path / "b", modules_of(1), seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(capsys: Captured, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def merged(capsys: Captured, *words: str) -> dict[str, bytes | None]:
    """The files of an export with these options to `out`, which is removed again."""
    code, _, err = ran(capsys, "export", *words, "--output_dir", "out", "--quiet")
    assert code == 0, err
    found = listing(Path("out"))
    shutil.rmtree("out")
    return found


def refused(capsys: Captured, *words: str) -> str:
    before = listing(Path.cwd())
    code, out, err = ran(capsys, *words)
    assert (code, out) == (2, ""), (code, out, err)
    assert "Traceback" not in err
    assert listing(Path.cwd()) == before
    return err


# ─── spellings ───────────────────────────────────────────────────────────────────────────────────────────────────────

BOTH = ["--model", "base", "--adapters", "a", "b", "--merge_lora", "true"]


@pytest.mark.parametrize(
    "words",
    [
        "--model base --adapters a,b --merge_lora true",
        "--model base --adapters a, b --merge_lora true",
        "--model base --adapters a b --merge_lora",
        "--model base --merge_lora --adapters a b",
        "--merge-lora --model base --adapters a b",
        "--merge-lora=true --model=base --adapters a b",
        "--merge_lora True --model base --adapters a b",
        "--merge_lora 1 --model base --adapters a b",
        "--merge_lora yes --model base --adapters a b",
        "--model_id_or_path base --ckpt_dir a b --merge_lora true",
        "--model-id-or-path base --ckpt-dir a,b --merge-lora true",
        "--model base --adapter a b --merge_lora",
        "--model base --adapters a b --merge_lora --train_type lora",
        "--model base --adapters a b --merge_lora --sft_type lora",
        "--model base --adapters a b --merge_lora --tuner-type lora",
        "--model base/ --adapters a/ b/ --merge_lora",
        "--model ./base --adapters ./a ../{here}/b --merge_lora",
        "--model base --adapters a b --merge_lora --safe_serialization true",
        "--model base --adapters a b --merge_lora --adapter_weights 1,1",
        "--model base --adapters a b --merge_lora --adapter-weights 1.0 1",
        "--model base --adapters a b --merge_lora --combine sum",
        "--model base --adapters a b --merge_lora --device_map cpu --num_threads 3 --max-memory 64MB",
        "--model base --adapters a b --merge_lora --torch_dtype bfloat16",
        "--model base --adapters a b --merge_lora --verify full",
        "--model base --adapters a b --merge_lora --verify none",
        "--model base --adapters a b --merge_lora --verify",
    ],
)
def test_every_spelling_means_the_same_merge(place: Path, capsys: Captured, words: str) -> None:
    wanted = {k: v for k, v in merged(capsys, *BOTH).items() if k.endswith(".safetensors")}
    found = merged(capsys, *words.format(here=place.name).split())
    assert {k: v for k, v in found.items() if k.endswith(".safetensors")} == wanted


def test_an_option_given_twice_adds_or_is_refused_but_drops_nothing(place: Path, capsys: Captured) -> None:
    """`--adapters a --adapters b` must not become `b` alone: the classic loss of an adapter."""
    both = merged(capsys, *BOTH)["model.safetensors"]
    words = [
        "export",
        "--model",
        "base",
        "--adapters",
        "a",
        "--adapters",
        "b",
        "--merge_lora",
        "--quiet",
        "--output_dir",
        "out",
    ]
    code, _, err = ran(capsys, *words)
    if code == 0:
        assert (place / "out" / "model.safetensors").read_bytes() == both
    else:
        assert code == 2
        assert "--adapters" in err


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("", BF16), ("--torch_dtype float32", F32), ("--torch_dtype fp32", F32), ("--torch-dtype float16", F16),
        ("--dtype half", F16), ("--fp16", F16), ("--fp16 true", F16), ("--fp16 false", BF16), ("--bf16", BF16),
        ("--torch_dtype torch.float16", F16), ("--torch_dtype auto", BF16), ("--fp16 false --bf16 true", BF16),
        ("--fp16 --torch_dtype float16", F16), ("--fp16 --torch_dtype fp16", F16), ("--bf16 --dtype bf16", BF16),
        ("--fp16 --torch_dtype auto", F16),
    ],
)  # fmt: skip
def test_the_type_of_the_result_is_the_one_asked_for(place: Path, capsys: Captured, words: str, dtype: Any) -> None:
    code, _, err = ran(capsys, "export", *BOTH, "--quiet", "--output_dir", "out", *words.split())
    assert code == 0, err
    assert {a.dtype for a in read_arrays(place / "out").values()} == {dtype}


@pytest.mark.parametrize("words", ["--fp16 --bf16", "--fp16 --torch_dtype float32", "--bf16 --dtype fp16"])
def test_contradicting_types_are_refused(place: Path, capsys: Captured, words: str) -> None:
    message = refused(capsys, "export", *BOTH, "--output_dir", "out", *words.split())
    assert "contradicting" in message


@pytest.mark.parametrize("name", ["float8", "int8", "bfloat", "float64", "nf4", "-"])
def test_a_type_that_cannot_be_written_is_refused_by_name(place: Path, capsys: Captured, name: str) -> None:
    assert name in refused(capsys, "export", *BOTH, "--output_dir", "out", f"--torch_dtype={name}")


def test_a_path_with_a_comma_stays_one_path(place: Path, capsys: Captured) -> None:
    shutil.copytree("a", "a,b")
    alone = merged(capsys, "--model", "base", "--adapters", "a,b", "--merge_lora")
    assert (
        alone["model.safetensors"]
        == merged(capsys, "--model", "base", "--adapters", "a", "--merge_lora")["model.safetensors"]
    )


def test_negative_weights_are_numbers_and_no_options(place: Path, capsys: Captured) -> None:
    merged(capsys, *BOTH, "--adapter_weights", "1.0", "-0.5")
    merged(capsys, *BOTH, "--adapter_weights", "-1", "-2")
    merged(capsys, *BOTH, "--adapter_weights=-1,0.5")


# ─── the base that is not named ──────────────────────────────────────────────────────────────────────────────────────


def test_the_base_is_taken_from_the_config_of_the_adapter(place: Path, capsys: Captured) -> None:
    wanted = merged(capsys, "--model", "base", "--adapters", "a", "--merge_lora")
    write_adapter(place / "a", modules_of(1), base_model_name_or_path=str(place / "base"))
    found = merged(capsys, "--adapters", "a", "--merge_lora")
    assert found["model.safetensors"] == wanted["model.safetensors"]


def test_the_base_is_taken_from_args_json_of_the_trainer(place: Path, capsys: Captured) -> None:
    wanted = merged(capsys, "--model", "base", "--adapters", "a", "--merge_lora")
    write_json(place / "a" / "args.json", {"model": str(place / "base"), "train_type": "lora"})
    assert merged(capsys, "--adapters", "a", "--merge_lora")["model.safetensors"] == wanted["model.safetensors"]


def test_no_base_at_all_is_refused(place: Path, capsys: Captured) -> None:
    assert "--model" in refused(capsys, "export", "--adapters", "a", "--merge_lora", "--output_dir", "out")


def test_two_bases_are_refused_with_both_names(place: Path, capsys: Captured) -> None:
    write_adapter(place / "a", modules_of(1), base_model_name_or_path=str(place / "base"))
    write_adapter(place / "b", modules_of(1), base_model_name_or_path="org/other")
    message = refused(capsys, "export", "--adapters", "a", "b", "--merge_lora", "--output_dir", "out")
    assert "org/other" in message
    assert "base" in message


def test_a_base_that_cannot_be_found_is_refused_by_name(place: Path, capsys: Captured) -> None:
    write_adapter(place / "a", modules_of(1), base_model_name_or_path="/nowhere/base")
    message = refused(capsys, "export", "--adapters", "a", "--merge_lora", "--output_dir", "out")
    assert "/nowhere/base" in message
    assert "--model" in message


@pytest.mark.parametrize("name", ["nowhere", "org/nowhere", "./nowhere", "/nowhere", "a/b/c", "~nobody/x", "bad name"])
def test_a_name_that_is_no_directory_is_refused(place: Path, capsys: Captured, name: str) -> None:
    for words in (["--model", name, "--adapters", "a"], ["--model", "base", "--adapters", name]):
        message = refused(capsys, "export", *words, "--merge_lora", "--output_dir", "out")
        assert "nowhere" in message or name in message


# ─── the destination ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spelling", ["a", "a/", "./a", "{here}/a"])
def test_the_default_destination_lies_beside_the_adapter(place: Path, capsys: Captured, spelling: str) -> None:
    adapter = spelling.format(here=place)
    assert ran(capsys, "export", "--model", "base", "--adapters", adapter, "--merge_lora", "--quiet")[0] == 0
    assert (place / "a-merged" / "inlay.json").is_file()


def test_the_default_destination_of_the_folder_one_stands_in_lies_beside_it(
    place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "a")
    code, _, err = ran(capsys, "export", "--model", "../base", "--adapters", ".", "--merge_lora", "--quiet")
    assert code == 0, err
    assert (place / "a-merged" / "inlay.json").is_file()


def test_a_second_export_to_the_same_place_needs_exist_ok(place: Path, capsys: Captured) -> None:
    words = ["export", "--model", "base", "--adapters", "a", "--merge_lora", "--quiet", "--output_dir", "out"]
    assert ran(capsys, *words)[0] == 0
    assert "--exist_ok" in refused(capsys, *words)
    assert ran(capsys, *words, "--exist-ok")[0] == 0


def test_missing_folders_above_the_destination_are_made(place: Path, capsys: Captured) -> None:
    words = ["export", "--model", "base", "--adapters", "a", "--merge_lora", "--quiet", "--output_dir", "x/y/out"]
    assert ran(capsys, *words)[0] == 0
    assert (place / "x" / "y" / "out" / "inlay.json").is_file()
    assert [p.name for p in (place / "x" / "y").iterdir()] == ["out"]


# ─── requests that make no sense ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        ("--model base --adapters a", "--merge_lora"),
        ("--model base --adapters a --merge_lora false", "--merge_lora"),
        ("--model base --merge_lora", "--adapters"),
        ("--model base", "--output_dir"),
        ("--model base --adapters a --merge_lora --safe_serialization false", "safetensors"),
        ("--model base --adapters a --merge_lora --num_threads 0", "num_threads"),
        ("--model base --adapters a --merge_lora --num_threads -1", "num_threads"),
        ("--model base --adapters a --merge_lora --num_threads many", "num_threads"),
        ("--model base --adapters a --merge_lora --max_memory lots", "lots"),
        ("--model base --adapters a --merge_lora --max_memory 1", "max_memory"),
        ("--model base --adapters a --merge_lora --max_memory 0", "max_memory"),
        ("--model base --adapters a --merge_lora --max_shard_size big", "big"),
        ("--model base --adapters a --merge_lora --max_shard_size -5GB", "max_shard_size"),
        ("--model base --adapters a b --merge_lora --adapter_weights 1", "weights"),
        ("--model base --adapters a --merge_lora --adapter_weights 1 1", "weights"),
        ("--model base --adapters a --merge_lora --adapter_weights one", "one"),
        ("--model base --adapters a --merge_lora --adapter_weights nan", "finite"),
        ("--model base --adapters a --merge_lora --adapter_weights inf", "finite"),
        ("--model base --adapters a --merge_lora --combine average", "average"),
        ("--model base --adapters a --merge_lora --device_map tpu", "tpu"),
        ("--model base --adapters a --merge_lora --device_map cuda:99", "cuda:99"),
        ("--model base --adapters a --merge_lora maybe", "maybe"),
        ("--model base --adapters a --merge_lora --verify somewhat", "somewhat"),
        ("--model base --adapters a --merge_lora --fp16 perhaps", "perhaps"),
        ("--model base --adapters --merge_lora", "--adapters"),
        ("--model base --adapters , --merge_lora", "--adapters"),
        ("--model --adapters a --merge_lora", "--model"),
        ("--model base --adapters a --merge_lora --quant_bits 4", "quant_bits"),
        ("--model base --adapters a --merge_lora stray", "stray"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_by_its_name(
    place: Path, capsys: Captured, words: str, mention: str
) -> None:
    assert mention in refused(capsys, "export", *words.split())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--merge_lroa", "--merge_lora"), ("--adaptors", "--adapters"), ("--output-dirs", "--output_dir"),
     ("--torchdtype", "--torch_dtype"), ("--max_memroy=1GB", "--max_memory")],
)  # fmt: skip
def test_an_unknown_option_suggests_the_nearest(place: Path, capsys: Captured, typed: str, meant: str) -> None:
    message = refused(capsys, "export", *BOTH, "--output_dir", "out", typed)
    assert f"did you mean {meant}?" in message


def test_options_may_not_be_cut_short(place: Path, capsys: Captured) -> None:
    """`--adapter_w` today is another option tomorrow."""
    assert "unknown option" in refused(capsys, "export", *BOTH, "--output_dir", "out", "--adapter_w", "1", "1")


@pytest.mark.parametrize("words", [[], ["exprot"], ["--nothing"], ["export", "--nothing"], ["verify"], ["inspect"]])
def test_a_command_that_is_none_exits_with_2(place: Path, capsys: Captured, words: list[str]) -> None:
    message = refused(capsys, *words)
    assert "inlay" in message


# ─── output ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_go_to_stdout_and_the_log_to_stderr(place: Path, capsys: Captured) -> None:
    code, out, err = ran(capsys, "export", "--model", "base", "--adapters", "a", "--merge_lora", "--output_dir", "out")
    assert code == 0
    assert "out" in out
    assert "verified" in out
    assert "Merging" in err
    assert "Merging" not in out


def test_quiet_says_nothing(place: Path, capsys: Captured) -> None:
    write_adapter(place / "zero", modules_of(1), size=0.0)  # which is worth a warning
    words = ["export", "--model", "base", "--adapters", "zero", "--merge_lora", "--output_dir", "out"]
    assert ran(capsys, *words, "--quiet") == (0, "", "")


def test_warnings_are_shown_unless_quiet(place: Path, capsys: Captured) -> None:
    write_adapter(place / "zero", modules_of(1), size=0.0)
    _, _, err = ran(capsys, "export", "--model", "base", "--adapters", "zero", "--merge_lora", "--output_dir", "out")
    assert "warning: zero is zero everywhere" in err


def test_quiet_errors_are_still_told(place: Path, capsys: Captured) -> None:
    assert refused(capsys, "export", "--model", "nowhere/at/all", "--adapters", "a", "--merge_lora", "--quiet")


@pytest.mark.parametrize(
    "words",
    [
        "export --model base --adapters a b --merge_lora --output_dir out --json",
        "export --model base --adapters a b --merge_lora --output_dir out --json --quiet",
        "export --model base --adapters a b --merge_lora --output_dir out --json --verify none",
        "plan --model base --adapters a b --json",
        "plan --model base --json",
        "inspect a --json",
        "inspect a --model base --json",
        "inspect base --json",
    ],
)
def test_json_output_is_one_object(place: Path, capsys: Captured, words: str) -> None:
    code, out, _ = ran(capsys, *words.split())
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_the_json_of_an_export_has_the_facts(place: Path, capsys: Captured) -> None:
    _, out, _ = ran(capsys, "export", *BOTH, "--output_dir", "out", "--json")
    facts = json.loads(out)
    plan = inlay.make_plan("base", ["a", "b"])
    assert (facts["output_dir"], facts["plan"], facts["shards"]) == ("out", plan.digest, 1)
    assert facts["verify"]["ok"] is True
    assert facts["nbytes"] == sum(a.nbytes for a in read_arrays(place / "out").values())


def test_plan_says_what_export_does_and_writes_nothing(place: Path, capsys: Captured) -> None:
    before = listing(place)
    code, out, err = ran(capsys, "plan", *BOTH, "--output_dir", "out")
    assert (code, err) == (0, "")
    assert inlay.make_plan("base", ["a", "b"]).digest in out
    for word in ("q_proj", "down_proj", "rank 4", "scaling 2", "config.json"):
        assert word in out
    assert listing(place) == before


def test_the_json_of_a_plan_can_be_carried_out(place: Path, capsys: Captured) -> None:
    _, out, _ = ran(capsys, "plan", *BOTH, "--json")
    value = json.loads(out)
    digest = value.pop("digest")
    plan = inlay.loads(json.dumps(value))
    assert plan.digest == digest
    inlay.run_plan(plan, place / "from-json")
    assert listing(place / "from-json") == merged(capsys, *BOTH)


def test_plan_checks_the_destination_when_it_is_named(place: Path, capsys: Captured) -> None:
    (place / "out").mkdir()
    assert "exists" in refused(capsys, "plan", *BOTH, "--output_dir", "out")


def test_inspect_tells_the_three_kinds_apart(place: Path, capsys: Captured) -> None:
    ran(capsys, "export", *BOTH, "--output_dir", "out", "--quiet")
    for name, kind in (("a", "adapter"), ("base", "model"), ("out", "merged")):
        code, out, _ = ran(capsys, "inspect", name, "--json")
        assert (code, json.loads(out)["kind"]) == (0, kind)
        code, out, _ = ran(capsys, "inspect", name)
        assert code == 0
        assert kind in out


def test_inspect_counts_what_is_there(place: Path, capsys: Captured) -> None:
    facts = json.loads(ran(capsys, "inspect", "base", "--json")[1])
    arrays = read_arrays(place / "base")
    assert facts["tensors"] == len(arrays)
    assert facts["elements"] == sum(a.size for a in arrays.values())
    assert facts["bytes"] == sum(a.nbytes for a in arrays.values())
    facts = json.loads(ran(capsys, "inspect", "a", "--model", "base", "--json")[1])
    trained = sum(a.size for a in read_arrays(place / "a").values())
    assert facts["trainable_parameters"] == trained
    assert facts["all_parameters"] == trained + sum(a.size for a in arrays.values())
    assert (facts["rank"], facts["alpha"], facts["scaling"]) == ([4], [8], [2])


def test_inspect_of_nothing_is_refused(place: Path, capsys: Captured) -> None:
    (place / "empty").mkdir()
    assert "empty" in refused(capsys, "inspect", "empty")


# ─── verify ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_verify_exits_with_0_for_a_merge_and_with_1_for_anything_else(place: Path, capsys: Captured) -> None:
    ran(capsys, "export", "--model", "base", "--adapters", "a", "--merge_lora", "--output_dir", "out", "--quiet")
    words = ["verify", "--model", "base", "--merged", "out"]
    code, out, err = ran(capsys, *words, "--adapters", "a")
    assert (code, err) == (0, "")
    assert out.endswith("passed\n")
    code, out, _ = ran(capsys, *words, "--adapters", "b")
    assert code == 1
    assert out.endswith("FAILED\n")
    code, out, _ = ran(capsys, *words, "--adapters", "a", "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    code, out, _ = ran(capsys, *words, "--adapters", "b", "--json")
    assert (code, json.loads(out)["passed"]) == (1, False)


def test_verify_without_adapters_is_refused(place: Path, capsys: Captured) -> None:
    assert "--adapters" in refused(capsys, "verify", "--model", "base", "--merged", "base")


def test_verify_of_something_that_is_no_model_is_refused(place: Path, capsys: Captured) -> None:
    for name in ("nowhere", "a"):
        assert name in refused(capsys, "verify", "--model", "base", "--adapters", "a", "--merged", name)


def test_a_merge_that_does_not_verify_is_not_published(
    place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.run import shard

    real = shard.Bands.run

    def spoiled(self: Any, band: int, target: Any, *args: Any) -> None:
        real(self, band, target, *args)
        fd = getattr(target, "fd", target)
        byte = os.pread(fd, 1, self.place.start)
        os.pwrite(fd, bytes([byte[0] ^ 1]), self.place.start)

    monkeypatch.setattr(shard.Bands, "run", spoiled)
    before = listing(place)
    words = [
        "export",
        "--model",
        "base",
        "--adapters",
        "a",
        "--merge_lora",
        "--output_dir",
        "out",
        "--quiet",
        "--verify",
        "full",
    ]
    code, out, err = ran(capsys, *words)
    assert (code, out) == (1, "")
    assert "CheckFailed" in err
    assert listing(place) == before


# ─── interruption ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_interruption_exits_with_130_and_can_be_gone_on_from(
    place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.run import shard

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    words = ["export", "--model", "base", "--adapters", "a", "--merge_lora", "--output_dir", "out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(shard.Bands, "run", interrupt)
        code, out, err = ran(capsys, *words)
    assert (code, out) == (130, "")
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (place / "out").exists()
    assert ran(capsys, *words)[0] == 0


SLEEPING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
import os, sys, time
real = os.pwrite
def slow(*args):
    print("writing", flush=True)
    time.sleep(1)
    return real(*args)
os.pwrite = slow
from inlay.cli.main import run
sys.argv = ["inlay", *sys.argv[1:]]
run()
"""


def test_ctrl_c_ends_a_real_process_with_130(place: Path) -> None:
    words = ["export", "--model", "base", "--adapters", "a", "--merge_lora", "--output_dir", "out", "--quiet"]
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (place / "out").exists()


# ─── a light start ───────────────────────────────────────────────────────────────────────────────────────────────────

CODE = """
import sys
from inlay.cli.main import main
code = main(sys.argv[1:])
heavy = [n for n in ("numpy", "torch", "transformers", "peft", "huggingface_hub", "tqdm", "blake3") if n in sys.modules]
print("LOADED", code, heavy)
"""


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "", "nothing", "export --help", "plan --help", "verify --help", "inspect --help",
     "export --nothing", "export --merge_lora maybe", "verify", "inspect", "export --num_threads many"],
)  # fmt: skip
def test_help_and_argument_errors_load_nothing_heavy(tmp_path: Path, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    last = done.stdout.splitlines()[-1]
    wanted = 0 if "--help" in words or "--version" in words else 2
    assert last == f"LOADED {wanted} []", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_of_a_command(command: str, capsys: Captured) -> None:
    code, out, err = ran(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"inlay {command}" in out
    assert "--json" in out


def test_help_names_every_command(capsys: Captured) -> None:
    code, out, _ = ran(capsys, "--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out


def test_the_version_is_that_of_the_package(capsys: Captured) -> None:
    assert ran(capsys, "--version") == (0, f"inlay {inlay.__version__}\n", "")


def test_it_runs_as_a_module_and_as_a_command(place: Path) -> None:
    for start in ([sys.executable, "-m", "inlay"], [str(Path(sys.executable).with_name("inlay"))]):
        done = subprocess.run([*start, "plan", "--model", "base", "--adapters", "a"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), start
        assert "q_proj" in done.stdout


def test_a_reader_that_goes_away_makes_no_traceback(place: Path) -> None:
    """`inlay plan --json | head`."""
    words = [sys.executable, "-m", "inlay", "plan", "--model", "base", "--adapters", "a", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err


def test_output_that_is_no_utf8_makes_no_traceback(place: Path) -> None:
    """A terminal of the C locale, as in many containers."""
    write_adapter(place / "a-é-漢", modules_of(1))
    words = [sys.executable, "-m", "inlay", "plan", "--model", "base", "--adapters", "a-é-漢"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(words, capture_output=True, env=env)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("plan", "--model", "base"), "1"),
        (("export", "--model", "base", "--adapters", "a", "--merge_lora", "true", "--output_dir", "out"), "1"),
        (("verify", "--model", "base", "--adapters", "a", "--merged", "out", "--behaviour", "true"), None),
        (("sft", "--model", "base", "--dataset", "d.jsonl"), None),
        (("infer", "--model", "base", "--prompt", "The"), None),
        (("export", "--model", "base", "--quant_method", "awq", "--output_dir", "out"), None),
    ],
)
def test_a_merge_takes_one_thread_a_product_and_a_model_takes_all(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], wanted: str | None
) -> None:
    """PyTorch takes MKL_NUM_THREADS for its own number of threads: training would have one."""
    names = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names})
    seen: list[str | None] = []

    def run(_: Any) -> int:
        seen.extend(os.environ.get(name) for name in names)
        return 0

    monkeypatch.setattr("inlay.cli.main.import_module", lambda _: SimpleNamespace(run=run))
    assert main(words) == 0
    assert seen == [wanted, wanted]
