"""Merging against copying and against PEFT, side by side in one run.

    python bench/merge.py                       # 0.5 and 1.5 B in memory-backed files and on disk, 7 B on disk
    python bench/merge.py --sizes 1.5 --where /dev/shm --runs 5
    python bench/merge.py --sizes --moe --where /dev/shm         # experts alone

Bases are Qwen2-shaped, bfloat16, with the shard layout of the real models and scrambled values; adapters
are PEFT's, float32. `--moe` adds one shaped like Qwen3-MoE, a tensor for each of 128 experts in a few layers, with
adapters on attention and on all experts. Every command is a process of its own, start-up included but where it says
otherwise, and the candidates take turns, so that a slow minute of the machine hits all of them. Wall seconds (minimum
and median), bytes a second, peak resident memory, and the ratio of minima to `cp -r`: on a shared machine noise only
adds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inlay.checkpoints.header import layout
from inlay.dtypes import BF16, F32

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5 model: hidden, layers, MLP width, key/value width, vocabulary, tied head, shards.

    With `experts` it is a Qwen3-MoE, whose MLP width is that of one expert.
    """

    hidden: int
    layers: int
    mlp: int
    kv: int
    vocabulary: int
    tied: bool
    shards: int
    experts: int = 0


SHAPES = {
    "0.5": Shape(896, 24, 4864, 128, 151936, True, 1),
    "1.5": Shape(1536, 28, 8960, 256, 151936, True, 1),
    "7": Shape(3584, 28, 18944, 512, 152064, False, 4),
}
MOE = Shape(2048, 3, 768, 512, 151936, True, 2, experts=128)
HEAD = 64  # width of a head of that model
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"all": (*ATTENTION, "gate_proj", "up_proj", "down_proj"), "attention": ATTENTION, "experts": ()}


