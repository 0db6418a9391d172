"""Records of a data file, each with its place: JSON lines, JSON, CSV, Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inlay.errors import InputError

Record = tuple[str, Any]  # (place: `file:line`, what stands there)

ESCAPED = "surrogateescape"  # bytes that are no text come as halves of characters
MAX_CELL = 1 << 30  # csv stops at 128 kB, which a long conversation exceeds
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class BadRecord(ValueError):
    """What is wrong with a record that cannot be read: it is reported among the bad rows, by its place."""


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file in their order; one that is broken comes as BadRecord in its place.

    Raises InputError for a file that cannot be read, or of another form.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: a dataset is one of {', '.join(READERS)}, not {path.suffix or 'without an ending'}")
    return reader(path)


def _bytes(path: Path) -> bytes:
    """The file without its mark of UTF-8. Raises InputError where it cannot be read, or has the mark of UTF-16."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if content.startswith(UTF16):
        raise InputError(f"{path}: is not UTF-8 text, but UTF-16; save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def _json_lines(path: Path) -> Iterator[Record]:
    # Not `splitlines`, which also splits at characters that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(_bytes(path).split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(_not_text(line[error.start], error.start))
    except (ValueError, RecursionError) as error:
        return BadRecord(f"is not JSON ({error})")


def _not_text(byte: int, position: int) -> str:
    return f"is not UTF-8 text (byte 0x{byte:02x} at {position} of the line)"


def _json(path: Path) -> Iterator[Record]:
    """An array of records; a file of JSON lines under this name is read as such."""
    content = _bytes(path)
    try:
        records = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith(b"{"):
            yield from _json_lines(path)
            return
        raise InputError(_unreadable(path, content, error)) from None
    if isinstance(records, dict):
        records = [records]
    if not isinstance(records, list):
        raise InputError(f"{path}: must hold an array of rows, or one row in each line")
    yield from ((f"{path}, row {number}", record) for number, record in enumerate(records, 1))


def _unreadable(path: Path, content: bytes, error: Exception) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return f"{path}: is not JSON ({error})"
    before = content[: error.start]
    return f"{path}:{before.count(10) + 1}: {_not_text(content[error.start], len(before) - before.rfind(10) - 1)}"


def _csv(path: Path) -> Iterator[Record]:
    """Rows by the names in the first line; an empty cell is a column that the row lacks.

    Bytes that are no text spoil their own row only. Quotes that do not close spoil the file, as nobody can tell in
    which line the next row begins.
    """
    csv.field_size_limit(MAX_CELL)
    text = _bytes(path).decode("utf-8", ESCAPED)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        if bad := _escaped("".join(names)):
            raise InputError(f"{path}:1: is not UTF-8 text ({bad})")
        start = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"{path}:{start}", _named(names, cells)
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not CSV ({error})") from None


def _named(names: list[str], cells: list[str]) -> Any:
    if len(cells) > len(names):
        return BadRecord(f"has {len(cells)} cells, and the first line names {len(names)} columns")
    for name, cell in zip(names, cells, strict=False):
        if bad := _escaped(cell):
            return BadRecord(f"is not UTF-8 text ({bad} in {name})")
    return {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def _escaped(text: str) -> str | None:
    """The first byte that could not be decoded; UTF-8 itself never gives halves of characters."""
    found = next((c for c in text if "\udc80" <= c <= "\udcff"), None)
    return f"byte 0x{ord(found) - 0xDC00:02x}" if found else None


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
                for record in _of_table(batch):
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not Parquet that can be read ({str(error).splitlines()[0]})") from None


def _of_table(batch: Any) -> list[Any]:
    """The rows of a part of a table; those that hold no text are told apart."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRecord(f"is not UTF-8 text ({error.reason} at {error.start} of a cell)")]
        return [row for i in range(batch.num_rows) for row in _of_table(batch.slice(i, 1))]


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
