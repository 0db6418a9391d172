"""Tiny checkpoints and PEFT adapters as files, written by `safetensors` and `json`, never by `inlay`.

Arrays are numpy's, bfloat16 and 8-bit floats through `ml_dtypes`. Keys and configs are those of a two-layer
Llama, or of a GPT-2 where weights lie (in, out). No model class is needed, so building takes a millisecond.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from safetensors import TensorSpec, deserialize, serialize_file

settings.register_profile("files", deadline=None)  # a test that writes files takes as long as the disk does
settings.load_profile("files")

BF16, F16, F32, F64 = np.dtype(ml_dtypes.bfloat16), np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8")
PREFIX = "base_model.model."
HIDDEN, INNER, VOCAB = 16, 24, 32
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

Arrays = Mapping[str, np.ndarray]


def write_tensors(path: Path, tensors: Arrays, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file by the format's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in tensors.items()}
    specs = {
        key: TensorSpec(dtype=a.dtype.name, shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes)
        for key, a in kept.items()
    }
    serialize_file(specs, path, metadata=dict({"format": "pt"} if metadata is None else metadata))
    return path


def read_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Key -> dtype name, shape and bytes, by the format's own reader."""
    return {key: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for key, v in deserialize(path.read_bytes())}


_NUMPY = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}


def read_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Float tensors of all safetensors files at the top of a directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        for key, (dtype, shape, data) in read_tensors(path).items():
            found[key] = np.frombuffer(data, _NUMPY.get(dtype, np.dtype(np.uint8))).reshape(
                shape if dtype in _NUMPY else -1
            )
    return found


def raw_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Bytes of a safetensors file with any header at all: JSON values, text or bytes."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=2) + "\n", "utf-8")
    return path


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype, size: float = 0.3) -> np.ndarray:
    return (rng.standard_normal(tuple(shape)) * size).astype(np.float32).astype(dtype)


def base_tensors(
    *, layers: int = 2, dtype: np.dtype = BF16, seed: int = 0, tied: bool = False, linears: Mapping[str, Any] = LINEARS
) -> dict[str, np.ndarray]:
    """Weights of a small Llama."""
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": normal(rng, (VOCAB, HIDDEN), dtype)}
    for i in range(layers):
        for module, shape in linears.items():
            tensors[f"model.layers.{i}.{module}.weight"] = normal(rng, shape, dtype)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = normal(rng, (HIDDEN,), dtype)
    tensors["model.norm.weight"] = normal(rng, (HIDDEN,), dtype)
    if not tied:
        tensors["lm_head.weight"] = normal(rng, (VOCAB, HIDDEN), dtype)
    return tensors


def write_model(
    directory: Path,
    tensors: Arrays,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | str | None = None,
    sidecars: Mapping[str, str | bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A model directory with its weights in one file, or in `shards` files and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", CONFIG if config is None else config)
    for name, content in (sidecars or {}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if shards == 1:
        write_tensors(directory / "model.safetensors", tensors, metadata)
        return directory
    keys = list(tensors)
    step = math.ceil(len(keys) / shards)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in keys[i * step : (i + 1) * step]}
        write_tensors(directory / name, part, metadata)
        weight_map |= dict.fromkeys(part, name)
    total = sum(a.nbytes for a in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    return directory


def write_base(directory: Path, *, shards: int = 1, **more: Any) -> Path:
    """The small Llama as a directory; `config`, `sidecars` and `metadata` as in `write_model`, the rest to its weights."""
    kept = {name: more.pop(name) for name in ("config", "sidecars", "metadata") if name in more}
    return write_model(directory, base_tensors(**more), shards=shards, **kept)


def adapter_config(r: int = 4, alpha: float = 8, **more: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **more,
    }


def adapter_tensors(
    modules: Mapping[str, tuple[int, int]], *, r: int = 4, dtype: np.dtype = F32, seed: int = 1, size: float = 0.1
) -> dict[str, np.ndarray]:
    """A pair for each module -> (out, in), under PEFT's names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (out, inputs) in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = normal(rng, (r, inputs), dtype, size)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = normal(rng, (out, r), dtype, size)
    return tensors


def modules_of(
    layers: int = 2, targets: Iterable[str] = ("self_attn.q_proj", "mlp.down_proj")
) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{i}.{target}": LINEARS[target] for i in range(layers) for target in targets}


def write_adapter(
    directory: Path,
    modules: Mapping[str, tuple[int, int]] | None = None,
    *,
    r: int = 4,
    alpha: float = 8,
    dtype: np.dtype = F32,
    seed: int = 1,
    size: float = 0.1,
    tensors: Arrays | None = None,
    config: Mapping[str, Any] | str | None = None,
    sidecars: Mapping[str, str | bytes] | None = None,
    **fields: Any,
) -> Path:
    """An adapter directory for the small Llama; `fields` go into its config."""
    modules = modules_of() if modules is None else modules
    if tensors is None:
        tensors = adapter_tensors(modules, r=r, dtype=dtype, seed=seed, size=size)
    write_tensors(directory / "adapter_model.safetensors", tensors)
    if config is None:
        targets = sorted({module.rpartition(".")[2] for module in modules})
        config = adapter_config(r, alpha, **{"target_modules": targets, **fields})
    write_json(directory / "adapter_config.json", config)
    for name, content in (sidecars or {}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


def listing(directory: Path) -> dict[str, bytes | None]:
    """Every path below, hidden ones too, with the content of files: what a failed run must not change."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def with_memory(nbytes: int) -> Iterator[None]:
    """MemoryError instead of a machine that runs out of memory: the process may grow by `nbytes`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# format: bits of the fraction, smallest and largest exponent
_FORMATS = {BF16: (7, -126, 127), F16: (10, -14, 15), F32: (23, -126, 127)}


def round_exact(x: Fraction, dtype: np.dtype) -> float:
    """`x` to the nearest value of `dtype`, ties to even, by the definition of IEEE 754."""
    fraction_bits, lowest, highest = _FORMATS[dtype]
    magnitude = abs(x)
    exponent = max(lowest, magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    ulp = Fraction(2) ** (exponent - fraction_bits)
    quotient, rest = divmod(magnitude, ulp)
    if rest * 2 > ulp or (rest * 2 == ulp and quotient % 2):
        quotient += 1
    value = quotient * ulp
    largest = Fraction(2) ** highest * (2 - Fraction(2) ** -fraction_bits)
    return math.copysign(math.inf if value > largest else float(value), x)


def merge_exact(
    base: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray, float]], dtype: np.dtype | None = None
) -> np.ndarray:
    """round(base + Σ scaling · B A) in rational arithmetic; `pairs` holds (A, B, scaling), base is (out, in)."""
    dtype = base.dtype if dtype is None else dtype
    exact = np.vectorize(lambda x: Fraction(float(x)), otypes=[object])
    total = exact(base)
    for a, b, scaling in pairs:
        total = total + Fraction(float(scaling)) * (exact(b) @ exact(a))
    result = np.empty(base.shape, dtype)
    for place in np.ndindex(*base.shape):
        untouched_zero = total[place] == 0 and base[place] == 0
        result[place] = base[place] if untouched_zero else round_exact(total[place], dtype)
    return result


def pair(adapter: Path, module: str, scaling: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(A, B, scaling) of a module in an adapter directory, for `merge_exact`."""
    tensors = read_arrays(adapter)
    return tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"], scaling
