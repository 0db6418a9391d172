"""`inlay serve` over vLLM: its own OpenAI-compatible server, started with the loader, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from inlay.errors import InputError
from inlay.infer.backend import CAUSAL, Serving, Source
from inlay.infer.serve import listen
from inlay.infer.vllm_lora import left_out
from inlay.infer.vllm_prepare import Prepared, prepared
from inlay.infer.vllm_settings import as_flags

# vLLM's server by its modules, newest first. `vllm serve` asks for the package `vllm`, which CPU builds are not.
MODULES = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
MIDDLEWARE = "inlay.infer.vllm_serve.BodyLimit"
START_CHECK = "inlay.infer.vllm_serve.StartCheck"
LIMIT = "INLAY_MAX_BODY_BYTES"
ADAPTER = "INLAY_LIVE_ADAPTER"
PROBLEM = "INLAY_PROBLEM_FILE"
GRACE_SECONDS = 20

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def serve(source: Source, serving: Serving) -> int:
    """Run vLLM's server until it is interrupted; 0 then, or the exit code of a server that failed.

    The model is called `serving.name`; with a live adapter that name is the adapter's, and the base is
    `<name>-base`. Raises InputError for a port in use, and for what vLLM or its server cannot do; an adapter that vLLM
    would apply in part ends the server before it answers (`StartCheck`).
    """
    if serving.system:
        raise InputError("--system: vLLM's server has no system prompt of its own; send it with the messages")
    if source.task != CAUSAL:
        raise InputError(f"--task_type {source.task} is not served over vLLM; use --infer_backend pt")
    with listen(serving.host, serving.port) as probe:  # a port in use is said now, not after the model is loaded
        serving = replace(serving, port=probe.getsockname()[1])
    with prepared(source) as ready:
        for note in ready.notes:
            print(f"note: {note}", file=sys.stderr)
        where = f"http://{serving.host}:{serving.port}/v1"
        print(
            f"vLLM's server will answer as {serving.name} at {where} once it has loaded (Ctrl-C ends)", file=sys.stderr
        )
        command = [sys.executable, "-m", _server(), *server_flags(ready, serving)]
        with tempfile.TemporaryDirectory(prefix="inlay-serve-") as folder:
            problem = Path(folder) / "problem"
            code = _run(command, {**_environment(serving), ADAPTER: str(ready.lora), PROBLEM: str(problem)})
            if problem.exists():
                raise InputError(problem.read_text("utf-8"))
            return code


def server_flags(ready: Prepared, serving: Serving) -> list[str]:
    """The server's command line; the key is not on it, because others on the machine can read that."""
    args: dict[str, Any] = {**ready.args, "host": serving.host, "port": serving.port, "middleware": MIDDLEWARE}
    if "max_num_queued_reqs" not in args:
        args["max_num_queued_reqs"] = serving.max_waiting
    args["served_model_name"] = serving.name if ready.lora is None else f"{serving.name}-base"
    flags = as_flags(args)
    if ready.lora is None:
        return flags
    return [*flags, "--middleware", START_CHECK, "--lora-modules", f"{serving.name}={ready.lora}"]


def _server() -> str:
    for name in MODULES:
        try:
            if find_spec(name):
                return name
        except ModuleNotFoundError:  # a folder above it is not there
            continue
    raise InputError(f"this version of vLLM has no server under {' or '.join(MODULES)}")


def _environment(serving: Serving) -> dict[str, str]:
    environment = {**os.environ, LIMIT: str(serving.max_body_bytes)}
    if serving.api_key is not None:
        environment["VLLM_API_KEY"] = serving.api_key
    return environment


def _run(command: list[str], environment: Mapping[str, str]) -> int:
    """The server, in a process group of its own, so that it is asked to end once, and not by the terminal too."""
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        child.send_signal(signal.SIGINT if len(asked) == 1 else signal.SIGKILL)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end(child)
    return 0 if asked else (code if code > 0 else 1)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the server and the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(GRACE_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


class StartCheck:
    """ASGI middleware that the server loads with a live adapter: it does not start if vLLM would leave modules out.

    The adapter's name comes in the variable INLAY_LIVE_ADAPTER; the reason goes to the file that INLAY_PROBLEM_FILE
    names, which `serve` reads.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and (problem := await self._problem(scope["app"].state.engine_client)):
            Path(os.environ[PROBLEM]).write_text(problem, "utf-8")
            await receive()  # "lifespan.startup", to which this is the answer
            await send({"type": "lifespan.startup.failed", "message": problem})
            return
        await self.app(scope, receive, send)

    async def _problem(self, engine: Any) -> str | None:
        # The server has loaded the adapters of its command line by now; the first has number 1.
        return left_out(os.environ[ADAPTER], await engine.collective_rpc("inlay_unplaced", args=(1,)))


class BodyLimit:
    """ASGI middleware that the server loads: a request whose body is too large gets 413.

    The limit, in bytes, comes in the variable INLAY_MAX_BODY_BYTES. Bodies without a length are counted as they come.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.limit = int(os.environ[LIMIT])

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limit:
            await self._refuse(send)
            return
        body: list[Message] = []
        taken = 0
        while not body or body[-1].get("more_body"):
            body.append(await receive())
            taken += len(body[-1].get("body", b""))
            if taken > self.limit:
                await self._refuse(send)
                return
        queue = iter(body)

        async def replay() -> Message:
            return next(queue, None) or await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, send: Send) -> None:
        message = f"the request is larger than {self.limit} bytes"
        text = json.dumps({"error": {"message": message, "type": "invalid_request_error"}})
        await send({
            "type": "http.response.start",
            "status": 413,
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())],
        })  # fmt: skip
        await send({"type": "http.response.body", "body": text.encode()})
