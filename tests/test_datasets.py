"""Datasets: every form of a row and every file format gives the same messages; bad rows are named by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from inlay.datasets.files import read_records
from inlay.datasets.read import Source, read_dataset
from inlay.datasets.row import BadRow, make_row
from inlay.errors import InputError

ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SYSTEM = {"role": "system", "content": "be brief"}

FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": [SYSTEM, ASKED, ANSWERED]}, [SYSTEM, ASKED, ANSWERED]),
    "messages and system": ({"messages": [ASKED, ANSWERED], "system": "be brief"}, [SYSTEM, ASKED, ANSWERED]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        [ASKED, ANSWERED],
    ),
    "query": ({"query": "2+2?", "response": "4"}, [ASKED, ANSWERED]),
    "query, history, system": (
        {"query": "2+2?", "response": "4", "history": [["hi", "hello"]], "system": "be brief"},
        [SYSTEM, *EARLIER, ASKED, ANSWERED],
    ),
    "instruction": ({"instruction": "2+2?", "input": "", "output": "4"}, [ASKED, ANSWERED]),
    "instruction and input": (
        {"instruction": "add", "input": "2 2", "output": "4"},
        [{"role": "user", "content": "add\n2 2"}, ANSWERED],
    ),
    "prompt": ({"prompt": "2+2?", "completion": "4"}, [ASKED, ANSWERED]),
    "prompt of messages": ({"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]}, [SYSTEM, ASKED, ANSWERED]),
    "null columns of a table": (
        {"messages": None, "query": "2+2?", "response": "4", "history": None, "system": None, "images": []},
        [ASKED, ANSWERED],
    ),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}, ANSWERED]},
        [ASKED, ANSWERED],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_its_messages(form: str) -> None:
    raw, messages = FORMS[form]
    assert list(make_row(raw, "here").messages) == messages


def test_a_plain_text_has_no_messages() -> None:
    row = make_row({"text": "once"}, "here")
    assert row.text == "once" and row.messages == () and row.answer is None


def test_prompt_and_answer_are_the_conversation_cut_before_its_last_answer() -> None:
    row = make_row(FORMS["query, history, system"][0], "here")
    assert list(row.prompt) == [SYSTEM, *EARLIER, ASKED] and row.answer == "4"
    asked = make_row({"messages": [ASKED]}, "here")
    assert list(asked.prompt) == [ASKED] and asked.answer is None


# --- files ------------------------------------------------------------------------------------------

ROWS = [{"query": "what is\n“one” \u2028, two?", "response": '1, "2"'}, {"query": "b", "response": "c", "system": "s"}]


def as_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def as_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), "utf-8")


def as_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["query", "response", "system", "history"])
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(rows[-1]) | row for row in rows]), path)


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], None]] = {
    "data.jsonl": as_lines,
    "data.json": as_json,
    "lines.json": as_lines,
    "data.csv": as_csv,
    "data.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    expected = [list(make_row(row, "").messages) for row in ROWS]
    assert [list(row.messages) for row in read_dataset(str(tmp_path / name))] == expected


def test_lists_in_the_cells_of_a_table_are_json(tmp_path: Path) -> None:
    as_csv(tmp_path / "a.csv", [{"query": "2+2?", "response": "4", "history": json.dumps([["hi", "hello"]])}])
    assert list(read_dataset(str(tmp_path / "a.csv"))[0].messages) == [*EARLIER, ASKED, ANSWERED]


def test_a_folder_is_all_its_data_files_in_order(tmp_path: Path) -> None:
    as_lines(tmp_path / "b.jsonl", ROWS[1:])
    as_lines(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "notes.md").write_text("no data")
    assert [row.where for row in read_dataset(str(tmp_path))] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"]


def test_bad_rows_are_named_all_at_once_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(
        '{"query": "a", "response": "b"}\n\n{"query": 1, "response": "b"}\n[1]\n{broken\n{"messages": []}\n{"query": "a"}\n'
        '{"query": "a", "response": ""}\n{"messages": [{"role": "bot", "content": "a"}]}\n'
    )
    with pytest.raises(InputError) as found:
        read_dataset(str(path))
    lines = str(found.value).splitlines()
    assert lines[0].endswith("(7 bad rows)")
    assert [line.split()[0] for line in lines[1:]] == [f"{path}:{n}" for n in (3, 4, 5, 6, 7, 8, 9)]
    for line, word in zip(
        lines[1:], ("query", "a list", "JSON", "empty", "columns are query", "answer", "bot"), strict=True
    ):
        assert word in line, line


def test_a_record_of_csv_over_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('query,response\n"a\nb",c\n"d\ne",\n')
    with pytest.raises(InputError, match=r"d\.csv:4 "):
        read_dataset(str(tmp_path / "d.csv"))


def test_a_question_without_an_answer_is_a_row_only_where_none_is_needed(tmp_path: Path) -> None:
    as_lines(tmp_path / "d.jsonl", [{"messages": [ASKED]}])
    assert list(read_dataset(str(tmp_path / "d.jsonl"), answers=False)[0].prompt) == [ASKED]
    with pytest.raises(InputError, match="no answer"):
        read_dataset(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("column", ["images", "videos", "audio"])
def test_a_row_with_media_is_refused_rather_than_read_without_them(column: str) -> None:
    with pytest.raises(BadRow, match="only text"):
        make_row({"query": "what is this?", "response": "a cat", column: ["cat.png"]}, "here")


@pytest.mark.parametrize(
    ("content", "name"),
    [("", "d.jsonl"), ("[]", "d.json"), ("query,response\n", "d.csv"), ("", "d.csv"), ("\n\n", "d.jsonl")],
)
def test_an_empty_dataset_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="no rows"):
        read_dataset(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.xlsx", b"PK", "one of .jsonl"),
        ("d.parquet", b"not parquet", "not Parquet"),
        ("d.json", b"7", "array of rows"),
        ("d.json", b"[{]", "not JSON"),
        ("d.jsonl", "{}\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("d.json", b'[\n{"query": "\xe4"}]', r"d\.json:2: is not UTF-8 text \(byte 0xe4 at 11 of the line\)"),
        ("d.csv", b"qu\xe9ry,response\na,b\n", r"d\.csv:1: is not UTF-8 text \(byte 0xe9\)"),
        ("d.csv", b'query,response\n"a,b\n', "not CSV"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as found:
        read_dataset(str(tmp_path / name))
    assert name in str(found.value)


# A byte of Latin-1 in the second row of three. It stands in the third line.
SPOILT = {
    "d.jsonl": b'\n{"query": "a", "response": "b"}\n{"query": "\xe9", "response": "b"}\n{"query": "\xc3\xa9", "response": "b"}\n',
    "d.json": b'\n{"query": "a", "response": "b"}\n{"query": "\xe9", "response": "b"}\n{"query": "\xc3\xa9", "response": "b"}\n',
    "d.csv": b'query,response\n"a",b\n\xe9,b\n\xc3\xa9,"b\n"\n',
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_byte_that_is_no_text_spoils_its_own_row_only(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(SPOILT[name])
    with pytest.raises(InputError) as found:
        read_dataset(str(path))
    first, *bad = str(found.value).splitlines()
    assert first.endswith("(1 bad row)")
    assert len(bad) == 1 and bad[0].startswith(f"  {path}:3  is not UTF-8 text (byte 0xe9")
    kept = [make_row(raw, where).messages[0]["content"] for where, raw in read_records(path) if isinstance(raw, dict)]
    assert kept == ["a", "é"]


def test_a_row_of_parquet_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    words = pyarrow.array([b"a", b"\xe9", b"c"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *words.buffers()[1:])
    parquet.write_table(pyarrow.table({"query": text, "response": text}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"1 bad row\)\n.*row 2  is not UTF-8 text"):
        read_dataset(str(tmp_path / "d.parquet"))


# --- names ------------------------------------------------------------------------------------------


def test_a_count_takes_a_sample_that_the_seed_decides(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    as_lines(path, [{"query": str(i), "response": "x"} for i in range(10)])
    first, again, other = (read_dataset(f"{path}#4", seed=seed) for seed in (1, 1, 2))
    assert len({row.where for row in first}) == 4 and first == again and first != other
    whole = [row.where for row in read_dataset(str(path))]
    more = [row.where for row in read_dataset(f"{path}#23")]
    assert more[:20] == whole * 2 and len(set(more[20:])) == 3


@pytest.mark.parametrize("text", ["d.jsonl#0", "d.jsonl#many", "#5", "d.jsonl#-1"])
def test_a_count_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="positive number"):
        Source.parse(text)


def test_a_path_with_a_hash_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a#5"
    path.mkdir()
    assert Source.parse(str(path)) == Source(str(path))


def test_a_name_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_dataset(str(tmp_path / "missing.jsonl"))


def test_a_dataset_of_the_hub_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library gets the id, the subset and the training split; its rows are read as ours."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_dataset("someone/talks:small#1")
    assert asked == [("someone/talks", "small", "train")] and rows[0].where.startswith("someone/talks:small, row ")


def test_a_dataset_that_the_hub_does_not_give_is_refused() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="Hugging Face Hub"):
        read_dataset("someone/nothing-of-this-name")
