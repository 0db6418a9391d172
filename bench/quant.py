"""Decoding and merging bases in codes, against copying and against the libraries that own the formats.

    python bench/quant.py                                   # four forms, in memory-backed files and on disk
    python bench/quant.py --forms nf4 --where /dev/shm --runs 5
    python bench/quant.py --library-python VENV/bin/python     # with bitsandbytes, gptqmodel, transformers

Bases of 1.5 B parameters: nf4 (double quantisation), GPTQ (4 bits, groups of 128) and FP8 (blocks of 128 x 128) are
shaped like Qwen2.5, their linear layers encoded by inlay's own codecs; MXFP4 is shaped like gpt-oss, two layers of 32
experts, with random codes. One encoded matrix of each shape serves all layers. The adapter is PEFT's, rank 16, on all
linear layers (MXFP4: on the stacks of experts). The candidates take turns, each a process of its own, start-up
included:

    cp                 `cp -r` of the decoded bfloat16 checkpoint, which is what is written by the next ones
    decode             inlay export --bf16 true
    decode, 64MB       the same with --max_memory 64MB
    merge              inlay export --bf16 true with the adapter
    keep_quant         inlay export --keep_quant true --scales fresh: merged and encoded again; a smaller output
    library            the model loaded and dequantised by transformers or gptqmodel on the CPU, and not saved
    tensors            bitsandbytes alone: every tensor read and dequantised to bfloat16, and not saved

The last two run in another interpreter, which has these libraries, and are left out where none is named. Ratios of
minima: `x cp` to the copy of the decoded output; for keep_quant the output is a quarter or a half of that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inlay.checkpoints.decoded import parts_of
from inlay.checkpoints.header import layout
from inlay.codecs.encoding import encode_whole, row_blocks, settled
from inlay.codecs.table import codec
from inlay.dtypes import BF16, DTYPES, F32, DType
from merge import SHAPES, Run, base_tensors, linears, make_adapter, report, run

Parts = Mapping[str, np.ndarray]
Tensor = tuple[str, DType, tuple[int, ...], bytes | Callable[[], bytes]]

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("bnb4", {}),
    "gptq": ("gptq", {}),
    "fp8": ("fp8", {}),
    "mxfp4": ("mxfp4", {}),
}
QWEN = SHAPES["1.5"]
OSS = {"hidden": 2880, "mlp": 2880, "experts": 32, "layers": 2, "heads": 64, "kv_heads": 8, "head": 64, "vocab": 8192}
BLOCK = 256  # rows encoded at once, a multiple of every form's `align` here


def encoded(form: str, shape: tuple[int, int]) -> tuple[dict[str, Any], Parts]:
    """Settings and parts of a weight of normal values in that form."""
    name, options = FORMS[form]
    module = codec(name)
    settings = module.fresh(shape, options)
    weight = np.random.default_rng(math.prod(shape)).normal(0, 0.02, shape).astype(np.float32)
    parts = encode_whole(
        module, settings, lambda: ((first, weight[first:last]) for first, last in row_blocks(shape[0], BLOCK))
    )
    return dict(settled(module, settings, parts)), parts


def scrambled(shape: tuple[int, ...]) -> bytes:
    """Normal values in bfloat16."""
    count = math.prod(shape)
    values = np.random.default_rng(count).normal(0, 0.02, min(count, 1 << 20)).astype(np.float32)
    return np.resize((values.view(np.uint32) >> 16).astype(np.uint16), count).tobytes()


def write(path: Path, tensors: list[Tensor]) -> None:
    header, infos = layout([(key, dtype, shape) for key, dtype, shape, _ in tensors], {"format": "pt"})
    by_key = {key: data for key, *_, data in tensors}
    with open(path, "wb") as file:
        file.write(header)
        for info in infos:  # in an order of the format's own
            data = by_key[info.key]
            file.write(data if isinstance(data, bytes) else data())


def coded(form: str, stem: str, settings: Mapping[str, Any], parts: Parts) -> list[Tensor]:
    """The stored tensors of one weight."""
    module = codec(FORMS[form][0])
    return [
        (stem + parts_of(module)[part], DTYPES[dtype], shape, np.ascontiguousarray(parts[part]).tobytes)
        for part, (dtype, shape) in module.layout(settings).items()
    ]


def make_qwen(path: Path, form: str) -> None:
    """A Qwen2 checkpoint with its linear layers in that form."""
    module = codec(FORMS[form][0])
    made = {shape: encoded(form, shape) for shape in set(linears(QWEN).values())}
    tensors: list[Tensor] = []
    for key, shape in base_tensors(QWEN):
        if len(shape) == 2 and "proj" in key:
            stem = key if not module.NAME_SUFFIX else key.removesuffix(module.NAME_SUFFIX)
            tensors += coded(form, stem, *made[shape])
        else:
            tensors.append((key, BF16, shape, lambda shape=shape: scrambled(shape)))
    write(path / "model.safetensors", tensors)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": QWEN.hidden,
        "num_hidden_layers": QWEN.layers, "intermediate_size": QWEN.mlp, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": QWEN.vocabulary, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
        "quantization_config": module.config(next(iter(made.values()))[0], ["lm_head"]),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=2))


def make_oss(path: Path) -> None:
    """A gpt-oss checkpoint with its experts in MXFP4."""
    h, f, e = OSS["hidden"], OSS["mlp"], OSS["experts"]
    rng = np.random.default_rng(0)
    queries, pairs = OSS["heads"] * OSS["head"], OSS["kv_heads"] * OSS["head"]
    tensors: list[Tensor] = [("model.embed_tokens.weight", BF16, (OSS["vocab"], h), scrambled((OSS["vocab"], h)))]

    def plain(key: str, *shape: int) -> None:
        tensors.append((key, BF16, shape, scrambled(shape)))

    for layer in range(OSS["layers"]):
        name = f"model.layers.{layer}."
        plain(name + "input_layernorm.weight", h)
        plain(name + "post_attention_layernorm.weight", h)
        for part, rows in {"q": queries, "k": pairs, "v": pairs}.items():
            plain(f"{name}self_attn.{part}_proj.weight", rows, h)
            plain(f"{name}self_attn.{part}_proj.bias", rows)
        plain(name + "self_attn.o_proj.weight", h, queries)
        plain(name + "self_attn.o_proj.bias", h)
        plain(name + "self_attn.sinks", OSS["heads"])
        plain(name + "mlp.router.weight", e, h)
        plain(name + "mlp.router.bias", e)
        for stack, rows, columns in (("gate_up_proj", 2 * f, h), ("down_proj", h, f)):
            settings = codec("mxfp4").fresh((e, columns, rows), {})
            parts = {
                "blocks": rng.integers(0, 256, (e, rows, columns // 32, 16), np.uint8),
                "scales": rng.integers(117, 121, (e, rows, columns // 32), np.uint8),
            }
            tensors += coded("mxfp4", f"{name}mlp.experts.{stack}", settings, parts)
            plain(f"{name}mlp.experts.{stack}_bias", e, rows)
    plain("model.norm.weight", h)
    plain("lm_head.weight", OSS["vocab"], h)
    write(path / "model.safetensors", tensors)
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": h, "intermediate_size": f,
        "num_hidden_layers": OSS["layers"], "num_attention_heads": OSS["heads"], "head_dim": OSS["head"],
        "num_key_value_heads": OSS["kv_heads"], "num_local_experts": e, "num_experts_per_tok": 4,
        "vocab_size": OSS["vocab"], "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "layer_types": ["sliding_attention", "full_attention"],
        "quantization_config": codec("mxfp4").config({}, ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                          "model.embed_tokens", "lm_head"]),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=2))


def make_oss_adapter(path: Path, rank: int) -> None:
    """Pairs on both stacks of experts, as PEFT stores `target_parameters`."""
    h, f, every = OSS["hidden"], OSS["mlp"], OSS["experts"] * rank
    rng = np.random.default_rng(1)
    tensors: list[Tensor] = []
    for layer in range(OSS["layers"]):
        name = f"base_model.model.model.layers.{layer}.mlp.experts."
        for part, shape in {
            "lora_A.weight": (every, h), "lora_B.weight": (f, every),
            "base_layer.lora_A.weight": (every, 2 * f), "base_layer.lora_B.weight": (h, every),
        }.items():  # fmt: skip
            tensors.append((name + part, F32, shape, rng.normal(0, 0.01, shape).astype(np.float32).tobytes()))
    path.mkdir()
    write(path / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [], "task_type": "CAUSAL_LM",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "peft_version": "0.19.0",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))


def make(folder: Path, form: str) -> tuple[Path, Path]:
    """Base and adapter."""
    base = folder / "base"
    base.mkdir()
    if form == "mxfp4":
        make_oss(base)
        make_oss_adapter(folder / "adapter", 16)
        return base, folder / "adapter"
    make_qwen(base, form)
    return base, make_adapter(folder, QWEN, 16, "all")


# Loading and dequantising by the owning library. What each needs beside from_pretrained is its own way to floats.
LIBRARY = {
    "nf4": """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu").dequantize()
