"""`inlay sft`: what is trained can be exported and verified with nothing else said, and a run can be stopped and gone on
with as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import build
from cases import MODELS, Kit, third_party
from inlay.datasets.row import make_row
from inlay.errors import InputError
from inlay.train.examples import UNLABELLED, Encoder, Example, collate, split
from inlay.train.packing import check_packing, pack
from trainable import FAST, LETTERS, ROWS, SPECIAL, add_tokenizer, copy_base, inlay, log, train, write_rows

pytest.importorskip("accelerate")


@pytest.fixture
def base(kit: Kit, tmp_path: Path) -> Path:
    return copy_base(kit, "qwen2", tmp_path)


def exported(checkpoint: Path, out: Path) -> None:
    """Export with the adapter alone, and verify every element with other code."""
    code, _, err = inlay(f"export --adapters {checkpoint} --merge_lora --output_dir {out}")
    assert code == 0, err
    code, found, err = inlay(f"verify --adapters {checkpoint} --merged {out} --exact")
    assert code == 0 and "passed" in found, found + err


# --- what is trained ----------------------------------------------------------------------------------

METHODS = {
    "lora": "",
    "lora-rslora-bias": "--use_rslora --lora_bias all",
    "lora-all-presets": "--target_modules attention mlp all-embedding lm_head",
    "lora-saved": "--target_modules q_proj --modules_to_save all-norm lm_head",
    "lora-bf16": "--torch_dtype bfloat16 --lora_dtype bfloat16",
    "dora": "--train_type dora",
    "adalora": "--tuner_type adalora --adalora_init_r 4 --adalora_target_r 2",
    "loha": "--train_type loha",
    "lokr": "--train_type lokr",
    "ia3": "--train_type ia3",
    "oft": "--train_type oft --oft_block_size 4",
    "vera": "--sft_type vera --vera_rank 8",
    "pissa": "--init_weights pissa --lora_rank 4",
    "pissa-niter": "--init_weights pissa_niter_2 --lora_rank 4",
    "olora-rslora": "--init_weights olora --use_rslora --lora_rank 4 --lora_alpha 4",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_what_it_learned_exports_and_verifies(base: Path, tmp_path: Path, method: str) -> None:
    checkpoint = train(base, tmp_path, METHODS[method], steps=6)
    losses = [line["loss"] for line in log(checkpoint.parent)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    exported(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("llama", ""),
        ("gpt2", ""),
        ("gpt2", "--train_type ia3"),
        ("qwen2moe", ""),
        ("qwen3moe", "--target_parameters mlp.experts.down_proj mlp.experts.gate_up_proj"),
        ("llava", ""),
        ("qwen25vl", "--freeze_vit false --freeze_aligner false"),
    ],
)
def test_other_architectures_learn_export_and_verify(kit: Kit, tmp_path: Path, model: str, more: str) -> None:
    checkpoint = train(copy_base(kit, model, tmp_path), tmp_path, more)
    losses = [line["loss"] for line in log(checkpoint.parent)]
    assert losses[-1] < losses[0]
    exported(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_quantised_load_exports_onto_the_base_and_onto_what_it_saw(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = tmp_path / "base"
    torch.manual_seed(0)
    with third_party():
        transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    checkpoint = train(add_tokenizer(base), tmp_path, f"--quant_method bnb --quant_bits {bits}", steps=6)
    losses = [line["loss"] for line in log(checkpoint.parent)]
    assert losses[-1] < losses[0]
    exported(checkpoint, tmp_path / "out")
    simulated = f"export --adapters {checkpoint} --merge_lora --base_as simulated --output_dir {tmp_path / 'simulated'}"
    assert inlay(simulated)[0] == 0
    key = "model.layers.0.mlp.up_proj.weight"
    assert (build.read_arrays(tmp_path / "out")[key] != build.read_arrays(tmp_path / "simulated")[key]).any()


def test_full_training_leaves_a_whole_model_without_the_state_of_the_run(base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path, "--train_type full --learning_rate 1e-3")
    losses = [line["loss"] for line in log(checkpoint.parent)]
    assert losses[-1] < losses[0]
    code, _, err = inlay(f"export --model {checkpoint} --output_dir {tmp_path / 'out'}")
    assert code == 0, err
    there = {p.name for p in (tmp_path / "out").iterdir()}
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert one.get("use_cache") == other.get("use_cache") is True
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= there
    assert not {"optimizer.pt", "scheduler.pt", "training_args.bin", "trainer_state.json"} & there


def test_the_merged_model_is_the_model_at_the_end_of_training(base: Path, tmp_path: Path) -> None:
    """PiSSA, whose base is shifted while it is trained: the oracle is PEFT on the pairs as they were trained."""
    from peft import PeftModel

    checkpoint = train(base, tmp_path, "--init_weights pissa --lora_rank 4")
    exported(checkpoint, tmp_path / "out")
    model = MODELS["qwen2"]
    with third_party():
        trained = PeftModel.from_pretrained(model.load(base), checkpoint / "unconverted").eval()
        expected, merged = model(trained), model(model.load(tmp_path / "out"))
    assert abs(model(model.load(base)) - expected).max() > 0.1
    assert abs(merged - expected).max() < 1e-4


def test_the_pairs_that_are_converted_are_those_that_peft_converts(base: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    from inlay.train import converting

    with third_party():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"])
        model = get_peft_model(MODELS["qwen2"].load(base), config)
        initial = converting.pairs(model)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        for p in model.parameters():
            if p.requires_grad:
                p.data += torch.randn_like(p) * 0.1
        model.save_pretrained(tmp_path / "ours")
        model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start")
    converting.convert_checkpoint(tmp_path / "ours", initial)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k]) for k in theirs)
    one, other = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    assert [one[k] for k in ("r", "lora_alpha")] == [other[k] for k in ("r", "lora_alpha")] == [8, 12]


# --- what is left behind ------------------------------------------------------------------------------


def test_a_run_leaves_records_curves_and_links(base: Path, tmp_path: Path) -> None:
    more = "--save_steps 2 --eval_steps 2 --split_dataset_ratio 0.25 --target_modules attention"
    run = train(base, tmp_path, more).parent
    args = json.loads((run / "args.json").read_text())
    assert run.name.startswith("v0-") and args["resolved_targets"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert args["trainable_parameters"] == 2 * 8 * (2 * (16 + 16) + 2 * (16 + 8))
    assert args["trainable_share"] == args["trainable_parameters"] / args["total_parameters"]
    assert args["rows"] == 3 and args["model"] == str(base) and args["versions"]["peft"]
    assert [line["step"] for line in log(run)] == [1, 2, 3, 4]
    assert any("eval_loss" in json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines())
    for name in ("train_loss", "train_learning_rate", "eval_loss"):
        assert (run / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "last").resolve() == run / "checkpoint-4"
    assert (run / "best").resolve().name in ("checkpoint-2", "checkpoint-4")
    for name in ("checkpoint-2", "checkpoint-4"):
        files = {p.name for p in (run / name).iterdir()}
        assert {
            "adapter_config.json", "adapter_model.safetensors", "args.json", "inlay_base.json", "tokenizer.json",
            "chat_template.jinja",
        } <= files  # fmt: skip
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (run / name / file).read_bytes() == (base / file).read_bytes()
    again = train(base, tmp_path, "--save_total_limit 1 --save_steps 1").parent
    assert again.name.startswith("v1-") and [p.name for p in again.glob("checkpoint-*")] == ["checkpoint-4"]


def test_another_base_of_the_same_shapes_is_refused_on_export(kit: Kit, base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path)
    other = copy_base(kit, "qwen2", tmp_path / "other")
    tensors = build.read_arrays(other)
    key = "model.layers.1.mlp.up_proj.weight"
    shard = next(p for p in other.glob("*.safetensors") if key in build.read_tensors(p))
    changed = {k: tensors[k].copy() for k in build.read_tensors(shard)}
    changed[key][0, 0] += 0.5
    build.write_tensors(shard, changed)
    code, _, err = inlay(f"export --model {other} --adapters {checkpoint} --merge_lora --output_dir {tmp_path / 'out'}")
    assert code == 2 and f"trained on another base: {key}" in err and not (tmp_path / "out").exists()
    code, _, err = inlay(f"infer --model {other} --adapters {checkpoint} --prompt hello --max_new_tokens 1")
    assert code == 2 and f"trained on another base: {key}" in err


def test_another_tokenizer_of_the_base_is_a_warning(base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["!!"] = 36
    build.write_json(base / "tokenizer.json", tokenizer)
    command = f"export --model {base} --adapters {checkpoint} --merge_lora --output_dir"
    code, _, err = inlay(f"{command} {tmp_path / 'out'}")
    assert code == 0 and "warning: checkpoint-4 was trained with another tokenizer" in err
    add_tokenizer(base)
    code, _, err = inlay(f"{command} {tmp_path / 'same'}")
    assert code == 0 and "warning" not in err


def test_the_base_of_the_command_line_wins_over_the_recorded_one(base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path)
    moved = base.rename(tmp_path / "moved")
    code, _, err = inlay(f"export --adapters {checkpoint} --merge_lora --output_dir {tmp_path / 'out'}")
    assert code == 2 and "give --model" in err
    code, _, err = inlay(f"export --model {moved} --adapters {checkpoint} --merge_lora --output_dir {tmp_path / 'out'}")
    assert code == 0, err


# --- stopping and going on ----------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", "--init_weights pissa --lora_rank 4 --train_type lora"])
def test_a_run_that_is_gone_on_with_ends_as_one_that_was_not_interrupted(base: Path, tmp_path: Path, more: str) -> None:
    whole = train(base, tmp_path, f"--save_steps 2 --per_device_train_batch_size 2 {more}", steps=5)
    expected = log(whole.parent)
    weights = (whole / "adapter_model.safetensors").read_bytes()
    code, out, err = inlay(f"sft --resume_from_checkpoint {whole.parent / 'checkpoint-2'}")
    assert code == 0 and Path(out.strip()) == whole, err
    found = log(whole.parent)
    assert [(r["step"], r["loss"], r["learning_rate"]) for r in found] == [
        (r["step"], r["loss"], r["learning_rate"]) for r in expected
    ]
    assert (whole / "adapter_model.safetensors").read_bytes() == weights


def test_ctrl_c_saves_and_the_run_can_be_gone_on_with(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.cli import sft

    before = signal.getsignal(signal.SIGINT)  # ignored where a shell runs the tests in the background
    (tmp_path / "a").mkdir()
    reference = train(base, tmp_path / "a", steps=6)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(sft, "_say", say)
        data = write_rows(tmp_path / "data.jsonl")
        command = f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'runs'} --max_steps 6 {FAST}"
        code, out, _ = inlay(command)
    checkpoint = Path(out.strip())
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert code == 130 and step < 6 and (checkpoint / "inlay_base.json").exists()
    assert f"--resume_from_checkpoint {checkpoint}" in said[-1]
    code, out, err = inlay(f"sft --resume_from_checkpoint {checkpoint.parent / 'last'}")
    assert code == 0 and Path(out.strip()).name == "checkpoint-6", err
    assert [r["loss"] for r in log(checkpoint.parent)] == [r["loss"] for r in log(reference.parent)]
    assert signal.getsignal(signal.SIGINT) is before


# --- what is refused ----------------------------------------------------------------------------------

BAD: dict[str, tuple[str, str]] = {
    "no dataset": ("--dataset", "expected at least one argument"),
    "missing dataset": ("--dataset nothing.jsonl", "nothing.jsonl: no such file"),
    "rank 0": ("--lora_rank 0", "--lora_rank 0: must be positive"),
    "a target that is not there": ("--target_modules q_prok", "near it are q_proj"),
    "a base that is not there": ("--model nowhere/at-all/x", "no such directory"),
    "longer than the base reads": ("--max_length 64", "reads at most 32 tokens"),
    "nothing fits": ("--max_length 3", "none of the 4 rows can be learned: 4 are longer"),
    "a row that is too long": ("--max_length 8 --truncation_strategy raise", "data.jsonl:1: has 10 tokens"),
    "an option of another method": ("--train_type ia3 --lora_rank 4", "--lora_rank: has no meaning for ia3"),
    "a method that is not there": ("--train_type prefix", "invalid choice: 'prefix'"),
    "codes that are not for training": ("--quant_method awq --quant_bits 4", "training quantises with bnb"),
    "pissa on codes": ("--init_weights pissa --quant_method bnb --quant_bits 4", "cannot be taken with"),
    "a wrong init": ("--init_weights pisa", "is none of true, false"),
    "a file as output": ("--output_dir {data}", "is not a folder"),
    "two kinds of held-out rows": ("--val_dataset {data} --split_dataset_ratio 0.5", "give one of them"),
    "half precision": ("--torch_dtype float16", "cannot be trained on the processor"),
    "no chat template there": ("--chat_template nowhere.jinja", "no such file"),
    "self-cognition of nobody": ("--dataset self-cognition", "give --model_name and --model_author"),
    "a reporter that is not there": ("--report_to nowhere", "nowhere is not supported"),
    "a beta of Adam above 1": ("--adam_beta2 1.5", "--adam_beta2 1.5: must be at least 0 and below 1"),
    "a seed below 0": ("--data_seed -1", "--data_seed -1: must be at least 0 and below 2^32"),
    "a number of workers below 0": ("--dataloader_num_workers -1", "must not be negative"),
    "epochs without end": ("--num_train_epochs inf", "--num_train_epochs inf: must be a number"),
    "an alpha without end": ("--lora_alpha inf", "--lora_alpha inf: must be a number"),
    "targets named twice": ("--target_modules q_proj --target_regex .*k_proj", "give one of them"),
    "more directions than there are": ("--init_weights pissa --lora_rank 17", "can take at most 16 directions"),
    "resume from nothing": ("--resume_from_checkpoint nowhere", "no such folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_message_exit_2_and_nothing_written(base: Path, tmp_path: Path, what: str) -> None:
    more, message = BAD[what]
    data = write_rows(tmp_path / "data.jsonl")
    before = build.listing(tmp_path)
    given = f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'runs'} {more.format(data=data)}"
    if "--dataset" in more.split():
        given = given.replace(f"--dataset {data} ", "", 1)
    code, out, err = inlay(given)
    assert code == 2 and message in err and not out
    assert len(err.strip().splitlines()) <= 3 and "Traceback" not in err
    assert build.listing(tmp_path) == before


def test_an_empty_dataset_and_bad_rows_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = inlay(f"sft --model {base} --dataset {tmp_path / 'empty.jsonl'} --output_dir {tmp_path / 'runs'}")
    assert code == 2 and "no rows" in err
    write_rows(tmp_path / "bad.jsonl", [ROWS[0], {"query": "who?"}])
    code, _, err = inlay(f"sft --model {base} --dataset {tmp_path / 'bad.jsonl'} --output_dir {tmp_path / 'runs'}")
    assert code == 2 and f"{tmp_path / 'bad.jsonl'}:2" in err and not (tmp_path / "runs").exists()


def test_all_problems_of_a_recipe_are_named_at_once(tmp_path: Path) -> None:
    code, _, err = inlay("sft --lora_rank -1 --max_steps 0 --warmup_ratio 2")
    assert code == 2 and err.startswith("InputError: cannot train (5 problems)")
    assert all(name in err for name in ("--model", "--dataset", "--lora_rank", "--max_steps", "--warmup_ratio"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--lora_rank 4", "--lora_rank 4: the run that is resumed has 8"),
        ("--target_modules q_proj", "the run that is resumed has ['all-linear']"),
        ("--dataset {other}", "belongs to another run: rows (4 then, 2 now)"),
        ("--output_dir {other}.runs", "leave it out, or start a new run"),
        ("--learning_rate 1e-4", "the run that is resumed has 0.03"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(base: Path, tmp_path: Path, more: str, message: str) -> None:
    checkpoint = train(base, tmp_path, steps=2)
    other = write_rows(tmp_path / "other.jsonl", ROWS[:2])
    before = build.listing(checkpoint.parent)
    code, _, err = inlay(f"sft --resume_from_checkpoint {checkpoint} {more.format(other=other)}")
    assert code == 2 and message in err and build.listing(checkpoint.parent) == before


def test_changed_data_or_another_base_under_the_same_names_are_refused_on_resume(base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path, steps=2)
    write_rows(tmp_path / "data.jsonl", ROWS[::-1])
    code, _, err = inlay(f"sft --resume_from_checkpoint {checkpoint}")
    assert code == 2 and "belongs to another run: data" in err
    write_rows(tmp_path / "data.jsonl")
    shard = next(p for p in base.glob("*.safetensors") if "model.layers.0.mlp.up_proj.weight" in build.read_tensors(p))
    build.write_tensors(shard, {k: v * 2 for k, v in build.read_arrays(base).items() if k in build.read_tensors(shard)})
    code, _, err = inlay(f"sft --resume_from_checkpoint {checkpoint}")
    assert code == 2 and "another base than the one that is given" in err


def test_a_checkpoint_that_is_not_whole_is_refused(base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path, steps=2)
    code, _, err = inlay(f"sft --resume_from_checkpoint {checkpoint.parent}")
    assert code == 2 and "it holds checkpoint-2: name one of them" in err
    (checkpoint / "optimizer.pt").unlink()
    code, _, err = inlay(f"sft --resume_from_checkpoint {checkpoint}")
    assert code == 2 and "lacks optimizer.pt" in err


def test_a_loss_that_is_no_number_ends_the_run(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl")
    code, _, err = inlay(
        f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'runs'} {FAST} --max_grad_norm 1e30 "
        "--learning_rate 1e30 --max_steps 4 --warmup_ratio 0"
    )
    assert code == 2 and "Lower --learning_rate" in err


def test_an_encoder_decoder_and_a_classifier_are_refused(kit: Kit, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl")
    code, _, err = inlay(
        f"sft --model {copy_base(kit, 'bert', tmp_path)} --dataset {data} --output_dir {tmp_path / 'r'}"
    )
    assert code == 2 and "bert" in err.lower() and "next word" in err


def test_conversations_need_a_template_and_take_one_from_a_file(kit: Kit, tmp_path: Path) -> None:
    base = copy_base(kit, "gpt2", tmp_path, template=None)
    data = write_rows(tmp_path / "data.jsonl")
    code, _, err = inlay(f"sft --model {base} --dataset {data} --output_dir {tmp_path / 'runs'}")
    assert code == 2 and "no chat template" in err and "--chat_template" in err
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}<end>{% endfor %}")
    checkpoint = train(base, tmp_path, f"--chat_template {tmp_path / 't.jinja'}")
    assert (checkpoint / "chat_template.jinja").read_text() == (tmp_path / "t.jinja").read_text()
    exported(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").exists()


# --- rows as tokens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Encoder]:
    import transformers

    folder = add_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')

    def make(max_length: int = 32, truncation: str = "delete", **more: Any) -> Encoder:
        with third_party():
            return Encoder(transformers.AutoTokenizer.from_pretrained(folder), max_length, truncation, **more)

    return make


def spelled(tokens: tuple[int, ...]) -> str:
    names = (*SPECIAL, *LETTERS)
    return "".join("_" if t == UNLABELLED else names[t] for t in tokens)


def of(*turns: str, **more: Any) -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return make_row({"messages": messages, **more}, "here:1")


def test_answers_and_their_end_are_learned_and_nothing_else(encoder: Callable[..., Encoder]) -> None:
    examples, counts = encoder().encode([of("ab", "cd", "e", "f")])
    assert spelled(examples[0].ids) == "<user>ab<end><bot>cd<end><user>e<end><bot>f<end>"
    assert spelled(examples[0].labels) == "_____cd<end>____f<end>"
    assert (counts.tokens, counts.learned, counts.longest) == (14, 5, 14)


def test_an_answer_that_says_so_is_read_and_not_learned(encoder: Callable[..., Encoder]) -> None:
    row = make_row(
        {"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        ]}, "here:1",
    )  # fmt: skip
    (example,), _ = encoder().encode([row])
    assert spelled(example.labels) == "_" * 8 + "_" * 2 + "d<end>"


def test_a_system_message_is_read_and_not_learned(encoder: Callable[..., Encoder]) -> None:
    (example,), _ = encoder(system="s").encode([of("a", "b")])
    assert spelled(example.ids).startswith("<system>s<end><user>a")
    assert spelled(example.labels) == "_" * 7 + "b<end>"


def test_every_token_of_a_plain_text_is_learned_and_its_end(encoder: Callable[..., Encoder]) -> None:
    (example,), _ = encoder().encode([make_row({"text": "abc"}, "here:1")])
    assert spelled(example.ids) == spelled(example.labels) == "abc<end>"


def test_a_template_without_an_end_is_given_one_to_learn(encoder: Callable[..., Encoder]) -> None:
    made = encoder()
    made.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    (example,), _ = made.encode([of("ab", "cd")])
    assert spelled(example.ids) == "ab!cd!<end>" and spelled(example.labels) == "___cd!<end>"


def test_longer_rows_are_left_out_or_cut(encoder: Callable[..., Encoder]) -> None:
    rows = [of("ab", "cdefgh"), of("a", "b")]
    examples, counts = encoder(8, "delete").encode(rows)
    assert len(examples) == 1 and counts.too_long == 1
    (long, _), counts = encoder(8, "right").encode(rows)
    assert spelled(long.ids) == "<user>ab<end><bot>cde" and counts.cut == 1
    (long, _), _ = encoder(8, "left").encode(rows)
    assert spelled(long.ids) == "<bot>cdefgh<end>" and spelled(long.labels) == "_cdefgh<end>"


def test_packing_puts_each_row_into_one_block_that_is_not_too_long() -> None:
    examples = [Example(tuple(range(n)), tuple(range(n))) for n in (5, 9, 2, 3, 7, 1)]
    blocks = pack(examples, 10)
    assert all(sum(len(e.ids) for e in block) <= 10 for block in blocks)
    assert sorted(len(e.ids) for block in blocks for e in block) == [1, 2, 3, 5, 7, 9] and len(blocks) == 3


@pytest.mark.parametrize("model", ["qwen2", "gpt2"])
def test_a_packed_block_is_told_as_its_rows_alone_are(kit: Kit, model: str) -> None:
    import torch

    rows = [Example((7, 8, 9, 10), (UNLABELLED, UNLABELLED, 9, 10)), Example((11, 12, 13), (UNLABELLED, 12, 13))]
    net = MODELS[model].load(kit.base(model))
    net.config.use_cache = False  # as in training
    with torch.no_grad(), third_party():
        packed = net(**collate([rows, rows[:1]], 0, positions=True)).logits
        for at, row in ((0, rows[0]), (4, rows[1])):
            alone = net(input_ids=torch.tensor([row.ids])).logits[0]
            assert torch.allclose(packed[0, at : at + len(row.ids)], alone, atol=1e-5)
    labels = collate([rows, rows[:1]], 0, positions=True)["labels"].tolist()
    assert labels == [
        [UNLABELLED, UNLABELLED, 9, 10, UNLABELLED, 12, 13],
        [UNLABELLED, UNLABELLED, 9, 10, *[UNLABELLED] * 3],
    ]


def test_packing_is_refused_for_a_model_whose_rows_would_see_each_other(kit: Kit) -> None:
    net = MODELS["qwen2"].load(kit.base("qwen2"))
    net.config.use_cache = False
    block = [Example((7, 8, 9), (7, 8, 9)), Example((11, 12, 13), (11, 12, 13))]
    check_packing(net, [block])

    class Blind:
        """The same model, deaf to positions."""

        device = net.device

        def eval(self) -> None: ...

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            return net(input_ids=input_ids)

    with third_party(), pytest.raises(InputError, match="see each other"):
        check_packing(Blind(), [block])


def test_packing_trains_exports_and_verifies(base: Path, tmp_path: Path) -> None:
    checkpoint = train(base, tmp_path, "--packing --per_device_train_batch_size 1", steps=6)
    losses = [line["loss"] for line in log(checkpoint.parent)]
    assert losses[-1] < losses[0]
    exported(checkpoint, tmp_path / "out")


def test_the_split_is_by_seed_and_loses_no_row() -> None:
    rows = [of(str(i), "x") for i in range(10)]
    kept, held = split(rows, 0.3, 1)
    assert (len(kept), len(held)) == (7, 3) and not {r.messages[0]["content"] for r in kept} & {
        r.messages[0]["content"] for r in held
    }
    assert split(rows, 0.3, 1) == (kept, held) != split(rows, 0.3, 2)
    assert split(rows, 0.0, 1) == (rows, [])


def test_self_cognition_speaks_of_the_name_and_author_in_each_language() -> None:
    from inlay.train.data import self_cognition

    rows = self_cognition(["小明", "Ming"], ["某校", "A School"])
    words = [" ".join(m["content"] for m in row.messages) for row in rows]
    english = [w for w in words if w.isascii()]
    chinese = [w for w in words if not w.isascii()]
    assert len(english) == len(chinese) == 20 and not any("{" in w for w in words)
    assert all("Ming" in w or "A School" in w for w in english)
    assert all(("小明" in w or "某校" in w) and "Ming" not in w for w in chinese)
    assert len({row.messages[0]["content"] for row in rows}) == 40
