"""Datasets by name: a file, a folder of files or an id on the Hugging Face Hub, `#N` rows of it."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inlay.datasets.files import READERS, BadRecord, Record, read_records
from inlay.datasets.row import BadRow, Row, make_row
from inlay.errors import InputError

SHOWN = 10
SEED = 42
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A dataset as it is named: `name`, or `name#count` for as many rows of it."""

    name: str
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        """`A#500` -> 500 rows of A; a path that is there keeps its `#`."""
        name, mark, count = text.rpartition("#")
        if not mark or os.path.exists(text):
            return cls(text)
        if not name or not count.isdecimal() or int(count) < 1:
            raise InputError(f"{text}: after # stands a positive number of rows, as in data.jsonl#500")
        return cls(name, int(count))


def read_dataset(text: str, *, answers: bool = True, seed: int = SEED) -> list[Row]:
    """The rows of one dataset, `name` or `name#count`.

    `answers`: each conversation must end with words of the assistant, for training; without it, it may end with the
    user's. Raises InputError that names every bad row by file and line, or when there is no row at all.
    """
    source = Source.parse(text)
    rows = read_rows(_records(source.name), answers=answers)
    if not rows:
        raise InputError(f"{source.name}: the dataset has no rows")
    return sample(rows, source.count, seed)


def read_rows(records: Iterable[Record], *, answers: bool = True) -> list[Row]:
    """The rows of these records. Raises InputError that gathers what is wrong with them."""
    rows: list[Row] = []
    problems: list[str] = []
    for where, raw in records:
        try:
            if isinstance(raw, BadRecord):
                raise BadRow(str(raw))
            row = make_row(raw, where)
            if answers:
                _check_answer(row)
        except BadRow as error:
            problems.append(f"  {where}  {error}")
        else:
            rows.append(row)
    if problems:
        more = [f"  … and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = f"{len(problems)} bad row{'s' if len(problems) != 1 else ''}"
        raise InputError("\n".join([f"the dataset cannot be used ({count})", *problems[:SHOWN], *more]))
    return rows


def sample(rows: Sequence[Row], count: int | None, seed: int = SEED) -> list[Row]:
    """`count` rows in a random order that `seed` decides; where there are fewer, all of them as often as fit, and a
    sample for the rest. Without a count, the rows as they are."""
    if count is None:
        return list(rows)
    whole, rest = divmod(count, len(rows))
    return list(rows) * whole + random.Random(seed).sample(list(rows), rest)


def _check_answer(row: Row) -> None:
    if row.text is not None:
        if not row.text.strip():
            raise BadRow("text is empty")
        return
    if row.messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's, so there is no answer to learn")
    if not row.answer and "tool_calls" not in row.messages[-1]:
        raise BadRow("the last answer is empty")


def _records(name: str) -> Iterator[Record]:
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS)
        if not files:
            raise InputError(f"{path}: the folder holds no data files ({', '.join(READERS)})")
        return (record for file in files for record in read_records(file))
    if path.exists():
        return read_records(path)
    if path.suffix.lower() not in READERS and _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise InputError(f"{name}: no such file or folder")


def _from_hub(name: str) -> Iterator[Record]:
    """Rows of the training split of a dataset on the Hub, `owner/name` or `owner/name:subset`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"{name}: a dataset from the Hub needs datasets, which is not installed: pip install 'inlay[train]'"
        ) from None
    identity, _, subset = name.partition(":")
    try:
        found = load_dataset(identity, subset or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:  # what datasets raises for names, networks and layouts
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: no such file, and not to be had from the Hugging Face Hub ({reason:.200})") from None
    return ((f"{name}, row {number}", record) for number, record in enumerate(found, 1))
