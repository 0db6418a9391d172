"""A cap on memory that holds, and bytes that do not depend on it: tiles, threads, transposed and embedded weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from build import (
    BF16,
    CONFIG,
    F16,
    F32,
    PREFIX,
    listing,
    normal,
    raw_file,
    read_tensors,
    write_adapter,
    write_json,
    write_model,
)
from inlay import make_plan, merged_tensors, run_plan, verify
from inlay.errors import PlanError
from inlay.plan import memory
from inlay.plan.types import Plan
from inlay.records import fingerprint

# ─── the same bytes ──────────────────────────────────────────────────────────────────────────────────────────────────

GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 64, "tie_word_embeddings": True}
ROWS, COLS, RANK = 96, 80, 4


def pairs(rng: np.random.Generator, module: str, out: int, inputs: int, dtype: np.dtype = F32) -> dict[str, np.ndarray]:
    return {
        f"{PREFIX}{module}.lora_A.weight": normal(rng, (RANK, inputs), dtype),
        f"{PREFIX}{module}.lora_B.weight": normal(rng, (out, RANK), dtype),
    }


def linear(place: Path, dtype: np.dtype) -> Plan:
    """Linears with a bias, and one that is only copied."""
    rng = np.random.default_rng(0)
    base = write_model(place / "base", {
        "model.a.weight": normal(rng, (ROWS, COLS), dtype), "model.a.bias": normal(rng, (ROWS,), dtype),
        "model.b.weight": normal(rng, (COLS, ROWS), dtype), "model.c.weight": normal(rng, (ROWS, COLS), dtype),
    })  # fmt: skip
    tensors = pairs(rng, "model.a", ROWS, COLS) | pairs(rng, "model.b", COLS, ROWS, BF16)
    tensors[f"{PREFIX}model.a.lora_B.bias"] = normal(rng, (ROWS,), F32)
    return make_plan(base, [write_adapter(place / "adapter", tensors=tensors, lora_bias=True)])


def several(place: Path, dtype: np.dtype) -> Plan:
    rng = np.random.default_rng(1)
    base = write_model(place / "base", {"model.a.weight": normal(rng, (ROWS, COLS), dtype)})
    adapters = [
        write_adapter(place / f"a{i}", tensors=pairs(rng, "model.a", ROWS, COLS), alpha=3 + i) for i in range(3)
    ]
    return make_plan(base, adapters)


def dora(place: Path, dtype: np.dtype) -> Plan:
    rng = np.random.default_rng(2)
    base = write_model(place / "base", {"model.a.weight": normal(rng, (ROWS, COLS), dtype)})
    tensors = pairs(rng, "model.a", ROWS, COLS)
    tensors[f"{PREFIX}model.a.lora_magnitude_vector"] = np.abs(normal(rng, (ROWS,), F32)) + 1
    return make_plan(base, [write_adapter(place / "adapter", tensors=tensors, use_dora=True)])


def transposed(place: Path, dtype: np.dtype) -> Plan:
    """GPT-2's way: weights lie (in, out)."""
    rng = np.random.default_rng(3)
    base = write_model(place / "base", {
        "transformer.h.0.attn.c_attn.weight": normal(rng, (COLS, ROWS), dtype),
        "transformer.h.0.attn.c_proj.weight": normal(rng, (COLS, COLS), dtype),
        "transformer.wte.weight": normal(rng, (64, COLS), dtype),
    }, config=GPT2)  # fmt: skip
    tensors = pairs(rng, "transformer.h.0.attn.c_attn", ROWS, COLS) | pairs(
        rng, "transformer.h.0.attn.c_proj", COLS, COLS
    )
    return make_plan(base, [write_adapter(place / "adapter", tensors=tensors, fan_in_fan_out=True)])


def transposed_dora(place: Path, dtype: np.dtype) -> Plan:
    """The length of an output runs along the rows that tiles cut."""
    rng = np.random.default_rng(4)
    base = write_model(place / "base", {
        "transformer.h.0.attn.c_attn.weight": normal(rng, (COLS, ROWS), dtype),
        "transformer.wte.weight": normal(rng, (64, COLS), dtype),
    }, config=GPT2)  # fmt: skip
    tensors = pairs(rng, "transformer.h.0.attn.c_attn", ROWS, COLS)
    tensors[f"{PREFIX}transformer.h.0.attn.c_attn.lora_magnitude_vector"] = np.abs(normal(rng, (ROWS,), F32)) + 1
    return make_plan(base, [write_adapter(place / "adapter", tensors=tensors, use_dora=True, fan_in_fan_out=True)])


