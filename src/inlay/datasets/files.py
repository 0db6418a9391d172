"""Records of a data file, each with its place: JSON lines, JSON, CSV, Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inlay.errors import InputError

Record = tuple[str, Any]  # (place: `file:line`, what stands there)

MAX_CELL = 1 << 30  # csv stops at 128 kB, which a long conversation exceeds


class NotJson(ValueError):
    """A line that is not JSON, named by its place: it is reported among the bad rows."""


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file in their order; a broken line comes as NotJson in the place of its record.

    Raises InputError for a file that cannot be read, or of another form.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: a dataset is one of {', '.join(READERS)}, not {path.suffix or 'without an ending'}")
    return reader(path)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error})") from None


def _json_lines(path: Path) -> Iterator[Record]:
    # Not `splitlines`, which also splits at characters that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return NotJson(f"is not JSON ({error})")


def _json(path: Path) -> Iterator[Record]:
    """An array of records; a file of JSON lines under this name is read as such."""
    text = _text(path)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _json_lines(path)
            return
        raise InputError(f"{path}: is not JSON ({error})") from None
    if isinstance(records, dict):
        records = [records]
    if not isinstance(records, list):
        raise InputError(f"{path}: must hold an array of rows, or one row in each line")
    yield from ((f"{path}, row {number}", record) for number, record in enumerate(records, 1))


def _csv(path: Path) -> Iterator[Record]:
    """Rows by the names in the first line; an empty cell is a column that the row lacks."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        start = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"{path}:{start}", _named(names, cells)
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not CSV ({error})") from None


def _named(names: list[str], cells: list[str]) -> Any:
    if len(cells) > len(names):
        return NotJson(f"has {len(cells)} cells, and the first line names {len(names)} columns")
    return {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow, which is not installed: pip install 'inlay[train]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not Parquet that can be read ({str(error).splitlines()[0]})") from None


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
