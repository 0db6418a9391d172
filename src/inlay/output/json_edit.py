"""Change single values in a JSON text and leave every other byte as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # with a byte order mark, which some editors leave
_DECODER = json.JSONDecoder()


def edit_json(text: str, edits: Mapping[str, Any], removed: Sequence[str] = ()) -> str:
    """`text` with the values at the dotted paths in `edits` replaced, or added where they are missing.

    Law: parsing the result gives the parsed input with exactly these values set, and those at the paths in
    `removed` gone. New members go to the end of their object, in its own style of indentation.
    """
    for path in removed:
        text = _remove(text, path.split("."))
    for path, value in edits.items():
        text = _edit(text, path.split("."), value)
    return text


def _remove(text: str, path: list[str]) -> str:
    start = _skip(text, 0)
    for name in path[:-1]:
        start = _members(text, start)[name][0]
    members = _members(text, start)
    if path[-1] not in members:
        return text
    order = sorted(members.values())
    at = order.index(members[path[-1]])
    end = order[at][1]
    if at:  # from the end of the value before it, so that its comma goes too
        return text[: order[at - 1][1]] + text[end:]
    if len(order) == 1:
        return text[: start + 1] + text[_skip(text, end) :]
    return text[: _skip(text, start + 1)] + text[_skip(text, text.index(",", end) + 1) :]


def _edit(text: str, path: list[str], value: Any) -> str:
    start = _skip(text, 0)
    for depth, name in enumerate(path):
        members = _members(text, start)
        if name not in members:
            missing: Any = value
            for outer in reversed(path[depth + 1 :]):
                missing = {outer: missing}
            return _insert(text, start, members, name, missing)
        start, end = members[name]
    return text[:start] + _render(value, _indent(text, start)) + text[end:]


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _members(text: str, start: int) -> dict[str, tuple[int, int]]:
    """Spans of the values of the object that begins at `start`."""
    if text[start] != "{":
        raise ValueError(f"expected an object at character {start}")
    spans: dict[str, tuple[int, int]] = {}
    at = _skip(text, start + 1)
    while text[at] != "}":
        name, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)
        _, end = _DECODER.raw_decode(text, at)
        spans[name] = (at, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return spans


def _indent(text: str, at: int) -> str:
    """White space at the start of the line of `at`; empty for an object on one line."""
    line = text.rfind("\n", 0, at) + 1
    return text[line : _skip(text, line)] if line else ""


def _insert(text: str, start: int, members: Mapping[str, tuple[int, int]], name: str, value: Any) -> str:
    if not members:
        return text[: start + 1] + f"{json.dumps(name)}: {_render(value, '')}" + text[start + 1 :]
    first, last = min(members.values()), max(members.values())
    opening = text[start + 1 : _skip(text, start + 1)]
    separator = opening if "\n" in opening else " "
    member = f"{json.dumps(name)}: {_render(value, _indent(text, first[0]))}"
    return text[: last[1]] + "," + separator + member + text[last[1] :]


def _render(value: Any, indent: str) -> str:
    if not isinstance(value, (dict, list)) or not indent:
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False, indent=indent).replace("\n", "\n" + indent)
