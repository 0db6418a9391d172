"""A row: a conversation, or a plain text, and where it stands.

    {"messages": [{"role", "content"}, …]}            also "tools"; an assistant's message may say "loss": false
    {"conversations": [{"from", "value"}, …]}         ShareGPT
    {"query", "response"}                             also "history": [[query, response], …] and "system"
    {"instruction", "input", "output"}                Alpaca; "input" may be missing or empty; also "system"
    {"prompt", "completion"}                          text, or messages
    {"text"}                                          no conversation: every token is learned

A form is told by the names of its columns, in this order; columns that no form knows are left aside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Columns that hold lists; a table of cells (CSV) has them as JSON.
LISTS = ("messages", "conversations", "history", "tools", "images", "videos", "audios")
FORMS = "messages, conversations, query/response, instruction/output, prompt/completion or text"


@dataclass(frozen=True)
class Row:
    """One conversation (`messages`), or one plain text (`text`, without messages).

    Each message has `role`, one of ROLES, and `content`, a string; an assistant's may have `tool_calls`, and
    `loss`: false where its words are not to be learned. `where` is `file:line`, or `file, row N` where lines
    say nothing.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Any, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last answer: what a model is asked."""
        ends = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        return self.messages[:-1] if ends else self.messages

    @property
    def answer(self) -> str | None:
        """The last message where it is the assistant's: what is expected of a model."""
        return str(self.messages[-1]["content"]) if len(self.prompt) < len(self.messages) else None


class BadRow(ValueError):
    """What is wrong with a row; the reader adds where it stands."""


def make_row(raw: Any, where: str) -> Row:
    """The row of one record of a file. Raises BadRow."""
    if not isinstance(raw, Mapping):
        raise BadRow(f"is not an object with columns, but {_kind(raw)}")
    row = {key: _unpacked(key, value) for key, value in raw.items() if value is not None}
    if media := [name for name in MEDIA if row.get(name)]:
        raise BadRow(f"has {', '.join(media)}: only text is read here; remove these columns, or the row")
    for marks, make in _FORMS:
        if marks <= row.keys():
            messages = [_checked(message) for message in make(row)]
            _check_order(messages)
            return Row(where, tuple(messages), None, _tools(row))
    if "text" in row:
        return Row(where, (), _words(row, "text"))
    raise BadRow(f"has none of the known forms ({FORMS}); its columns are {', '.join(map(str, raw)) or 'none'}")


def _unpacked(key: str, value: Any) -> Any:
    if key not in LISTS or not isinstance(value, str):
        return value
    if not value.strip():
        return []
    return _parsed(value, f"{key}, a text,")


def _of_messages(row: Mapping[str, Any]) -> list[Message]:
    given = row["messages"]
    if not isinstance(given, list) or not given:
        raise BadRow("messages must be a list that is not empty")
    return [*_system(row), *given] if not _starts_with_system(given) else given


def _of_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    given = row["conversations"]
    if not isinstance(given, list) or not given:
        raise BadRow("conversations must be a list that is not empty")
    messages = []
    for turn in given:
        if not isinstance(turn, Mapping) or turn.get("from") not in SHAREGPT_ROLES or "value" not in turn:
            raise BadRow(f"a turn needs `from` ({', '.join(SHAREGPT_ROLES)}) and `value`, found {_short(turn)}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages if _starts_with_system(messages) else [*_system(row), *messages]


def _of_query(row: Mapping[str, Any]) -> list[Message]:
    return [*_system(row), *_history(row), *_pair(_words(row, "query"), _words(row, "response"))]


def _of_instruction(row: Mapping[str, Any]) -> list[Message]:
    asked = _words(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n{_words(row, 'input')}" if asked else _words(row, "input")
    return [*_system(row), *_history(row), *_pair(asked, _words(row, "output"))]


def _of_prompt(row: Mapping[str, Any]) -> list[Message]:
    """Each side as text, or as messages, which TRL calls a conversational prompt."""
    asked = row["prompt"] if isinstance(row["prompt"], list) else [_message("user", _words(row, "prompt"))]
    answered = row["completion"]
    answered = answered if isinstance(answered, list) else [_message("assistant", _words(row, "completion"))]
    return [*([] if _starts_with_system(asked) else _system(row)), *asked, *answered]


_FORMS: tuple[tuple[set[str], Callable[[Mapping[str, Any]], list[Message]]], ...] = (
    ({"messages"}, _of_messages),
    ({"conversations"}, _of_sharegpt),
    ({"query", "response"}, _of_query),
    ({"instruction", "output"}, _of_instruction),
    ({"prompt", "completion"}, _of_prompt),
)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pair(asked: str, answered: str) -> list[Message]:
    return [_message("user", asked), _message("assistant", answered)]


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _words(row, "system"))] if row.get("system") else []


def _starts_with_system(messages: list[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"


def _history(row: Mapping[str, Any]) -> list[Message]:
    found: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(words, str) for words in turn):
            raise BadRow(f"history must hold pairs [query, response] of text, found {_short(turn)}")
        found += _pair(*turn)
    return found


def _words(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise BadRow(f"{name} must be text, found {_kind(row[name])}")
    return str(row[name])


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = row.get("tools") or []
    if not isinstance(tools, list):
        raise BadRow(f"tools must be a list, found {_kind(tools)}")
    return tuple(_parsed(tool, "a tool") if isinstance(tool, str) else tool for tool in tools)


def _parsed(text: str, what: str) -> Any:
    """JSON inside a string, as several formats keep tools and the arguments of calls."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{what} is not JSON ({error})") from None


def _calls(given: Any) -> list[Any]:
    """Tool calls with their arguments as objects: a template writes them as JSON, and would write a text in quotes."""
    if not isinstance(given, list):
        raise BadRow(f"tool_calls must be a list, found {_kind(given)}")
    calls = []
    for call in given:
        inner = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
            call = {**call, "function": {**inner, "arguments": _parsed(inner["arguments"], "arguments of a call")}}
        calls.append(call)
    return calls


def _checked(message: Any) -> Message:
    """A message with the fields that templates and training know, its content as one text."""
    if not isinstance(message, Mapping):
        raise BadRow(f"a message must be an object with role and content, found {_short(message)}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise BadRow(f"a message has role {role!r}; known are {', '.join(ROLES)}")
    if content is None and calls:
        content = ""
    checked = _message(role, _as_text(content, role))
    if calls:
        checked["tool_calls"] = _calls(calls)
    if message.get("loss") is not None:
        checked["loss"] = bool(message["loss"])
    return checked


def _as_text(content: Any, role: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        others = sorted({str(p.get("type")) if isinstance(p, Mapping) else _kind(p) for p in content} - {"text"})
        if others:
            raise BadRow(f"the {role}'s content has parts of type {', '.join(others)}: only text is read here")
        return "".join(str(part.get("text", "")) for part in content)
    raise BadRow(f"the {role}'s content must be text, found {_kind(content)}")


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRow("a system message stands only at the beginning")
    if "user" not in roles and "tool" not in roles:
        raise BadRow("has no message of a user")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}.get(
        type(value), f"{value!r:.40}"
    )


def _short(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False, default=str):.60}"
