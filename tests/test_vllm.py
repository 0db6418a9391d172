"""The vLLM backend with a real engine; `make test-vllm` sets up the environment that it needs.

Oracles: transformers and PEFT (`trained.greedy`), and vLLM itself on an exported directory.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; `make test-vllm`", allow_module_level=True)

from inlay.adapters.adapter import read_adapter
from inlay.errors import InputError, PlanError
from inlay.infer.backend import EMBEDDING, LENGTH, STOP, Reply, Request, Sampling, Source, open_backend
from inlay.plan.build import make_plan
from inlay.run.execute import run_plan
from trained import ADAPTER_TEXT, BASE_TEXT, greedy, save_adapter, save_base

pytestmark = pytest.mark.filterwarnings("default")  # vLLM and what it imports warn a lot

SETTINGS: dict[str, Any] = {
    "enforce_eager": True, "max_num_seqs": 8, "gpu_memory_utilization": 0.05, "block_size": 32,
}  # fmt: skip
PROMPTS = ("The sea was", "The ", "The sea")
LONG = 60
START_SECONDS = 400  # for a server, on a busy machine


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # rsLoRA and patterns, so that an engine which takes alpha / r for everything gives itself away
    config = {"use_rslora": True, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"q_proj": 4}}
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "tides", **config)


@pytest.fixture(scope="module")
def exported(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "merged"
    run_plan(make_plan(base, [adapter]), out)
    return out


def source(base: Path, *adapters: Path, **given: Any) -> Source:
    settings = {**SETTINGS, **given.pop("engine", {})}
    read = tuple(map(read_adapter, adapters))
    return Source(base, read, torch_dtype="float32", max_model_len=128, engine=settings, **given)


def ask(backend: Any, prompt: str, **sampling: Any) -> Request:
    return Request(tuple(backend.tokenizer(prompt).input_ids), Sampling(**{"max_new_tokens": LONG, **sampling}))


def written_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what links show does not count."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, int]]:
    """An engine merged while it loaded, and the bytes that loading left on the disk."""
    scratch, weights = tmp_path_factory.mktemp("scratch"), os.path.getsize(base / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TMPDIR", "XDG_CACHE_HOME", "INLAY_CACHE_DIR"):
            patch.setenv(name, str(scratch))
        patch.setattr("tempfile.tempdir", None)
        backend = open_backend("vllm", source(base, adapter, merge=True))
        left = written_bytes(scratch)
    assert weights > 300_000
    yield backend, left
    backend.close()
    gc.collect()  # sockets that vLLM leaves open warn here, where that is no error
    assert not list(scratch.glob("inlay-model-*"))


@pytest.fixture(scope="module")
def live(base: Path, adapter: Path) -> Iterator[Any]:
    backend = open_backend("vllm", source(base, adapter))
    yield backend
    backend.close()
    gc.collect()


def test_merging_while_loading_gives_the_texts_of_an_exported_directory(merged: Any, exported: Path) -> None:
    backend, _ = merged
    texts = [r.text for r in backend.generate([ask(backend, p) for p in PROMPTS])]
    assert texts == [greedy(exported, p, LONG) for p in PROMPTS]
    assert ADAPTER_TEXT.startswith(f"The sea was{texts[0]}")


def test_merging_while_loading_writes_no_merged_copy(merged: Any) -> None:
    _, left = merged
    assert 0 < left < 60_000  # config, tokenizer and headers


def test_vllm_loads_the_same_weights_from_the_cache_of_merged_models(
    base: Path, adapter: Path, merged: Any, tmp_path: Path
) -> None:
    wanted = source(base, adapter, merge=True, engine={"load_format": "safetensors"}, cache_dir=tmp_path / "cache")
    backend = open_backend("vllm", wanted)
    try:
        assert "load_format safetensors reads files" in backend.notes[-1]
        texts = [r.text for r in backend.generate([ask(backend, p) for p in PROMPTS])]
    finally:
        backend.close()
        gc.collect()
    assert texts == [r.text for r in merged[0].generate([ask(merged[0], p) for p in PROMPTS])]
    assert len(list((tmp_path / "cache" / "merged").glob("*/inlay.json"))) == 1


def test_a_live_adapter_gives_the_texts_of_peft(live: Any, base: Path, adapter: Path) -> None:
    texts = [r.text for r in live.generate([ask(live, p) for p in PROMPTS])]
    assert texts == [greedy(base, p, LONG, adapter) for p in PROMPTS]
    assert not BASE_TEXT.startswith(f"The sea was{texts[0]}")


def test_both_backends_give_the_same_texts(merged: Any, live: Any, base: Path, adapter: Path) -> None:
    for engine, merge in ((merged[0], True), (live, False)):
        pt = open_backend("pt", source(base, adapter, merge=merge))
        try:
            asked = [ask(pt, p) for p in PROMPTS]
            assert [r.text for r in engine.generate(asked)] == [r.text for r in pt.generate(asked)]
        finally:
            pt.close()


@pytest.fixture(scope="module")
def moved(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter with modules of a layer that the model does not have."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("moved")
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = {name.replace("layers.1.self_attn", "layers.7.self_attn"): t for name, t in tensors.items()}
    save_file(moved, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


def test_modules_that_vllm_would_leave_out_are_noticed(live: Any, moved: Path) -> None:
    from vllm.lora.request import LoRARequest

    assert live._engine.collective_rpc("inlay_unplaced", args=(1,)) == [[]]
    assert live._engine.add_lora(LoRARequest("moved", 2, str(moved)))  # vLLM says nothing
    [found] = live._engine.collective_rpc("inlay_unplaced", args=(2,))
    assert sorted(found) == [f"model.layers.7.self_attn.{p}_proj" for p in "koqv"]


def test_pieces_of_a_stream_join_to_its_reply(merged: Any) -> None:
    backend, _ = merged
    *pieces, reply = backend.stream(ask(backend, PROMPTS[0], max_new_tokens=20))
    assert isinstance(reply, Reply) and "".join(pieces) == reply.text == ADAPTER_TEXT[11:31]
    assert len(pieces) == 20 and (reply.completion_tokens, reply.finish_reason) == (20, LENGTH)


def test_closing_a_stream_stops_the_work_and_the_next_reply_is_whole(merged: Any) -> None:
    backend, _ = merged
    stream = backend.stream(ask(backend, PROMPTS[0]))
    assert next(stream) == ADAPTER_TEXT[11]
    stream.close()
    assert not backend._engine.has_unfinished_requests()
    assert backend.generate([ask(backend, PROMPTS[0], max_new_tokens=5)])[0].text == ADAPTER_TEXT[11:16]


def test_stop_words_end_a_reply_and_are_not_part_of_it(merged: Any) -> None:
    backend, _ = merged
    [reply] = backend.generate([ask(backend, PROMPTS[0], stop_words=("harbour",))])
    assert reply.text == ADAPTER_TEXT[11 : ADAPTER_TEXT.index("harbour")] and reply.finish_reason == STOP


def test_a_seed_repeats_a_hot_reply_and_another_changes_it(merged: Any) -> None:
    backend, _ = merged

    def hot(seed: int) -> str:
        return backend.generate([ask(backend, "The", temperature=2.0, seed=seed)])[0].text

    assert hot(1) == hot(1) != hot(2)
    assert hot(1) != backend.generate([ask(backend, "The")])[0].text


def test_a_prompt_beyond_the_context_is_refused(merged: Any) -> None:
    backend, _ = merged
    assert backend.context == 128
    with pytest.raises(InputError, match="context is 128"):
        backend.generate([ask(backend, "The sea " * 20)])
    with pytest.raises(InputError, match="num_beams"):
        backend.generate([ask(backend, "The", num_beams=2)])
    with pytest.raises(InputError, match=r"temperature must be in \[0, 2\]"):
        backend.generate([ask(backend, "The", temperature=3.0)])
    with pytest.raises(InputError, match="task_type"):
        backend.vectors([(0, 5)])


def test_ctrl_c_of_the_terminal_does_not_reach_the_engine(merged: Any) -> None:
    """A terminal sends it to the processes of the foreground group, which is this one's."""
    import psutil

    engine = [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]
    assert len(engine) > 1
    assert all(os.getpgid(p.pid) != os.getpgid(0) for p in engine)
    assert "INLAY_VLLM_OWN_GROUP" not in os.environ


