"""Where the result may go: checked before a byte is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from inlay.errors import Problem

# A directory with one of these at its top may be replaced by --exist_ok: it is a model or an earlier result.
REPLACEABLE = ("inlay.json", "config.json", "model.safetensors", "model.safetensors.index.json")

# Names and paths end at 255 and 4096 bytes; a staging folder beside the destination takes more of them.
LONGEST_NAME, LONGEST_PATH = 200, 3500


def check_destination(output: Path, inputs: Mapping[str, Path], exist_ok: bool, needed: int) -> list[Problem]:
    """Everything that speaks against writing `needed` bytes to `output`."""
    where = str(output)
    if len(os.fsencode(output.name)) > LONGEST_NAME or len(os.fsencode(os.path.abspath(output))) > LONGEST_PATH:
        return [Problem(f"{where[:60]}…", "is too long a name to write beside; choose a shorter one")]
    if overlap := _overlap(output, inputs):
        return [Problem(where, overlap)]
    problems = []
    if os.path.lexists(output) and (what := _why_not_replace(output, exist_ok)):
        problems.append(Problem(where, what))
    parent = existing_parent(output)
    if not parent.is_dir():
        return [*problems, Problem(where, f"{parent} is not a directory")]
    if not os.access(parent, os.W_OK | os.X_OK):
        problems.append(Problem(where, f"{parent} cannot be written to"))
    free = shutil.disk_usage(parent).free
    if free < needed:
        problems.append(Problem(where, f"{needed:,} bytes are needed, {parent} has {free:,} free"))
    return problems


def existing_parent(output: Path) -> Path:
    """The nearest folder above `output` that is there."""
    parent = Path(os.path.abspath(output)).parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _overlap(output: Path, inputs: Mapping[str, Path]) -> str | None:
    target = Path(os.path.realpath(output))
    for name, path in inputs.items():
        source = Path(os.path.realpath(path))
        what = "the base" if name == "base" else f"the adapter {path}"
        if target == source:
            return f"is {what} itself; choose another output directory"
        if target.is_relative_to(source):
            return f"lies inside {what}; choose a directory outside it"
        if source.is_relative_to(target):
            return f"contains {what}; choose another output directory"
    return None


def _why_not_replace(output: Path, exist_ok: bool) -> str | None:
    if not exist_ok:
        return "exists; choose another directory, or --exist_ok true replaces it once the new one is whole"
    if not output.is_dir():
        return "exists and is not a directory"
    names = os.listdir(output)
    if names and not any(name in names for name in REPLACEABLE):
        return "exists and does not look like a model, so it is not replaced; choose another directory"
    return None
