"""A dataset through a model: one line of JSON for each row, written as it comes, continued when it was cut short.

    {"line": "data.jsonl:7", "request": digest, "response": …, "messages": […], "labels": …, …}

`request` is a digest of the prompt's tokens, the settings and `identity` (what model answered): a line is done if a
rerun would ask the same, and a file that holds lines of another request is refused. With `task` embedding or seq_cls
`response` is a vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from inlay.datasets.files import NotJson, read_records
from inlay.datasets.row import BadRow, Row, make_row
from inlay.digests import digest_json
from inlay.errors import InputError, OutputError
from inlay.infer.backend import CAUSAL, Backend, Request, Sampling, check_length
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
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        for where, raw in read_records(file):
            try:
                if isinstance(raw, NotJson):
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
    use_template: bool = True, warn: Warn | None = None,
) -> list[Asked]:  # fmt: skip
    """What to ask for each row; a prompt that does not fit into the context goes to `warn`, or is an InputError."""
    found: list[Asked] = []
    for row in rows:
        try:
            if row.text is not None:
                tokens = text_tokens(backend.tokenizer, row.text)
            else:
                tokens = prompt_tokens(backend.tokenizer, list(row.prompt), system, use_template)
            request = Request(tokens, sampling)
            check_length(request, backend.context)
        except NoTemplate:
            raise
        except InputError as error:
            if warn is None:
                raise InputError(f"{row.where}  {error}") from None
            warn(f"{row.where}  {error}; left out")
            continue
        found.append(Asked(row, request, digest_json([list(tokens), asdict(sampling), identity])))
    return found


def run(
    backend: Backend, asked: Sequence[Asked], path: Path, *, task: str = CAUSAL, batch_size: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> int:  # fmt: skip
    """Append the results of what `path` does not hold yet; how many were made. Flushed to the disk batch by batch."""
    done = finished(path, {a.row.where: a.digest for a in asked})
    progress(len(done))
    rest = [a for a in asked if a.row.where not in done]
    with _open(path) as file:
        for batch in _batches(rest, batch_size):
            for one, result in zip(batch, _results(backend, batch, task), strict=True):
                file.write(
                    json.dumps({"line": one.row.where, "request": one.digest, **result}, ensure_ascii=False) + "\n"
                )
            file.flush()
            os.fsync(file.fileno())
            progress(len(batch))
    return len(rest)


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


def finished(path: Path, wanted: dict[str, str]) -> set[str]:
    """Places of the rows that the file has results for; a torn last line, of a run that was killed, is cut off.

    Raises InputError for a file that another request has written.
    """
    if not path.exists():
        return set()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None
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
        os.truncate(path, len(whole))
    return done


def _open(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