def embedding(place: Path, dtype: np.dtype) -> Plan:
    rng = np.random.default_rng(5)
    base = write_model(place / "base", {
        "model.embed_tokens.weight": normal(rng, (ROWS, COLS), dtype), "lm_head.weight": normal(rng, (ROWS, COLS), dtype),
    }, config={**CONFIG, "vocab_size": ROWS})  # fmt: skip
    tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": normal(rng, (RANK, ROWS), F32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": normal(rng, (COLS, RANK), F32),
    }
    return make_plan(base, [write_adapter(place / "adapter", tensors=tensors)])


def embedding_dora(place: Path, dtype: np.dtype) -> Plan:
    rng = np.random.default_rng(6)
    base = write_model(place / "base", {
        "model.embed_tokens.weight": normal(rng, (ROWS, COLS), dtype), "lm_head.weight": normal(rng, (ROWS, COLS), dtype),
    }, config={**CONFIG, "vocab_size": ROWS})  # fmt: skip
    tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": normal(rng, (RANK, ROWS), F32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": normal(rng, (COLS, RANK), F32),
        f"{PREFIX}model.embed_tokens.lora_magnitude_vector": np.abs(normal(rng, (COLS,), F32)) + 1,
    }
    return make_plan(base, [write_adapter(place / "adapter", tensors=tensors, use_dora=True)])


def token_rows(place: Path, dtype: np.dtype) -> Plan:
    """Rows that are replaced, and rows that are new, under a LoRA on the head."""
    rng = np.random.default_rng(7)
    base = write_model(place / "base", {
        "model.embed_tokens.weight": normal(rng, (ROWS, COLS), dtype),
        "model.a.weight": normal(rng, (ROWS, COLS), dtype),
    }, config={**CONFIG, "architectures": ["LlamaModel"], "vocab_size": ROWS})  # fmt: skip
    tensors = pairs(rng, "model.a", ROWS, COLS)
    tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = normal(rng, (4, COLS), F32)
    indices = {"embed_tokens": [0, 41, ROWS, ROWS + 1]}
    return make_plan(base, [write_adapter(place / "adapter", tensors=tensors, trainable_token_indices=indices)])


def converted(place: Path, dtype: np.dtype) -> Plan:
    """Another type for all, touched or not."""
    linear(place, dtype)
    to = {BF16: "float32", F16: "bfloat16", F32: "float16"}[dtype]
    return make_plan(place / "base", [place / "adapter"], torch_dtype=to)


BUILDS: dict[str, Callable[[Path, np.dtype], Plan]] = {
    "linear": linear, "several": several, "dora": dora, "transposed": transposed, "transposed dora": transposed_dora,
    "embedding": embedding, "embedding dora": embedding_dora, "token rows": token_rows, "converted": converted,
}  # fmt: skip
EVERY_BUILD = pytest.mark.parametrize("build", BUILDS)
EVERY_TYPE = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)


def written(plan: Plan, out: Path, **how: Any) -> dict[str, bytes | None]:
    shutil.rmtree(out, ignore_errors=True)
    run_plan(plan, out, **how)
    return listing(out)


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@EVERY_BUILD
@EVERY_TYPE
def test_the_bytes_do_not_depend_on_tiles_or_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str, dtype: np.dtype
) -> None:
    """From one row at a time to all at once, by one thread or eight."""
    plan = BUILDS[build](tmp_path, dtype)
    wanted = written(plan, tmp_path / "out", workers=1)
    for nbytes in (1, 700, 5000, 60_000, 1 << 30):
        monkeypatch.setattr(memory, "KERNEL_TILE_BYTES", nbytes)
        monkeypatch.setattr(memory, "FLOAT64_TILE_BYTES", nbytes)
        for workers in (1, 8):
            assert written(plan, tmp_path / "out", workers=workers) == wanted, (nbytes, workers)


