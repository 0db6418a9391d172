"""Bodies and answers of OpenAI's API for completions: https://platform.openai.com/docs/api-reference

What is asked for and not done (several choices, log probabilities, tools, images) is refused, never passed over.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any

from inlay.errors import InputError
from inlay.infer.backend import Reply, Sampling

# Fields that ask for what is not done, and the values with which they ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "logprobs": (None, False, 0), "top_logprobs": (None, 0), "tools": (None, []),
    "functions": (None, []), "response_format": (None, {"type": "text"}), "logit_bias": (None, {}),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "suffix": (None, ""), "echo": (None, False),
    "audio": (None,), "prediction": (None,),
}  # fmt: skip


class Refused(Exception):
    """A request that is answered with an error of OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


def shutting_down() -> Refused:
    return Refused(503, "the server is shutting down", "server_error")


def error_object(error: Refused) -> dict[str, Any]:
    return {"message": error.message, "type": error.kind, "param": None, "code": None}


def check_fields(body: Mapping[str, Any], model: str) -> None:
    """Raises Refused for another model than the one that is there, or for what is not done."""
    asked = body.get("model")
    if asked not in (None, "", model):
        raise Refused(404, f"there is no model {asked!r} here, only {model!r}", "not_found_error")
    for field, nothing in REFUSED.items():
        if body.get(field) not in nothing:
            raise Refused(400, f"{field} is not supported")


class Form(ABC):
    """How replies are put into OpenAI's objects."""

    kind, whole_kind, stream_kind = "", "", ""

    def __init__(self, model: str, body: Mapping[str, Any]) -> None:
        self.usage_wanted = bool((body.get("stream_options") or {}).get("include_usage"))
        self.head = {"id": f"{self.kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    @abstractmethod
    def choice(self, text: str, reason: str | None) -> dict[str, Any]:
        """A whole reply."""

    @abstractmethod
    def piece(self, text: str, reason: str | None) -> dict[str, Any]:
        """A part of one that is streamed."""

    def whole(self, reply: Reply) -> dict[str, Any]:
        choice = {"index": 0, **self.choice(reply.text, reply.finish_reason), "logprobs": None}
        return {**self.head, "object": self.whole_kind, "choices": [choice], "usage": _usage(reply)}

    async def stream(self, event: str | Reply, events: AsyncIterator[str | Reply]) -> AsyncIterator[str]:
        """Server-sent events of the pieces: `event`, and what follows it."""
        first = self.first()
        try:
            if first is not None:
                yield self._event([first])
            while isinstance(event, str):
                yield self._event([self.piece(event, None)])
                event = await anext(events)
            yield self._event([self.piece("", event.finish_reason)])
            if self.usage_wanted:
                yield self._event([], _usage(event))
            yield "data: [DONE]\n\n"
        except (InputError, StopAsyncIteration) as error:  # the status line has gone out already
            known = Refused(400, str(error)) if isinstance(error, InputError) else shutting_down()
            yield f"data: {json.dumps({'error': error_object(known)})}\n\n"
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def first(self) -> dict[str, Any] | None:
        return None

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        value: dict[str, Any] = {**self.head, "object": self.stream_kind}
        value["choices"] = [{"index": 0, **choice, "logprobs": None} for choice in choices]
        if self.usage_wanted:
            value["usage"] = usage
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class Chat(Form):
    kind, whole_kind, stream_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}, "finish_reason": reason}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "finish_reason": reason}


class Completion(Form):
    kind, whole_kind, stream_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"text": text, "finish_reason": reason}

    piece = choice


def _usage(reply: Reply) -> dict[str, int]:
    total = reply.prompt_tokens + reply.completion_tokens
    return {
        "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens, "total_tokens": total,
    }  # fmt: skip


def messages_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation, contents as text. Raises Refused."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages must be a list that is not empty")
    found = []
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, "a message must be an object with role and content")
        content = message.get("content")
        if isinstance(content, list):
            parts = [p for p in content if isinstance(p, dict) and p.get("type") == "text"]
            if len(parts) < len(content):
                raise Refused(400, "only parts of type text are supported in a content")
            content = "".join(str(p.get("text", "")) for p in parts)
        if not isinstance(content, str):
            raise Refused(400, f"the content of the {message['role']} must be text")
        found.append({"role": "system" if message["role"] == "developer" else message["role"], "content": content})
    return found


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """Settings of a request; a wrong type or range is an InputError, which is answered with 400."""
    stop = body.get("stop") or []
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise Refused(400, "stop must be a text or a list of texts")
    return Sampling(
        max_new_tokens=_number(body, "max_completion_tokens", int) or _number(body, "max_tokens", int),
        temperature=_number(body, "temperature", float),
        top_p=_number(body, "top_p", float),
        top_k=_number(body, "top_k", int),
        repetition_penalty=_number(body, "repetition_penalty", float),
        stop_words=tuple(words),
        seed=_number(body, "seed", int),
    )


def _number(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
        raise Refused(400, f"{name} must be a number{' without a fraction' if kind is int else ''}, not {value!r:.40}")
    return kind(value)
