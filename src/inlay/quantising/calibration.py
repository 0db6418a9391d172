"""Texts for calibration, and the blocks of tokens made of them.

A dataset is a `.jsonl` with one of these in each line, or plain text in paragraphs (`.txt`):

    {"text": …}    {"messages": [{"role", "content"}, …]}    {"prompt", "completion"}    {"query", "response"}

As AutoAWQ 0.2.9 does (utils/calib_data.py, `get_calib_dataset`): texts in a random order, as many as asked for, each
cut to `max_length`, all put end to end and cut into blocks of `max_length`, of which the last part is dropped. The
order comes from a fixed seed, so the same request gives the same blocks.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from inlay.errors import InputError
from inlay.extras import needs

SAMPLES = 128
MAX_LENGTH = 512
SEED = 42
PAIRS = (("prompt", "completion"), ("query", "response"))

Text = str | list[Mapping[str, Any]]  # or the messages of a conversation


def read_texts(path: Path | None = None) -> list[Text]:
    """The texts of a dataset; without a path those that come with the package.

    Raises InputError for a file without texts, or of another form.
    """
    if path is None:
        return _lines(files("inlay.quantising").joinpath("calibration.jsonl").read_text("utf-8"), "calibration.jsonl")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .jsonl or .txt with --dataset")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error})") from None
    if path.suffix == ".txt":
        found: list[Text] = [part.strip() for part in re.split(r"\n\s*\n", content) if part.strip()]
    elif path.suffix in (".jsonl", ".json"):
        found = _lines(content, str(path))
    else:
        raise InputError(f"{path}: a dataset is a .jsonl or a .txt, not {path.suffix or 'a file without an ending'}")
    if not found:
        raise InputError(f"{path}: holds no text to calibrate with")
    return found


def _lines(content: str, where: str) -> list[Text]:
    found: list[Text] = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{where}:{number}: is not JSON ({error}); a dataset has one object in each line"
            ) from None
        text = _text(row)
        if text is None:
            raise InputError(
                f"{where}:{number}: has neither text, messages, prompt and completion, nor query and response"
            )
        if text:
            found.append(text)
    return found


def _text(row: Any) -> Text | None:
    """None for a row of another form."""
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return messages
    for asked, answered in PAIRS:
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            return str(row[asked]) + str(row[answered])
    return None


def read_tokenizer(directory: Path) -> Any:
    """The checkpoint's own tokenizer. Raises InputError where it has none."""
    with needs("quant", "awq and perplexity"):
        import transformers
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory}: no tokenizer can be read, which calibration needs ({reason:.200})") from error


def encode(tokenizer: Any, text: Text) -> list[int]:
    """Tokens of one text; a conversation goes through the chat template where there is one."""
    if not isinstance(text, str):
        if getattr(tokenizer, "chat_template", None):
            text = str(tokenizer.apply_chat_template(text, tokenize=False))
        else:
            text = "\n".join(m["content"] for m in text)
    return list(tokenizer(text, verbose=False)["input_ids"])


def calibration_blocks(tokenizer: Any, texts: Sequence[Text], samples: int, max_length: int) -> list[list[int]]:
    """Blocks of `max_length` tokens; one shorter block where all texts together do not fill one."""
    if samples < 1 or max_length < 2:
        raise InputError(f"calibration needs at least 1 sample of 2 tokens, not {samples} of {max_length}")
    order = list(texts)
    random.Random(SEED).shuffle(order)
    tokens: list[int] = []
    for text in order[:samples]:
        tokens += encode(tokenizer, text)[:max_length]
    blocks = [tokens[at : at + max_length] for at in range(0, len(tokens) - max_length + 1, max_length)]
    if not blocks and len(tokens) < 2:
        raise InputError("the texts for calibration come to fewer than 2 tokens; give others with --dataset")
    return blocks or [tokens]