PLAIN = """
import sys
from vllm import LLM, SamplingParams

base, adapter, prompt = sys.argv[1:]
if __name__ == "__main__":
    llm = LLM(base, load_format="inlay", model_loader_extra_config={"adapters": [adapter]}, dtype="float32",
              enforce_eager=True, max_model_len=128, max_num_seqs=8, gpu_memory_utilization=0.05)
    print("TEXT", repr(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=40))[0].outputs[0].text))
"""


def test_plain_vllm_finds_the_load_format(base: Path, adapter: Path, exported: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    command = [sys.executable, str(script), str(base), str(adapter), PROMPTS[0]]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert f"TEXT {greedy(exported, PROMPTS[0], 40)!r}" in done.stdout, done.stderr[-2000:]
    took = re.search(r"Loading weights took ([0-9.]+) seconds", done.stdout + done.stderr)  # what vLLM's log says
    assert took and 0 <= float(took[1]) < time.monotonic() - began


def test_embeddings_are_those_of_transformers(base: Path, adapter: Path, exported: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    backend = open_backend("vllm", source(base, adapter, merge=True, task=EMBEDDING))
    try:
        tokens = [tuple(backend.tokenizer(p).input_ids) for p in PROMPTS]
        found = torch.tensor(backend.vectors(tokens))
    finally:
        backend.close()
        gc.collect()
    model = AutoModel.from_pretrained(exported, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(exported)(PROMPTS[0]).input_ids == list(tokens[0])
    with torch.no_grad():
        last = torch.stack([model(torch.tensor([t])).last_hidden_state[0, -1] for t in tokens])
    assert torch.allclose(found, torch.nn.functional.normalize(last, dim=-1), atol=1e-5)


SERVER = """
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import inlay.infer.vllm_serve
from inlay.adapters.adapter import read_adapter
from inlay.infer.backend import Serving, Source, serve_backend

if __name__ == "__main__":
    base, adapter, port, merge, *instead = sys.argv[1:]
    if instead:  # vLLM is given another adapter than the one that was checked
        ready = inlay.infer.vllm_serve.prepared
        @contextmanager
        def other(source):
            with ready(source) as found:
                yield replace(found, lora=Path(instead[0]))
        inlay.infer.vllm_serve.prepared = other
    settings = {"enforce_eager": True, "max_num_seqs": 8, "gpu_memory_utilization": 0.05}
    source = Source(Path(base), (read_adapter(adapter),), merge=merge == "merge", torch_dtype="float32",
                    max_model_len=128, engine=settings)
    serving = Serving(port=int(port), api_key="secret", name="tides", max_body_bytes=2000)
    sys.exit(serve_backend("vllm", source, serving))
"""


def start_server(folder: Path, base: Path, adapter: Path, merge: str, *instead: Path) -> tuple[int, Any]:
    """The port and the process of a server, whose output goes to `log` in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "serve.py").write_text(SERVER)
    with open(folder / "log", "w") as log:
        given = [str(base), str(adapter), str(port), merge, *map(str, instead)]
        return port, subprocess.Popen([sys.executable, str(folder / "serve.py"), *given], stdout=log, stderr=log)


@pytest.fixture(scope="module", params=["merge", "live"])
def server(
    base: Path, adapter: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any]]:
    folder = tmp_path_factory.mktemp("server")
    port, process = start_server(folder, base, adapter, request.param)
    try:
        until = time.monotonic() + START_SECONDS
        while not _up(port):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.terminate()
        process.wait(60)


def _up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def test_an_openai_client_talks_to_the_server_that_serve_hands_over_to(server: Any, exported: Path) -> None:
    from openai import APIStatusError, AuthenticationError, OpenAI

    url, _ = server
    with OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        assert "tides" in [m.id for m in client.models.list()]
        text = greedy(exported, PROMPTS[0], 30)
        done = client.completions.create(model="tides", prompt=PROMPTS[0], max_tokens=30, temperature=0)
        assert done.choices[0].text == text
        messages: Any = [{"role": "user", "content": PROMPTS[0]}]
        chunks = list(
            client.chat.completions.create(model="tides", messages=messages, max_tokens=30, temperature=0, stream=True)
        )
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(pieces) == text and len(pieces) > 10
        with pytest.raises(APIStatusError, match="larger than 2000 bytes") as caught:
            client.completions.create(model="tides", prompt="x" * 3000)
        assert caught.value.status_code == 413
    with OpenAI(base_url=url, api_key="wrong", max_retries=0) as client, pytest.raises(AuthenticationError):
        client.models.list()


def test_the_server_ends_cleanly_with_all_its_processes(server: Any) -> None:
    import psutil

    _, process = server
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 1
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_server_does_not_answer_with_part_of_an_adapter(
    base: Path, adapter: Path, moved: Path, tmp_path: Path
) -> None:
    _, process = start_server(tmp_path, base, adapter, "live", moved)
    try:
        assert process.wait(START_SECONDS) != 0
    finally:
        process.kill()
    assert "vLLM has no place for 4 of its modules" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_paralel_size": 2}, "did you mean --vllm_tensor_parallel_size"),
        ({"model_loader_extra_config": {}}, "inlay sets it"),
        ({"max_num_seqs": "many"}, "vLLM refuses"),
    ],
)
def test_settings_that_vllm_does_not_have_are_refused(base: Path, adapter: Path, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_backend("vllm", source(base, adapter, merge=True, engine=settings))


def test_a_rank_beyond_the_one_that_was_given_is_refused(base: Path, adapter: Path) -> None:
    with pytest.raises(PlanError, match="has rank 8; --vllm_max_lora_rank is 1"):
        open_backend("vllm", source(base, adapter, engine={"max_lora_rank": 1}))


def test_the_model_directory_that_vllm_sees_has_headers_only(base: Path, adapter: Path) -> None:
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    from inlay.infer.folder import model_folder

    with model_folder(make_plan(base, [adapter])) as folder:
        seen = get_safetensors_params_metadata(str(folder))
        assert json.loads((folder / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert seen == get_safetensors_params_metadata(str(base))
