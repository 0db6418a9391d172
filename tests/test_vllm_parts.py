"""What the vLLM backend decides before vLLM comes in: these tests need no vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from build import F32, HIDDEN, PREFIX, VOCAB, adapter_tensors, base_tensors, modules_of, write_adapter, write_model
from inlay.adapters.adapter import read_adapter
from inlay.errors import InputError
from inlay.infer.backend import Serving, Source, open_backend
from inlay.infer.folder import model_folder
from inlay.infer.vllm_loader import Merge, config_problems
from inlay.infer.vllm_lora import EXTENSION, PlacedCheck, largest_rank, left_out, lora_problems
from inlay.infer.vllm_prepare import Prepared, loader_missing
from inlay.infer.vllm_serve import ADAPTER, LIMIT, PROBLEM, START_CHECK, BodyLimit, StartCheck, server_flags
from inlay.infer.vllm_settings import as_flags, check_names, parse_settings
from inlay.plan.build import make_plan
from inlay.run.execute import run_plan

FILES = {"tokenizer.json": '{"version": "1.0"}', "sub/note.txt": "kept"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", base_tensors(dtype=F32), sidecars=FILES)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "tides")


def problems(*adapters: Path, weights: Any = None) -> list[str]:
    return [p.what for p in lora_problems([read_adapter(a) for a in adapters], weights)]


# What vLLM's own LoRA can do


def test_a_plain_lora_is_taken_as_it_is(adapter: Path) -> None:
    assert problems(adapter) == []
    assert problems(adapter, weights=(1.0,)) == []


def _embedding() -> dict[str, np.ndarray]:
    name = f"{PREFIX}model.embed_tokens"
    return {f"{name}.lora_embedding_A": np.ones((4, VOCAB), F32), f"{name}.lora_embedding_B": np.ones((HIDDEN, 4), F32)}


def _magnitudes() -> dict[str, np.ndarray]:
    return {f"{PREFIX}{m}.lora_magnitude_vector": np.ones(out, F32) for m, (out, _) in modules_of().items()}


def _bias() -> dict[str, np.ndarray]:
    return {f"{PREFIX}{m}.lora_B.bias": np.ones(out, F32) for m, (out, _) in modules_of().items()}


@pytest.mark.parametrize(
    ("more", "fields", "reason"),
    [
        (_magnitudes(), {"use_dora": True}, "is DoRA, which vLLM does not compute"),
        (_embedding(), {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, "trains an embedding (model.embed"),
        (_bias(), {"lora_bias": True}, "has a bias on lora_B"),
        (
            {f"{PREFIX}lm_head.weight": np.ones((VOCAB, HIDDEN), F32)},
            {"modules_to_save": ["lm_head"]},
            "has full copies of lm_head.weight",
        ),
        (
            {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, HIDDEN), F32)},
            {"trainable_token_indices": {"embed_tokens": [3]}},
            "trains single tokens",
        ),
    ],
    ids=["dora", "embedding", "lora_bias", "saved", "tokens"],
)
def test_what_vllm_cannot_do_is_refused_with_its_reason(
    tmp_path: Path, more: Mapping[str, np.ndarray], fields: Mapping[str, Any], reason: str
) -> None:
    adapter = write_adapter(tmp_path / "a", tensors={**adapter_tensors(modules_of()), **more}, **fields)
    [problem] = problems(adapter)
    assert problem.startswith(reason)


def test_several_adapters_and_other_methods_and_weights_are_refused(adapter: Path, tmp_path: Path) -> None:
    assert problems(adapter, write_adapter(tmp_path / "b")) == [
        "vLLM applies one adapter to a request, and cannot add several up"
    ]
    assert problems(adapter, weights=(0.5,)) == ["its weight is 0.5, and vLLM knows its own scaling only"]
    vectors = {f"{PREFIX}{m}.ia3_l": np.ones((out, 1), F32) for m, (out, _) in modules_of().items()}
    config = {"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": []}
    other = write_adapter(tmp_path / "ia3", tensors=vectors, config=config)
    assert problems(other) == ["is ia3, and vLLM computes plain LoRA only"]


def test_the_largest_rank_is_that_of_the_tensors(tmp_path: Path) -> None:
    small, large = modules_of(targets=("self_attn.q_proj",)), modules_of(targets=("mlp.down_proj",))
    tensors = {**adapter_tensors(small, r=2), **adapter_tensors(large, r=6)}
    adapter = write_adapter(tmp_path / "a", tensors=tensors, r=2, rank_pattern={"down_proj": 6})
    assert largest_rank(read_adapter(adapter)) == 6


def test_a_module_is_left_out_only_if_no_worker_has_it() -> None:
    assert "tides: vLLM has no place for 1 of its modules, and would leave them out: b." in str(
        left_out("tides", [["a", "b"], ["b", "c"]])
    )
    assert left_out("tides", [["a"], []]) is None is left_out("tides", [])
    module, _, name = EXTENSION.rpartition(".")
    assert getattr(sys.modules[module], name) is PlacedCheck


# What travels to vLLM's workers


def test_a_merge_survives_the_way_to_a_worker(base: Path, adapter: Path) -> None:
    source = Source(base, (read_adapter(adapter),), merge=True, weights=(0.5,), torch_dtype="bfloat16")
    plan = make_plan(base, [adapter], weights=[0.5], torch_dtype="bfloat16")
    merge = Merge.of(source, plan)
    there = Merge.from_json(json.loads(json.dumps(merge.to_json())))
    assert there == merge
    assert there.make_plan("elsewhere").digest == plan.digest


def test_a_worker_refuses_an_adapter_that_changed_after_the_start(base: Path, adapter: Path) -> None:
    merge = Merge.of(Source(base, (read_adapter(adapter),), merge=True), make_plan(base, [adapter]))
    write_adapter(adapter, seed=7)
    with pytest.raises(InputError, match="have changed since the engine was started"):
        merge.make_plan(str(base))


def test_plain_vllm_merges_into_its_own_model_directory(base: Path, adapter: Path) -> None:
    merge = Merge.from_json({"adapters": [str(adapter)]})
    assert merge.make_plan(str(base)).digest == make_plan(base, [adapter]).digest


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "adapters is empty"),
        ({"adapters": "path"}, "adapters must be a list"),
        ({"adapters": ["a"], "scale": 1, "adaptor": 2}, "there are no adaptor, scale; known are adapters"),
        ({"adapters": ["a"], "weights": ["x"]}, "weights must be a list of numbers"),
        ({"adapters": ["a"], "torch_dtype": 16}, "must be texts"),
        ({"adapters": ["a"], "options": []}, "must be objects"),
    ],
)
def test_settings_of_the_loader_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Merge.from_json(config)


def test_options_of_another_version_are_refused(base: Path, adapter: Path) -> None:
    merge = Merge.from_json({"adapters": [str(adapter)], "options": {"densty": 0.5}})
    with pytest.raises(InputError, match="densty"):
        merge.make_plan(str(base))


def test_a_config_that_the_merge_changes_is_noticed(base: Path, tmp_path: Path) -> None:
    rows = np.ones((VOCAB + 2, HIDDEN), F32)
    full = {f"{PREFIX}model.embed_tokens.weight": rows, f"{PREFIX}lm_head.weight": rows}
    tensors = {**adapter_tensors(modules_of()), **full}
    adapter = write_adapter(tmp_path / "grown", tensors=tensors, modules_to_save=["embed_tokens", "lm_head"])
    plan = make_plan(base, [adapter], torch_dtype="bfloat16")
    config = json.loads((base / "config.json").read_text())
    assert config_problems(plan, config) == [f"vocab_size = {VOCAB + 2}"]
    assert config_problems(plan, {**config, "vocab_size": VOCAB + 2}) == []  # a type is vLLM's own to choose


# The model directory without its weights


def test_the_folder_has_what_an_export_has_but_for_the_weights(base: Path, tmp_path: Path) -> None:
    brought = {"tokenizer.json": '{"version": "2.0"}'}
    adapter = write_adapter(tmp_path / "a", sidecars=brought)
    plan = make_plan(base, [adapter], torch_dtype="bfloat16")
    run_plan(plan, tmp_path / "merged")
    with model_folder(plan) as folder:
        for name in ("config.json", "tokenizer.json", "sub/note.txt"):
            assert (folder / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
        assert (folder / "tokenizer.json").is_symlink() and (folder / "tokenizer.json").read_text() == brought[
            "tokenizer.json"
        ]
        merged = (tmp_path / "merged" / "model.safetensors").read_bytes()
        header = (folder / "model.safetensors").read_bytes()
        assert merged.startswith(header) and len(header) == 8 + int.from_bytes(merged[:8], "little")
        with pytest.raises(SafetensorError), safe_open(folder / "model.safetensors", "np"):
            pass
    assert not folder.exists() and (base / "tokenizer.json").exists()


# Settings


def test_flags_and_json_make_engine_arguments() -> None:
    flags = {"tensor_parallel_size": "2", "enforce-eager": True, "dtype": "half", "hf_overrides": '{"a": 1}'}
    assert parse_settings(flags, '{"max_num_seqs": 4}') == {
        "tensor_parallel_size": 2, "enforce_eager": True, "dtype": "half", "hf_overrides": {"a": 1}, "max_num_seqs": 4,
    }  # fmt: skip
    assert parse_settings({"enforce_eager": "False"}) == {"enforce_eager": False}


@pytest.mark.parametrize(
    ("flags", "kwargs", "message"),
    [
        ({}, "{", "is not JSON"),
        ({}, "[1]", "must be a JSON object"),
        ({"seed": "1"}, '{"seed": 2}', "contradicts"),
        ({"enable_lora": True}, None, "decided by --adapters"),
        ({}, '{"model": "x"}', "decided by --model"),
    ],
)
def test_settings_that_contradict_are_refused(flags: dict[str, Any], kwargs: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_settings(flags, kwargs)


def test_an_unknown_setting_names_the_nearest() -> None:
    check_names({"seed": 1}, ["seed"])
    with pytest.raises(InputError, match="did you mean --vllm_max_num_seqs"):
        check_names({"max_num_seq": 1}, ["seed", "max_num_seqs"])


def test_engine_arguments_become_flags_of_the_server() -> None:
    args = {"model": "m", "enforce_eager": True, "enable_prefix_caching": False, "seed": None, "port": 8000,
            "model_loader_extra_config": {"adapters": ["a b"]}, "lora_target_modules": ["q", "v"]}  # fmt: skip
    assert as_flags(args) == [
        "--model=m", "--enforce-eager", "--no-enable-prefix-caching", "--port=8000", "--model-loader-extra-config",
        '{"adapters": ["a b"]}', "--lora-target-modules", "q", "v",
    ]  # fmt: skip


def test_the_server_calls_a_live_adapter_by_the_name_of_the_model() -> None:
    serving = Serving(name="tides", api_key="secret", max_waiting=7)
    merged = server_flags(Prepared({"model": "m"}), serving)
    assert "--served-model-name=tides" in merged and "--max-num-queued-reqs=7" in merged
    live = server_flags(Prepared({"model": "m", "enable_lora": True}, Path("/a")), serving)
    assert "--served-model-name=tides-base" in live and live[-2:] == ["--lora-modules", "tides=/a"]
    assert START_CHECK in live and START_CHECK not in merged  # a live adapter is checked before the server answers
    assert not any("secret" in flag for flag in merged + live)


@pytest.mark.parametrize("missed", [[], ["model.layers.7.mlp.up_proj"]])
def test_a_server_does_not_start_with_an_adapter_that_is_taken_in_part(
    missed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADAPTER, "tides")
    monkeypatch.setenv(PROBLEM, str(tmp_path / "problem"))
    started: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope["type"])

    async def rpc(method: str, args: tuple[int]) -> list[list[str]]:
        assert (method, args) == ("inlay_unplaced", (1,))
        return [missed]

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    server = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(collective_rpc=rpc)))
    asyncio.run(StartCheck(app)({"type": "lifespan", "app": server}, receive, send))
    assert started == ([] if missed else ["lifespan"])
    assert sent == (["lifespan.startup.failed"] if missed else [])
    assert (tmp_path / "problem").exists() == bool(missed)
    if missed:
        assert missed[0] in (tmp_path / "problem").read_text()


# What speaks against the loader


def test_the_loader_needs_its_entry_point_and_files_need_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        name, value = "inlay", "inlay.infer.vllm_loader:register"

    found: list[Any] = [Plugin]
    monkeypatch.setattr("inlay.infer.vllm_prepare.entry_points", lambda group: found if "general" in group else [])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert loader_missing({}) is None
    assert "load_format auto reads files" in str(loader_missing({"load_format": "auto"}))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "leaves out" in str(loader_missing({}))
    monkeypatch.setenv("VLLM_PLUGINS", "other,inlay")
    assert loader_missing({}) is None
    found.clear()
    assert "not installed as a package" in str(loader_missing({}))


def test_a_missing_vllm_names_the_extra(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for merge in (True, False):
        with pytest.raises(InputError, match=r"pip install 'inlay\[vllm\]'"):
            open_backend("vllm", replace(Source(base, (read_adapter(adapter),)), merge=merge))


# The limit on bodies


def _call(chunks: list[bytes], limit: int, length: int | None) -> tuple[bytes | None, int | None]:
    """What the application behind the limit got, and the status of a refusal."""
    os.environ[LIMIT] = str(limit)
    got: list[bytes] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        got.append(body)

    messages = [{"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)} for i, c in enumerate(chunks)]
    headers = [] if length is None else [(b"content-length", str(length).encode())]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(BodyLimit(app)({"type": "http", "headers": headers}, receive, send))
    del os.environ[LIMIT]
    return (got[0] if got else None), (sent[0]["status"] if sent else None)


def test_a_body_within_the_limit_passes_whole_and_a_larger_one_gets_413() -> None:
    assert _call([b"abc", b"de"], 5, None) == (b"abcde", None)
    assert _call([b"abcde"], 5, 5) == (b"abcde", None)
    assert _call([b"abc", b"def"], 5, None) == (None, 413)
    assert _call([b"abcdef"], 5, 6) == (None, 413)
    assert _call([b"abc"], 5, 10**9) == (None, 413)