def linears(s: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of a block, by the end of their name."""
    return {
        "self_attn.q_proj": (s.hidden, s.hidden), "self_attn.k_proj": (s.kv, s.hidden),
        "self_attn.v_proj": (s.kv, s.hidden), "self_attn.o_proj": (s.hidden, s.hidden),
        "mlp.gate_proj": (s.mlp, s.hidden), "mlp.up_proj": (s.mlp, s.hidden), "mlp.down_proj": (s.hidden, s.mlp),
    }  # fmt: skip


def base_tensors(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the real files."""
    yield "model.embed_tokens.weight", (s.vocabulary, s.hidden)
    for layer in range(s.layers):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (s.hidden,)
        yield from (moe_layer if s.experts else dense_layer)(s, name)
        yield name + "post_attention_layernorm.weight", (s.hidden,)
    yield "model.norm.weight", (s.hidden,)
    if not s.tied:
        yield "lm_head.weight", (s.vocabulary, s.hidden)


def dense_layer(s: Shape, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for end, shape in linears(s).items():
        yield f"{name}{end}.weight", shape
        if end[-6:] in ("q_proj", "k_proj", "v_proj"):
            yield f"{name}{end}.bias", shape[:1]


def moe_layer(s: Shape, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for end, shape in linears(s).items():
        if end.startswith("self_attn."):
            yield f"{name}{end}.weight", shape
    yield from ((f"{name}self_attn.{part}_norm.weight", (HEAD,)) for part in "qk")
    yield name + "mlp.gate.weight", (s.experts, s.hidden)
    for expert in range(s.experts):
        for end, shape in linears(s).items():
            if end.startswith("mlp."):
                yield f"{name}mlp.experts.{expert}.{end.removeprefix('mlp.')}.weight", shape


def write_tensors(path: Path, tensors: list[tuple[str, tuple[int, ...]]], dtype: object, scale: float) -> None:
    """A safetensors file of scrambled normal values, written in blocks."""
    header, infos = layout([(k, dtype, shape) for k, shape in tensors], {"format": "pt"})
    generator = np.random.default_rng(abs(hash(path.name)) % 2**32)
    pool = generator.normal(0, scale, 1 << 22).astype(np.float32)
    stored = (pool.view(np.uint32) >> 16).astype(np.uint16) if dtype is BF16 else pool
    with open(path, "wb") as file:
        file.write(header)
        for info in infos:
            left = info.nbytes // stored.itemsize
            while left:
                start = int(generator.integers(0, len(stored) // 2))
                piece = stored[start : start + min(left, len(stored) // 2)]
                file.write(piece.tobytes())
                left -= len(piece)


def make_base(folder: Path, s: Shape) -> Path:
    """A base directory."""
    path = folder / "base"
    path.mkdir(parents=True)
    tensors = list(base_tensors(s))
    count = s.shards
    per_shard = -(-len(tensors) // count)
    weight_map = {}
    for i in range(count):
        part = tensors[i * per_shard : (i + 1) * per_shard]
        name = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        write_tensors(path / name, part, BF16, 0.02)
        weight_map |= {key: name for key, _ in part}
    if count > 1:
        total = sum(2 * int(np.prod(shape)) for _, shape in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "hidden_size": s.hidden, "num_hidden_layers": s.layers,
        "intermediate_size": s.mlp, "num_attention_heads": s.hidden // 128 if s.hidden % 128 == 0 else 14,
        "num_key_value_heads": s.kv // 128 if s.hidden % 128 == 0 else 2, "vocab_size": s.vocabulary,
        "tie_word_embeddings": s.tied, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    if s.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": HEAD,
            "num_attention_heads": s.hidden // HEAD, "num_key_value_heads": s.kv // HEAD, "num_experts": s.experts,
            "moe_intermediate_size": s.mlp, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def make_adapter(folder: Path, s: Shape, rank: int, kind: str) -> Path:
    """A PEFT adapter directory for that base."""
    path = folder / f"adapter-r{rank}-{kind}"
    path.mkdir()
    targets = TARGETS[kind]
    tensors: list[tuple[str, tuple[int, ...]]] = []
    for layer in range(s.layers):
        name = f"base_model.model.model.layers.{layer}."
        for end, (out, in_) in linears(s).items():
            if end.rpartition(".")[2] in targets:
                tensors += [(f"{name}{end}.lora_A.weight", (rank, in_)), (f"{name}{end}.lora_B.weight", (out, rank))]
        if kind == "experts":
            tensors += pairs_of_experts(s, name + "mlp.experts.", rank)
    write_tensors(path / "adapter_model.safetensors", tensors, F32, 0.01)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }
    if kind == "experts":
        config |= {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "peft_version": "0.19.0"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def pairs_of_experts(s: Shape, name: str, rank: int) -> list[tuple[str, tuple[int, ...]]]:
    """What PEFT stores for gate_up_proj (2 · mlp, hidden) and down_proj (hidden, mlp) of all experts."""
    every = s.experts * rank
    return [
        (name + "lora_A.weight", (every, s.mlp)),
        (name + "lora_B.weight", (s.hidden, every)),
        (name + "base_layer.lora_A.weight", (every, s.hidden)),
        (name + "base_layer.lora_B.weight", (2 * s.mlp, every)),
    ]


PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


# The command in a process that has imported everything: planning does that, and is timed again in the export.
STARTED = """
import sys, time
from inlay.cli.main import main
import inlay.run.execute
main(["plan", *sys.argv[1:5]])
started = time.perf_counter()
code = main(["export", *sys.argv[1:]])
print("\\nSECONDS", time.perf_counter() - started)
sys.exit(code)
"""


def commands(base: Path, adapter: Path, out: Path, peft: bool) -> dict[str, list[str]]:
    """What takes turns."""
    asked = ["--model", str(base), "--adapters", str(adapter)]
    asked += ["--merge_lora", "true", "--output_dir", str(out), "--quiet", "--verify"]
    export = [sys.executable, "-m", "inlay", "export", *asked]
    found = {
        "cp -r": ["cp", "-r", str(base), str(out)],
        "inlay, verify none": [*export, "none"],
        "inlay, no start-up": [sys.executable, "-c", STARTED, *asked, "none"],
        "inlay, verify sample": [*export, "sample"],
        "inlay, 64MB": [*export, "none", "--max_memory", "64MB"],
    }
    if peft:
        found["PEFT"] = [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)]
    return found


@dataclass(frozen=True)
class Run:
    seconds: float
    resident: int  # bytes, peak of the process
    user: float
    system: float


# A process inherits the peak memory of the one that forks it, so a small one starts the candidates.
LAUNCHER = """
import os, sys, time
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - started, usage.ru_maxrss * 1024, usage.ru_utime, usage.ru_stime, status)
"""


def run(command: list[str], out: Path, settle: float) -> Run:
    """Wall seconds and peak memory of one process, on a disk that is quiet before."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(settle)
    launched = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True
    )
    seconds, resident, user, system, status = launched.stdout.split()[-5:]
    if status != "0":
        raise RuntimeError(f"{' '.join(command[:6])}: {launched.stderr[-2000:]}")
    own = re.search(r"^SECONDS (\S+)$", launched.stdout, re.MULTILINE)
    return Run(float(own[1] if own else seconds), int(resident), float(user), float(system))


def measure(base: Path, adapter: Path, runs: int, peft: bool, settle: float) -> dict[str, list[Run]]:
    """Every candidate `runs` times, in turns; PEFT, which is slow, at most three times."""
    out = base.parent / "out"
    table = commands(base, adapter, out, peft)
    found: dict[str, list[Run]] = {name: [] for name in table}
    for turn in range(runs):
        for name, command in table.items():
            if name != "PEFT" or turn < 3:
                found[name].append(run(command, out, settle))
    shutil.rmtree(out, ignore_errors=True)
    return found


def report(title: str, nbytes: int, found: dict[str, list[Run]]) -> None:
    floor = min(r.seconds for r in found["cp -r"])
    print(f"\n{title}")
    print(f"{'':<22}{'min s':>8}{'median s':>10}{'GB/s':>7}{'peak MB':>9}{'x cp':>7}{'user':>7}{'sys':>6}")
    for name, runs in found.items():
        seconds = [r.seconds for r in runs]
        best = min(seconds)
        peak = max(r.resident for r in runs) / 1e6
        print(
            f"{name:<22}{best:>8.2f}{statistics.median(seconds):>10.2f}{nbytes / best / 1e9:>7.2f}{peak:>9.0f}"
            f"{best / floor:>7.2f}{min(r.user for r in runs):>7.2f}{min(r.system for r in runs):>6.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["0.5", "1.5", "7"], choices=SHAPES)
    parser.add_argument("--moe", action="store_true", help="measure the base of experts too")
    parser.add_argument("--where", nargs="+", default=["/dev/shm", tempfile.gettempdir()], help="folders to work in")
    parser.add_argument("--adapters", nargs="+", default=["16-all", "64-all", "16-attention"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--settle", type=float, default=0, help="seconds to wait before each run: a host takes freed memory back, and "
        "the next to touch it pays, so that what follows a deletion at once has an advantage"
    )  # fmt: skip
    parser.add_argument("--peft", action="store_true", help="measure PEFT too (up to 1.5 B)")
    args = parser.parse_args()
    cases = [(f"{size} B", SHAPES[size], args.adapters) for size in args.sizes]
    cases += [("experts", MOE, ["16-attention", "16-experts"])] * args.moe
    for where in args.where:
        for title, shape, kinds in cases:
            if title == "7 B" and where.startswith("/dev/shm"):
                continue
            peft = args.peft and title in ("0.5 B", "1.5 B")
            with tempfile.TemporaryDirectory(dir=where, prefix="inlay-bench-") as folder:
                base = make_base(Path(folder), shape)
                nbytes = sum(f.stat().st_size for f in base.iterdir())
                for kind in kinds:
                    rank, targets = kind.split("-")
                    adapter = make_adapter(Path(folder), shape, int(rank), targets)
                    found = measure(base, adapter, args.runs, peft, args.settle)
                    report(f"{title}, {nbytes / 1e9:.2f} GB, rank {rank} {targets}, in {where}", nbytes, found)


if __name__ == "__main__":
    main()