@EVERY_BUILD
@EVERY_TYPE
def test_the_bytes_do_not_depend_on_the_size_of_digest_leaves_or_the_cap(
    tmp_path: Path, build: str, dtype: np.dtype
) -> None:
    plan = BUILDS[build](tmp_path, dtype)
    wanted = written(plan, tmp_path / "out", workers=1)
    for max_memory in (60_000, 90_000, 400_000):
        assert written(plan, tmp_path / "out", max_memory=max_memory, workers=3) == wanted, max_memory


@EVERY_BUILD
@EVERY_TYPE
def test_the_kernel_and_float64_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str, dtype: np.dtype
) -> None:
    plan = BUILDS[build](tmp_path, dtype)
    wanted = written(plan, tmp_path / "out")
    monkeypatch.setenv("INLAY_KERNEL", "0")
    assert written(plan, tmp_path / "out") == wanted


@EVERY_BUILD
@EVERY_TYPE
def test_the_result_verifies_by_other_code(tmp_path: Path, build: str, dtype: np.dtype) -> None:
    plan = BUILDS[build](tmp_path, dtype)
    run_plan(plan, tmp_path / "out")
    adapters = [tmp_path / "adapter"] if (tmp_path / "adapter").exists() else [tmp_path / f"a{i}" for i in range(3)]
    assert verify(tmp_path / "base", adapters, tmp_path / "out").exact


