"""An OpenAI-compatible endpoint over any `Backend`: one model, one reply at a time, the others wait in line.

    GET  /v1/models  /health
    POST /v1/chat/completions  /v1/completions        with "stream": true as server-sent events

Bodies and answers are in `openai_api`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from inlay.errors import InputError
from inlay.extras import needs
from inlay.infer.backend import Backend, Reply, Request, Serving, check_length
from inlay.infer.chat import prompt_tokens, text_tokens
from inlay.infer.openai_api import (
    Chat,
    Completion,
    Form,
    Refused,
    check_fields,
    error_object,
    gone,
    messages_of,
    sampling_of,
    shutting_down,
)

if TYPE_CHECKING:
    from starlette.applications import Starlette

BODY_SECONDS = 60  # for the body of a request to come
GRACE_SECONDS = 5  # for replies that are being made when the server is told to stop


def run(load: Callable[[], Backend], serving: Serving) -> int:
    """Serve until SIGINT or SIGTERM; 0. The port is taken before the model is loaded.

    Raises InputError for a port in use, an address that is not of this machine, or a missing extra.
    """
    with needs("serve", "inlay serve"):
        import uvicorn
    listener = listen(serving.host, serving.port)
    try:
        backend = load()
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            make_app(backend, serving), log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS, lifespan="on"
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {serving.name} at http://{shown}:{port}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has shut down
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to this address. Raises InputError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(128)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}; choose with --host and --port") from None
    return made


def make_app(backend: Backend, serving: Serving) -> Starlette:
    """The endpoint as an ASGI application."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    endpoint = _Endpoint(backend, serving)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        endpoint.stopping.set()
        backend.close()

    return Starlette(
        routes=[
            Route("/health", endpoint.health, methods=["GET"]),
            Route("/v1/models", endpoint.models, methods=["GET"]),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
            Route("/v1/completions", endpoint.completions, methods=["POST"]),
        ],
        exception_handlers={Refused: _refuse, InputError: _refuse},
        lifespan=lifespan,
    )


async def _refuse(_: Any, error: Exception) -> Any:
    from starlette.responses import JSONResponse

    known = error if isinstance(error, Refused) else Refused(400, str(error))
    # What is left of a body that was not read to its end must not be taken for the next request.
    headers = {"connection": "close"} if known.status in (408, 413) else None
    return JSONResponse({"error": error_object(known)}, known.status, headers)


class _Endpoint:
    def __init__(self, backend: Backend, serving: Serving) -> None:
        self.backend, self.serving = backend, serving
        self.turn = asyncio.Lock()
        self.waiting = 0
        self.stopping = threading.Event()
        self.created = int(time.time())

    async def health(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok"})

    async def models(self, http: Any) -> Any:
        from starlette.responses import JSONResponse

        self._authorise(http)
        one = {"id": self.serving.name, "object": "model", "created": self.created, "owned_by": "inlay"}
        if self.backend.context is not None:
            one["max_model_len"] = self.backend.context
        return JSONResponse({"object": "list", "data": [one]})

    async def chat(self, http: Any) -> Any:
        body = await self._body(http)
        messages = messages_of(body)
        tokens = prompt_tokens(self.backend.tokenizer, messages, self.serving.system, True)
        return await self._answer(http, body, tokens, Chat(self.serving.name, body))

    async def completions(self, http: Any) -> Any:
        body = await self._body(http)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt):
            size = len(self.backend.tokenizer)
            if any(not 0 <= t < size for t in prompt):
                raise Refused(400, f"prompt has tokens outside [0, {size})")
            tokens = tuple(prompt)
        elif isinstance(prompt, str):
            tokens = text_tokens(self.backend.tokenizer, prompt)
        else:
            raise Refused(400, "prompt must be one text, or the tokens of one")
        return await self._answer(http, body, tokens, Completion(self.serving.name, body))

    def _authorise(self, http: Any) -> None:
        key = self.serving.api_key
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        # Headers come decoded as Latin-1, byte by byte.
        right = key is not None and hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if key is not None and not (right and scheme.lower() == "bearer"):
            raise Refused(401, "the API key is missing or wrong: Authorization: Bearer KEY", "authentication_error")

    async def _body(self, http: Any) -> dict[str, Any]:
        """The JSON object of a request, of at most so many bytes."""
        from starlette.requests import ClientDisconnect

        self._authorise(http)
        limit, content = self.serving.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():
                    content += chunk
                    if len(content) > limit:
                        raise Refused(413, f"the request is larger than {limit} bytes")
        except TimeoutError:
            raise Refused(408, f"the request did not come whole within {BODY_SECONDS} seconds") from None
        except ClientDisconnect:
            raise gone() from None
        except asyncio.CancelledError:  # uvicorn ends, and has waited for long enough
            raise shutting_down() from None
        try:
            body = json.loads(bytes(content))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        check_fields(body, self.serving.name)
        return body

    async def _answer(self, http: Any, body: Mapping[str, Any], tokens: tuple[int, ...], form: Form) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        request = Request(tokens, sampling_of(body))
        check_length(request, self.backend.context)
        events = self._events(request)
        try:
            event = await _unless_gone(http, anext(events))
            if body.get("stream"):
                return StreamingResponse(form.stream(event, events), media_type="text/event-stream")
            while isinstance(event, str):
                event = await _unless_gone(http, anext(events))
            await events.aclose()
        except StopAsyncIteration:
            raise shutting_down() from None
        except BaseException:
            await events.aclose()
            raise
        return JSONResponse(form.whole(event))

    async def _events(self, request: Request) -> AsyncGenerator[str | Reply]:
        """What the backend's `stream` yields, made in a thread, one request after another.

        The turn is given back by the thread when it has ended, not here: who is cancelled cannot wait for that.
        """
        if self.waiting >= self.serving.max_waiting:
            raise Refused(429, f"{self.waiting} requests are waiting already; try again later", "rate_limit_error")
        self.waiting += 1
        try:
            await self.turn.acquire()
        finally:
            self.waiting -= 1
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Any]()
        stop = threading.Event()

        def work() -> None:
            def put(item: Any) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    loop.call_soon_threadsafe(arrived.put_nowait, item)

            stream: Iterator[str | Reply] = self.backend.stream(request)
            try:
                for event in stream:
                    put(event)
                    if stop.is_set() or self.stopping.is_set():
                        break
            except Exception as error:  # raised again where the events are taken
                put(error)
            finally:
                getattr(stream, "close", lambda: None)()
                put(None)
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self.turn.release)

        threading.Thread(target=work, name="reply", daemon=True).start()
        try:
            while (event := await arrived.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()


async def _unless_gone(http: Any, event: Awaitable[str | Reply]) -> str | Reply:
    """The event, unless the client closes the connection first. Raises Refused then, which nobody reads."""
    task, end = asyncio.ensure_future(event), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise gone()
        return task.result()
    finally:
        task.cancel()
        end.cancel()
        await asyncio.gather(task, end, return_exceptions=True)


async def _gone(http: Any) -> None:
    """Returns when the client closes the connection."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.2)
