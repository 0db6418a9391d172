"""Tiny bases that can be trained: those of `cases.py` and `families.py` with a tokenizer of letters and a template."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import build
import families
from cases import Kit
from inlay.cli.main import main

assert families.FAMILIES, "its import adds to the table of models"

SPECIAL = ("<pad>", "<end>", "<user>", "<bot>", "<system>")
LETTERS = "abcdefghijklmnopqrstuvwxyz .?!"
TEMPLATE = (
    "{% for m in messages %}{{ {'user': '<user>', 'assistant': '<bot>', 'system': '<system>'}[m['role']] }}"
    "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
ROWS = [
    {"query": "who?", "response": "me"},
    {"query": "what?", "response": "this"},
    {"query": "where?", "response": "here"},
    {"query": "when?", "response": "now"},
]


def add_tokenizer(base: Path, template: str | None = TEMPLATE) -> Path:
    """Tokenizer files of one token a letter: 35 of the 40 rows of the models' vocabularies."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *LETTERS))}
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
    }  # fmt: skip
    build.write_json(base / "tokenizer.json", tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"}
    build.write_json(base / "tokenizer_config.json", config)
    if template is not None:
        (base / "chat_template.jinja").write_text(template)
    return base


def copy_base(kit: Kit, model: str, folder: Path, template: str | None = TEMPLATE) -> Path:
    """A base of the table, as a folder of its own with a tokenizer."""
    return add_tokenizer(Path(shutil.copytree(kit.base(model), folder / model)), template)


def write_rows(path: Path, rows: Sequence[object] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def inlay(command: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command.split())
    return code, out.getvalue(), err.getvalue()


FAST = "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --gradient_checkpointing false --logging_steps 1 --learning_rate 3e-2"


def train(base: Path, folder: Path, more: str = "", steps: int = 4) -> Path:
    """The last checkpoint of a short run on ROWS, below `folder`."""
    data = write_rows(folder / "data.jsonl")
    code, out, err = inlay(
        f"sft --model {base} --dataset {data} --output_dir {folder / 'runs'} --max_steps {steps} {FAST} {more}"
    )
    assert code == 0, err
    return Path(out.strip())


def log(run: Path) -> list[dict[str, float]]:
    """Lines of `logging.jsonl` with a loss of training."""
    lines = map(json.loads, (run / "logging.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]
