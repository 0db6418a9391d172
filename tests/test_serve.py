"""The endpoint, as the `openai` client and plain HTTP see it; limits, refusals and the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cases import Kit
from chatty import GREEDY, ask, source_of, talking
from inlay.cli.main import main
from inlay.errors import InputError
from inlay.infer import serve
from inlay.infer.backend import Reply, Request, Serving
from inlay.infer.chat import prompt_tokens
from inlay.infer.pt import TorchBackend
from inlay.infer.serve import listen, make_app

openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")
uvicorn = pytest.importorskip("uvicorn")
SERVING = Serving(port=0, name="tiny", api_key="secret")


@contextmanager
def running(backend: Any, serving: Serving = SERVING) -> Iterator[str]:
    """An endpoint in a thread of this process, by its address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(backend, serving), log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def backend(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> TorchBackend:
    base = talking(kit, tmp_path_factory.mktemp("serve"))
    return TorchBackend(source_of(base, [kit.adapter("qwen2-plain")], merge=True))


@pytest.fixture(scope="module")
def address(backend: TorchBackend) -> Iterator[str]:
    with running(backend) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=30) as made:
        yield made


ASKED: list[Any] = [{"role": "user", "content": "hello"}]


def test_the_model_is_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 32


def test_chat_answers_as_the_backend_does(client: Any, backend: TorchBackend) -> None:
    request = Request(prompt_tokens(backend.tokenizer, "hello", None, True), GREEDY)
    expected = backend.generate([request])[0]
    found = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=10, temperature=0)
    (choice,) = found.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (
        expected.prompt_tokens,
        expected.completion_tokens,
    )