@EVERY_BUILD
def test_the_iterator_of_tensors_gives_the_bytes_of_the_files(tmp_path: Path, build: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    plan = BUILDS[build](tmp_path, BF16)
    run_plan(plan, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in merged_tensors(plan):
        assert tensor.dtype == stored[key].dtype
        assert torch.equal(tensor.view(torch.uint8), stored.pop(key).view(torch.uint8)), key
    assert not stored


@EVERY_BUILD
@pytest.mark.parametrize("leaf_nbytes", [64, 1000, 1 << 22])
def test_the_manifest_holds_the_digest_of_each_changed_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str, leaf_nbytes: int
) -> None:
    """Whole rows of about a leaf's size are digested one by one, then their digests together."""
    monkeypatch.setattr(fingerprint, "LEAF_BYTES", leaf_nbytes)
    plan = BUILDS[build](tmp_path, BF16)
    run_plan(plan, tmp_path / "out", workers=4)
    manifest = json.loads((tmp_path / "out" / "inlay.json").read_text())
    assert manifest["tensors"].keys() == {key for key, entry in plan.entries.items() if not entry.copied}
    for key, (_, shape, data) in read_tensors(tmp_path / "out" / "model.safetensors").items():
        rows = shape[0] if len(shape) > 1 else 1
        width = len(data) // rows
        step = max(1, leaf_nbytes // width) * width
        leaves = [f"blake3:{blake3(data[at : at + step]).hexdigest()}" for at in range(0, len(data), step)]
        wanted = f"blake3:{blake3(chr(10).join(leaves).encode()).hexdigest()}"
        assert manifest["tensors"].get(key, wanted) == wanted, key


# ─── the cap in the plan ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cap_below_one_row_is_refused_by_tensor_with_both_numbers(tmp_path: Path) -> None:
    linear(tmp_path, BF16)
    with pytest.raises(PlanError, match=r"model\.a\.weight.*bytes.*max_memory allows 100"):
        make_plan(tmp_path / "base", [tmp_path / "adapter"], max_memory=100)


def test_the_memory_that_a_plan_names_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Ten times the rows, the same memory."""
    found = []
    for rows in (20_000, 200_000):
        place = tmp_path / str(rows)
        entries = {"model.a.weight": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}}
        write_json(place / "base" / "config.json", CONFIG)
        with open(place / "base" / "model.safetensors", "wb") as file:
            file.write(raw_file(entries))
            file.truncate(len(raw_file(entries)) + rows * 2048)
        rng = np.random.default_rng(0)
        adapter = write_adapter(place / "adapter", tensors=pairs(rng, "model.a", rows, 1024))
        found.append(make_plan(place / "base", [adapter]).cost.memory)
    assert found[0] == found[1] < 64 << 20


# ─── the cap in fact ─────────────────────────────────────────────────────────────────────────────────────────────────

PEAK = """
import json, resource, sys
from inlay.cli.main import main
import inlay.cli.export, inlay.run.execute, inlay.verification.verify, tqdm, regex  # what every export loads

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
code = main(sys.argv[1:])
print(json.dumps({"code": code, "before": before, "after": peak()}))
"""


def grown(*words: str, **env: str) -> int:
    """Bytes by which a merge in a fresh process grew beyond the interpreter with its modules."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr[-2000:]
    return int(found["after"]) - int(found["before"])


def synthetic(path: Path, entries: dict[str, tuple[str, list[int]]], seed: int = 0) -> Path:
    """A large file of random, finite values, written in pieces."""
    at, header = 0, {}
    sizes = {"BF16": 2, "F16": 2, "F32": 4}
    for key, (dtype, shape) in entries.items():
        nbytes = int(np.prod(shape)) * sizes[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    piece = 8 << 20
    with open(path, "wb") as file:
        file.write(raw_file(header))
        for key, (dtype, shape) in entries.items():
            left = int(np.prod(shape)) * sizes[dtype]
            block = normal(rng, (piece // sizes[dtype],), {"BF16": BF16, "F16": F16, "F32": F32}[dtype], 0.02).tobytes()
            while left:
                file.write(block[: min(left, piece)])
                left -= min(left, piece)
            assert key in header
    return path


def large(
    place: Path, shapes: dict[str, tuple[str, list[int]]], targets: list[str], r: int = 8, **fields: Any
) -> list[str]:
    synthetic(place / "base" / "model.safetensors", shapes)
    write_json(place / "base" / "config.json", CONFIG)
    rng = np.random.default_rng(3)
    tensors = {}
    for module in targets:
        out, inputs = shapes[f"{module}.weight"][1]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = normal(rng, (r, inputs), F32, 0.02)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = normal(rng, (out, r), F32, 0.02)
    if fields.get("use_dora"):
        for module in targets:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = np.ones(shapes[f"{module}.weight"][1][0], np.float32)
    write_adapter(place / "adapter", r=r, tensors=tensors, **fields)
    return ["export", "--model", str(place / "base"), "--adapters", str(place / "adapter"), "--merge_lora", "--quiet",
            "--output_dir", str(place / "out")]  # fmt: skip


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Path]:
    """A place for gigabytes, cleared afterwards."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


BESIDE = 24 << 20  # stacks of threads, allocator arenas, the plan itself


@pytest.mark.parametrize("check", ["none", "sample"])
@pytest.mark.parametrize("kind", ["lora", "dora", "float32"])
def test_a_tensor_larger_than_the_cap_is_merged_below_it(big: Path, kind: str, check: str) -> None:
    """100 MB in one tensor under a cap of 16 MB."""
    shapes = {
        "model.a.weight": ("F32" if kind == "float32" else "BF16", [24_000, 2048]),
        "model.b.weight": ("BF16", [64, 64]),
    }
    words = large(big, shapes, ["model.a"], use_dora=kind == "dora")
    assert grown(*words, "--max_memory", "16MB", "--verify", check) < (16 << 20) + BESIDE


def test_checking_every_element_needs_no_memory_for_the_tensor(big: Path) -> None:
    words = large(big, {"model.a.weight": ("BF16", [24_000, 2048])}, ["model.a"])
    assert grown(*words, "--max_memory", "16MB", "--verify", "full") < 200 << 20


def test_a_conversion_of_a_large_vector_stays_below_the_cap(big: Path) -> None:
    """One row of 100 MB, as flat parameters have it."""
    words = large(big, {"flat": ("BF16", [50_000_000]), "model.a.weight": ("BF16", [256, 256])}, ["model.a"])
    assert grown(*words, "--max_memory", "16MB", "--torch_dtype", "float32") < (16 << 20) + BESIDE


def test_a_large_sidecar_stays_below_the_cap(big: Path) -> None:
    """Optimizer states and indexes of vectors lie beside models, gigabytes of them."""
    words = large(big, {"model.a.weight": ("BF16", [256, 256])}, ["model.a"])
    with open(big / "base" / "index.faiss", "wb") as file:
        file.truncate(150 << 20)
    assert grown(*words, "--max_memory", "16MB", "--verify", "sample") < (16 << 20) + BESIDE


def test_going_on_after_an_interruption_stays_below_the_cap(big: Path) -> None:
    """What is staged is compared before it is taken up, a flat tensor of one row too."""
    words = large(big, {"model.a.weight": ("BF16", [256, 256]), "flat": ("BF16", [50_000_000])}, ["model.a"])
    code = (
        "import sys, inlay.run.execute as e\n"
        "def stop(*a): raise KeyboardInterrupt\n"
        "e.write_manifest = stop\n"
        "from inlay.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words, "--max_memory", "16MB"], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert grown(*words, "--max_memory", "16MB", "--verify", "none") < (16 << 20) + BESIDE


def test_eight_threads_stay_below_the_cap_together(big: Path) -> None:
    words = large(big, {"model.a.weight": ("BF16", [24_000, 2048])}, ["model.a"])
    assert grown(*words, "--max_memory", "16MB", "--num_threads", "8", "--verify", "none") < (16 << 20) + BESIDE


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["1", "0"], ids=["kernel", "float64"])
def test_two_gigabytes_are_merged_in_128_megabytes(big: Path, kernel: str) -> None:
    shapes = {f"model.layers.{i}.proj.weight": ("BF16", [8192, 8192]) for i in range(14)}
    shapes["model.embed_tokens.weight"] = ("BF16", [32_000, 4096])
    words = large(big, shapes, [f"model.layers.{i}.proj" for i in range(14)], r=16)
    assert (big / "base" / "model.safetensors").stat().st_size > 2_000_000_000
    peak = grown(*words, "--max_memory", "128MB", INLAY_KERNEL=kernel)
    assert peak < 128_000_000 + BESIDE
    assert (big / "out" / "inlay.json").is_file()


@pytest.mark.slow
def test_an_embedding_of_a_gigabyte_in_one_tensor_is_merged_in_64_megabytes(big: Path) -> None:
    """256 000 tokens; its factor A runs along the vocabulary."""
    rows, cols, r = 256_000, 2048, 8
    synthetic(big / "base" / "model.safetensors", {
        "model.embed_tokens.weight": ("BF16", [rows, cols]), "lm_head.weight": ("BF16", [64, cols])
    })  # fmt: skip
    write_json(big / "base" / "config.json", {**CONFIG, "vocab_size": rows})
    rng = np.random.default_rng(0)
    write_adapter(big / "adapter", r=r, tensors={
        f"{PREFIX}model.embed_tokens.lora_embedding_A": normal(rng, (r, rows), F32, 0.02),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": normal(rng, (cols, r), F32, 0.02),
    })  # fmt: skip
    words = ["export", "--model", str(big / "base"), "--adapters", str(big / "adapter"), "--merge_lora", "--quiet",
             "--output_dir", str(big / "out"), "--max_memory", "64MB"]  # fmt: skip
    assert grown(*words) < 64_000_000 + BESIDE


def test_one_of_many_interleaved_matrices_is_read_in_pieces(tmp_path: Path) -> None:
    """A factor too large to be kept apart (64 MiB, or a quarter of the cap) was read whole, by each thread."""
    from inlay.checkpoints import spans
    from inlay.dtypes import F32
    from inlay.plan.types import Part

    out, rank, experts = 4096, 4, 64
    values = np.arange(out * rank * experts, dtype="<f4")
    (tmp_path / "b").write_bytes(values.tobytes())
    ref = spans.TensorRef("base", "b", "b", F32, (out, rank * experts), 0)
    part = Part(ref, (out, rank), 5, (rank * experts, experts))
    largest = 0

    class Reader(spans.SpanReader):
        def into(self, ref: spans.TensorRef, offset: int, out: np.ndarray) -> None:
            nonlocal largest
            largest = max(largest, out.nbytes)
            super().into(ref, offset, out)

    wanted = values.reshape(out, rank, experts)[:, :, 5]
    with Reader({"base": tmp_path}, cache_bytes=0) as reader:
        for view in (part, part.turned, part.rows(7, 4001), part.columns(1, 3), part.rows(3, 3)):
            found = reader.view(view.ref, view.start, view.shape, view.strides)
            first = (view.start - 5) // experts
            row, col = divmod(first, rank)
            turned = view.strides[0] < view.strides[1]
            shape = view.shape[::-1] if turned else view.shape
            expected = wanted[row : row + shape[0], col : col + shape[1]]
            assert np.array_equal(found.T if turned else found, expected)
    assert largest <= spans.CHUNK_BYTES