""",
    "gptq": """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.GPTQ_TORCH)
kept = [m.dequantize_weight().T.to(torch.bfloat16) for m in model.model.modules() if hasattr(m, "dequantize_weight")]
assert len(kept) == 196, len(kept)
""",
    "fp8": """
import sys, torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu",
                                     quantization_config=FineGrainedFP8Config(dequantize=True))
""",
    "mxfp4": """
import sys, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu",
                                     quantization_config=Mxfp4Config(dequantize=True))
""",
}
TENSORS = """
import sys, torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import safe_open
with safe_open(sys.argv[1] + "/model.safetensors", "pt") as file:
    keys, kept = list(file.keys()), []
    for key in keys:
        if key + ".absmax" in keys:
            parts = {k: file.get_tensor(k) for k in keys if k.startswith(key + ".")}
            state = QuantState.from_dict(parts, torch.device("cpu"))
            kept.append(dequantize_4bit(file.get_tensor(key), state))
"""


def commands(form: str, base: Path, adapter: Path, plain: Path, out: Path, library: str | None) -> dict[str, list[str]]:
    """What takes turns."""
    export = [sys.executable, "-m", "inlay", "export", "--model", str(base), "--output_dir", str(out)]
    export += ["--quiet", "--verify", "none"]
    merge = ["--adapters", str(adapter), "--merge_lora", "true"]
    cap = ["--max_memory", "2GB"] if form == "mxfp4" else []  # a stack of 32 experts is encoded as one weight
    found = {
        "cp": ["cp", "-r", str(plain), str(out)],
        "decode": [*export, "--bf16", "true"],
        "decode, 64MB": [*export, "--bf16", "true", "--max_memory", "64MB"],
        "merge": [*export, *merge, "--bf16", "true"],
        "keep_quant": [*export, *merge, "--keep_quant", "true", "--scales", "fresh", "--accept_loss", "true", *cap],
    }
    if library:
        found["library"] = [library, "-c", LIBRARY[form], str(base)]
        if form == "nf4":
            found["tensors"] = [library, "-c", TENSORS, str(base)]
    return found


SLOW = {"library", "tensors"}  # run at most twice


def measure(table: Mapping[str, list[str]], out: Path, runs: int, settle: float) -> dict[str, list[Run]]:
    """Every candidate `runs` times, in turns."""
    found: dict[str, list[Run]] = {}
    for turn in range(runs):
        for name, command in table.items():
            if name in SLOW and turn >= 2:
                continue
            try:
                found.setdefault(name, []).append(run(command, out, settle))
            except RuntimeError as error:
                if name not in SLOW:
                    raise
                print(f"{name} did not run: {str(error)[-1500:]}", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    return {name: runs for name, runs in found.items() if runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--where", nargs="+", default=["/dev/shm", tempfile.gettempdir()], help="folders to work in")
    parser.add_argument("--only", nargs="+", help="candidates; all")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--settle", type=float, default=0, help="seconds to wait before each run; see bench/merge.py")
    parser.add_argument("--library-python", help="an interpreter that has bitsandbytes, gptqmodel and transformers")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    for where in args.where:
        for form in args.forms:
            with tempfile.TemporaryDirectory(dir=where, prefix="inlay-bench-") as folder:
                base, adapter = make(Path(folder), form)
                plain, out = Path(folder, "plain"), Path(folder, "out")
                table = commands(form, base, adapter, plain, out, args.library_python)
                run(table["decode"], out, 0)
                out.rename(plain)
                nbytes = sum(f.stat().st_size for f in plain.iterdir())
                stored = sum(f.stat().st_size for f in base.iterdir())
                if args.only:
                    table = {name: command for name, command in table.items() if name in {"cp", *args.only}}
                found = measure(table, out, args.runs, args.settle)
                renamed = {"cp -r" if name == "cp" else name: runs for name, runs in found.items()}
                report(f"{form}, {stored / 1e9:.2f} -> {nbytes / 1e9:.2f} GB, in {where}", nbytes, renamed)


if __name__ == "__main__":
    main()