def test_chat_streams_the_same_text(client: Any, backend: TorchBackend) -> None:
    request = Request(prompt_tokens(backend.tokenizer, "hello", None, True), GREEDY)
    expected = backend.generate([request])[0]
    chunks = list(client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=10, temperature=0, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.finish_reason
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 3
    assert chunks[-1].usage.completion_tokens == expected.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_plain_text_is_continued(client: Any, backend: TorchBackend, stream: bool) -> None:
    expected = backend.generate([ask(backend, "hello")])[0].text
    found = client.completions.create(model="tiny", prompt="hello", max_tokens=10, temperature=0, stream=stream)
    assert "".join(c.choices[0].text for c in (found if stream else [found])) == expected
    by_tokens = client.completions.create(
        model="tiny", prompt=list(ask(backend, "hello").tokens), max_tokens=10, temperature=0
    )
    assert by_tokens.choices[0].text == expected


def test_parts_of_text_are_one_content_and_stop_words_hold(client: Any, backend: TorchBackend) -> None:
    whole = (
        client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=10, temperature=0)
        .choices[0]
        .message.content
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    found = client.chat.completions.create(model="tiny", messages=parts, max_tokens=10, temperature=0, stop=whole[2:4])
    assert (
        found.choices[0].message.content == whole[: whole.index(whole[2:4])]
        and found.choices[0].finish_reason == "stop"
    )


def test_the_key_is_asked_for(address: str) -> None:
    with openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        with pytest.raises(openai.AuthenticationError):
            other.completions.create(model="tiny", prompt="a")


@pytest.mark.parametrize(("more", "said"), [
    ({"n": 2}, "n is not supported"),
    ({"logprobs": True}, "logprobs is not supported"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
    ({"max_tokens": 99}, "context is 32"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 7}, "top_p"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "only parts of type text"),
    ({"extra_body": {"max_tokens": "ten"}}, "max_tokens"),
    ({"extra_body": {"stop": 3}}, "stop must be"),
    ({"max_completion_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"extra_body": {"min_p": 0.1}}, "min_p is not supported"),
    ({"extra_body": {"stream": "no"}}, "stream must be"),
    ({"extra_body": {"stream_options": "x"}}, "stream_options must be"),
    ({"temperature": 1e-30}, "temperature"),
    ({"extra_body": {"top_k": 10**400}}, "top_k"),
    ({"tool_choice": "required"}, "tool_choice is not supported"),
    ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]}, "messages may be of"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_with_its_name(client: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**{"model": "tiny", "messages": ASKED, **more})


def test_no_log_probabilities_of_the_token_chosen(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        client.completions.create(model="tiny", prompt="a", logprobs=0)


def test_half_a_character_is_refused(address: str) -> None:
    content = r'{"prompt": "a\ud83d"}'
    answer = httpx2.post(f"{address}/completions", content=content, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 400 and "no character" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1" + "0" * 400])
def test_numbers_that_are_none_are_refused(address: str, number: str) -> None:
    content = f'{{"prompt": "a", "max_tokens": {number}}}'
    answer = httpx2.post(f"{address}/completions", content=content, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 400 and "max_tokens" in answer.json()["error"]["message"]


def test_a_key_may_have_any_letters(backend: TorchBackend) -> None:
    with running(backend_of(backend), replace(SERVING, api_key="schlüssel")) as url:
        for header, status in (("Bearer schlüssel", 200), ("bearer schlüssel", 200), ("schlüssel", 401), ("", 401)):
            given = httpx2.get(f"{url}/models", headers=[(b"Authorization", header.encode())])
            assert given.status_code == status, header


def test_another_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'huge'"):
        client.chat.completions.create(model="huge", messages=ASKED)


@pytest.mark.parametrize(("content", "status"), [
    (b"not json", 400), (b"[1]", 400), (b'{"messages": "' + b"a" * 2000 + b'"}', 413), (b"[" * 5000, 413), (b"[" * 900, 400),
])  # fmt: skip
def test_bodies_that_are_none_are_refused(backend: TorchBackend, content: bytes, status: int) -> None:
    with running(backend_of(backend), replace(SERVING, api_key=None, max_body_bytes=1000)) as url:
        answer = httpx2.post(f"{url}/chat/completions", content=content)
    assert answer.status_code == status and answer.json()["error"]["message"]


class Slow:
    """A backend that says a word each time it is let, and remembers who stopped it."""

    name, context, notes = "slow", None, ()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.let = threading.Semaphore(0)
        self.running = self.most = self.stopped = 0
        self.shut = threading.Event()

    def stream(self, request: Request) -> Iterator[str | Reply]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(3):
                while not self.let.acquire(timeout=0.02) and not self.shut.is_set():
                    yield ""
                yield "a"
            yield Reply("aaa", len(request.tokens), 3, "stop")
        except GeneratorExit:
            self.stopped += 1
            raise
        finally:
            self.running -= 1

    def close(self) -> None:
        self.shut.set()


def backend_of(backend: TorchBackend) -> Slow:
    return Slow(backend.tokenizer)


def wait_for(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_replies_are_made_one_after_another_and_the_line_is_limited(backend: TorchBackend) -> None:
    slow = backend_of(backend)
    body = {"prompt": "a", "max_tokens": 3}
    answers: list[Any] = []
    with running(slow, replace(SERVING, api_key=None, max_waiting=2)) as url:

        def send() -> None:
            answers.append(httpx2.post(f"{url}/completions", json=body, timeout=20))

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) == 1)  # one is being answered, two wait, one goes away
        for _ in range(9):
            slow.let.release()
        for thread in threads:
            thread.join()
    assert answers[0].status_code == 429
    assert [a.json()["choices"][0]["text"] for a in answers[1:]] == ["aaa"] * 3 and slow.most == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_reply(backend: TorchBackend, stream: bool) -> None:
    slow = backend_of(backend)
    with running(slow, replace(SERVING, api_key=None)) as url:
        body = {"prompt": "a", "max_tokens": 3, "stream": stream}
        with (
            pytest.raises(httpx2.ReadTimeout),
            httpx2.stream("POST", f"{url}/completions", json=body, timeout=0.5) as answer,
        ):
            for _ in answer.iter_lines():
                time.sleep(0.01)
                if stream:
                    raise httpx2.ReadTimeout("gone")
        wait_for(lambda: slow.stopped == 1 and slow.running == 0)
        for _ in range(3):
            slow.let.release()
        assert httpx2.post(f"{url}/completions", json={"prompt": "a"}).json()["choices"][0]["text"] == "aaa"


def test_no_reply_begins_while_one_that_nobody_reads_still_computes(backend: TorchBackend) -> None:
    class Stubborn(Slow):
        """Takes its time between two words, and hears of the end only there."""

        def stream(self, request: Request) -> Iterator[str | Reply]:
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                for _ in range(2):
                    yield "a"
                    time.sleep(0.3)
                yield Reply("aa", len(request.tokens), 2, "stop")
            finally:
                self.running -= 1

    slow = Stubborn(backend.tokenizer)
    with running(slow, replace(SERVING, api_key=None)) as url:

        def hang_up() -> None:
            body = {"prompt": "a", "stream": True}
            with httpx2.stream("POST", f"{url}/completions", json=body, timeout=20) as answer:
                next(answer.iter_lines())

        threads = [threading.Thread(target=hang_up) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert httpx2.post(f"{url}/completions", json={"prompt": "a"}, timeout=20).status_code == 200
    assert slow.most == 1


def test_a_client_that_goes_away_while_it_asks_is_no_error(
    backend: TorchBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with running(backend_of(backend), replace(SERVING, api_key=None)) as url:
        port = int(url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as asking:
            asking.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{"pro')
            time.sleep(0.2)
        time.sleep(0.2)
        assert httpx2.get(f"{url}/models").status_code == 200
    assert not [r for r in caplog.records if r.name.startswith("uvicorn") and r.exc_info]


UNFINISHED = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{"pro'


def test_a_request_that_does_not_come_whole_is_ended(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte within the time, and all of them not; others are answered meanwhile."""
    monkeypatch.setattr(serve, "BODY_SECONDS", 1.0)
    with running(backend_of(backend), replace(SERVING, api_key=None)) as url:
        port = int(url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(UNFINISHED)
            slow.settimeout(0.1)
            answer, end = b"", time.monotonic() + 20
            assert httpx2.get(f"{url}/models").status_code == 200
            while time.monotonic() < end:
                with suppress(TimeoutError):
                    if not (piece := slow.recv(4096)):
                        break
                    answer += piece
                with suppress(OSError):  # closed at the other end
                    slow.sendall(b" ")
            else:
                raise AssertionError("the connection was left open")
    assert answer.startswith(b"HTTP/1.1 408") and b"did not come whole within 1.0 seconds" in answer


def test_a_port_in_use_is_refused_before_loading(capsys: pytest.CaptureFixture[str], kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path)
    (base / "tokenizer.json").unlink()  # loading would stumble over it
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", str(base), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["--port", "99999"], "--port"), (["--max_waiting", "0"], "--max_waiting"), (["--host", "203.0.113.7"], "cannot listen"),
    (["--task_type", "embedding"], "not served"), (["--max_body_size", "much"], "not a size"),
])  # fmt: skip
def test_bad_requests_end_with_one_message(
    kit: Kit, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(kit.base("qwen2")), *words]) == 2
    assert said in capsys.readouterr().err


def test_it_listens_on_this_machine_only_unless_told_otherwise() -> None:
    assert Serving().host == "127.0.0.1"
    with pytest.raises(InputError, match="cannot listen"):
        listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(("sign", "hangs"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_it_cleanly(kit: Kit, tmp_path: Path, sign: int, hangs: bool) -> None:
    """Also while a client keeps the rest of its request to itself."""
    base = talking(kit, tmp_path)
    environment = {**os.environ, "INLAY_API_KEY": "k", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "inlay", "serve", "--model", str(base), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "serving qwen2.F32 at http://127.0.0.1:" in line
        url = line.split(" at ")[1].split()[0]
        for _ in range(200):
            try:
                httpx2.get(url.replace("/v1", "/health")).raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(0.05)
        assert httpx2.get(f"{url}/models").status_code == 401
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as hanging:
            if hangs:
                hanging.sendall(UNFINISHED.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer k"))
                time.sleep(0.5)
            process.send_signal(sign)
            assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
