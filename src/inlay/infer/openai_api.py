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

READ = {
    "model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "top_k", "repetition_penalty", "stop", "seed",
}  # fmt: skip
# Fields for OpenAI's own books, which no answer depends on.
PASSED_OVER = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Fields that ask for what is not done, and the values with which they ask for nothing. Null does so in all.
NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "logit_bias": ({},), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0),
    "suffix": ("",), "echo": (False,),
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant")
MAX_NUMBER = 1 << 64  # beyond it no field has a meaning


class Refused(Exception):
    """A request that is answered with an error of OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


def shutting_down() -> Refused:
    return Refused(503, "the server is shutting down", "server_error")


def gone() -> Refused:
    """For a client that closed the connection: nobody reads it."""
    return Refused(499, "the client has gone")


def error_object(error: Refused) -> dict[str, Any]:
    return {"message": error.message, "type": error.kind, "param": None, "code": None}


def check_fields(body: Mapping[str, Any], model: str) -> None:
    """Raises Refused for another model than the one that is there, or for what is not done."""
    asked = body.get("model")
    if asked not in (None, "", model):
        raise Refused(404, f"there is no model {asked!r} here, only {model!r}", "not_found_error")
    for field in sorted(body.keys() - READ - PASSED_OVER):
        value = body[field]
        # 0 is not False here: the one asks for log probabilities of the token chosen, the other for none.
        if value is not None and not any(type(value) is type(n) and value == n for n in NOTHING.get(field, ())):
            raise Refused(400, f"{field} is not supported")
    if not isinstance(body.get("stream"), bool | None):
        raise Refused(400, "stream must be true or false")
    if not isinstance(body.get("stream_options"), dict | None):
        raise Refused(400, "stream_options must be an object")


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
        if message["role"] not in ROLES or message.get("tool_calls") or message.get("function_call"):
            raise Refused(
                400, f"messages may be of {', '.join(ROLES)}, without tool calls; not {message['role']!r:.40}"
            )
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
    newer = body.get("max_completion_tokens")
    return Sampling(
        max_new_tokens=_number(body, "max_tokens" if newer is None else "max_completion_tokens", int),
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
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER  # not NaN
    if not number or (kind is int and value != int(value)):
        raise Refused(400, f"{name} must be a number{' without a fraction' if kind is int else ''}, not {value!r:.40}")
    return kind(value)
