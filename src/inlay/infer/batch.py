"""A dataset through a model: one line of JSON for each row, written as it comes, continued when it was cut short.

    {"line": "data.jsonl:7", "request": digest, "response": …, "messages": […], "labels": …, …}

`request` is a digest of the prompt's tokens, the settings and `identity` (what model answered): a line is done if a
rerun would ask the same, and a file that holds lines of another request is refused. With `task` embedding or seq_cls
`response` is a vector.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

from inlay.datasets.files import BadRecord, read_records
from inlay.datasets.row import BadRow, Row, make_row
from inlay.digests import digest_json
from inlay.errors import InputError, OutputError
from inlay.infer.backend import CAUSAL, Backend, Request, Sampling, check_length, check_text
from inlay.infer.chat import NoTemplate, prompt_tokens, text_tokens

LINE = b'{"line": '  # how each line begins
Warn = Callable[[str], None]
ANSWERS = {"query": "response", "prompt": "completion", "instruction": "output"}  # what a row may lack here


@dataclass(frozen=True)
class Asked:
    """A row, and the request that it makes."""

    row: Row
    request: Request
    digest: str


def read_prompts(files: Sequence[Path], warn: Warn | None) -> list[Row]:
    """The rows of these files; a question may stand without its answer.

    A bad row goes to `warn` with its place, and is left out; without `warn` it is an InputError.
    """
    rows: list[Row] = []
    for position, file in enumerate(files):
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        if file in files[:position]:
            raise InputError(f"{file}: is given twice")
        for where, raw in read_records(file):
            try:
                if isinstance(raw, BadRecord):
                    raise BadRow(str(raw))
                rows.append(make_row(_with_answer(raw), where))
            except BadRow as error:
                if warn is None:
                    raise InputError(f"{where}  {error}") from None
                warn(f"{where}  {error}; left out")
    if not rows:
        raise InputError(f"{', '.join(map(str, files))}: no row that can be used")
    return rows


def _with_answer(raw: Any) -> Any:
    missing = {a: "" for q, a in ANSWERS.items() if isinstance(raw, dict) and q in raw and raw.get(a) is None}
    return {**raw, **missing} if missing else raw


def make_requests(
    backend: Backend, rows: Sequence[Row], sampling: Sampling, *, identity: str, system: str | None = None,
    use_template: bool = True, task: str = CAUSAL, warn: Warn | None = None,
) -> list[Asked]:  # fmt: skip
    """What to ask for each row; a prompt that does not fit into the context goes to `warn`, or is an InputError."""
    closed = task != CAUSAL
    found: list[Asked] = []
    for row in rows:
        try:
            if row.text is not None:
                tokens = text_tokens(backend.tokenizer, row.text, closed=closed)
            else:
                tokens = prompt_tokens(
                    backend.tokenizer, list(row.prompt), system, use_template, tools=row.tools, closed=closed
                )
            request = Request(tokens, sampling)
            if closed:
                check_text(tokens, backend.context)
            else:
                check_length(request, backend.context)
        except NoTemplate:
            raise
        except InputError as error:
            if warn is None:
                raise InputError(f"{row.where}  {error}") from None
            warn(f"{row.where}  {error}; left out")
            continue
        found.append(Asked(row, request, digest_json([list(tokens), asdict(sampling), identity])))
    if not found:
        raise InputError("the dataset has no row that can be used")
    return found


def run(
    backend: Backend, asked: Sequence[Asked], path: Path, *, task: str = CAUSAL, batch_size: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> int:  # fmt: skip
    """Append the results of what `path` does not hold yet; how many were made. Flushed to the disk batch by batch."""
    with _open(path) as file:
        done = _finished(path, file, {a.row.where: a.digest for a in asked})
        progress(len(done))
        rest = [a for a in asked if a.row.where not in done]
        for batch in _batches(rest, batch_size):
            made = zip(batch, _results(backend, batch, task), strict=True)
            _append(path, file, [{"line": a.row.where, "request": a.digest, **result} for a, result in made])
            progress(len(batch))
    return len(rest)


def _append(path: Path, file: FileIO, results: Sequence[dict[str, Any]]) -> None:
    """Lines on the disk; what is torn where there is no room is cut off by a rerun."""
    rest = memoryview(b"".join(map(_line, results)))
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}; a rerun goes on from there") from None


def _line(result: dict[str, Any]) -> bytes:
    """A line of JSON in UTF-8; halves of characters, which a label or a path may hold, as escapes."""
    try:
        return json.dumps(result, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(result).encode() + b"\n"


def _batches(items: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _results(backend: Backend, batch: Sequence[Asked], task: str) -> list[dict[str, Any]]:
    if task != CAUSAL:
        found = backend.vectors([a.request.tokens for a in batch])
        return [{"response": v, "labels": a.row.answer or None} for a, v in zip(batch, found, strict=True)]
    replies = backend.generate([a.request for a in batch])
    return [
        {
            "response": reply.text,
            "messages": [*a.row.prompt, {"role": "assistant", "content": reply.text}] if a.row.text is None else None,
            "labels": a.row.answer or None,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        for a, reply in zip(batch, replies, strict=True)
    ]


def _finished(path: Path, file: FileIO, wanted: dict[str, str]) -> set[str]:
    """Places of the rows that the file has results for; a torn last line, of a run that was killed, is cut off.

    Raises InputError for a file that another request has written.
    """
    file.seek(0)
    content = file.readall()
    whole = content[: content.rfind(b"\n") + 1]
    done: set[str] = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found = json.loads(line)
            place, digest = found["line"], found["request"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}:{number}: is no result of inlay; give another --result_path") from None
        if wanted.get(place) != digest:
            raise InputError(
                f"{path}:{number}: the result for {place} is of another request (other data, settings, base or "
                "adapters); give another --result_path, or remove it"
            )
        done.add(place)
    if torn := content[len(whole) :]:
        if not torn.startswith(LINE[: len(torn)]):
            raise InputError(f"{path}: ends in what is no result of inlay; give another --result_path")
        file.truncate(len(whole))
    return done


def check_result(path: Path) -> None:
    """Raises OutputError for a place that results cannot be appended to, as far as can be told without writing."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        there = next(p for p in path.absolute().parents if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: cannot be written: {there} is no folder that one can write to") from None
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise OutputError(f"{path}: cannot be written: it is no ordinary file, and a rerun reads what is there")
    if not os.access(path, os.R_OK | os.W_OK):
        raise OutputError(f"{path}: cannot be written: permission denied")


def _open(path: Path) -> FileIO:
    """The file, unbuffered, for appending by one process at a time. Raises OutputError where it cannot be written."""
    check_result(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(path, "a+")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OutputError(f"{path}: another run is writing to it; give another --result_path") from None
    return file
