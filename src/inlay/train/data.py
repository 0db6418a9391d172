"""The rows to train on and to evaluate with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from inlay.datasets.files import read_records
from inlay.datasets.read import Source, read_dataset, read_rows, sample
from inlay.datasets.row import Row
from inlay.digests import digest_object
from inlay.errors import InputError
from inlay.train.examples import Example, split
from inlay.train.recipe import Recipe

SELF_COGNITION = ("self-cognition", "swift/self-cognition")
SELF_COGNITION_FILE = "self_cognition.jsonl"
NAME, AUTHOR = "{{NAME}}", "{{AUTHOR}}"


def read_data(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to evaluate with, in the order of the datasets. Raises InputError."""
    rows = [row for name in recipe.dataset for row in _read(name, recipe)]
    if recipe.val_dataset:
        return rows, [row for name in recipe.val_dataset for row in _read(name, recipe)]
    return split(rows, recipe.split_dataset_ratio, recipe.sampling_seed)


def data_digest(examples: Sequence[Example]) -> str:
    """Identity of what is learned: wherever the files lie, another tokenizer or template makes other data."""
    return digest_object({}, "examples", ([example.ids, example.labels] for example in examples))


def _read(name: str, recipe: Recipe) -> list[Row]:
    source = Source.parse(name)
    if source.name in SELF_COGNITION and not Path(source.name).exists():
        return sample(self_cognition(recipe.model_name, recipe.model_author), source.count, recipe.sampling_seed)
    return read_dataset(name, seed=recipe.sampling_seed)


def self_cognition(names: Sequence[str], authors: Sequence[str]) -> list[Row]:
    """Questions about who the model is, answered with its name and author.

    Of two names (authors) the first stands in Chinese rows and the second in English ones, as ms-swift takes them.
    Raises InputError without both.
    """
    if len(names) not in (1, 2) or len(authors) not in (1, 2):
        raise InputError(
            "self-cognition: give --model_name and --model_author, each as one name, or as a Chinese and an English one"
        )
    path = Path(str(files("inlay.train").joinpath(SELF_COGNITION_FILE)))
    rows = []
    for where, raw in read_records(path):
        position = -1 if raw.pop("tag") == "en" else 0
        words = {k: v.replace(NAME, names[position]).replace(AUTHOR, authors[position]) for k, v in raw.items()}
        rows.append((where.replace(str(path), SELF_COGNITION[0]), words))
    return read_rows(rows)
