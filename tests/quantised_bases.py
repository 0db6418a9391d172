"""Small bases in codes, one a stored form, and what a merge onto them has to give.

Codes are made by the codecs, which `test_codec_*.py` hold to the libraries that own the formats; names, files, the
merge itself and its rounding are this file's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from build import BF16, CONFIG, F16, F32, PREFIX, base_tensors, read_tensors, write_adapter, write_model
from inlay.codecs.encoding import encode_whole, settled
from inlay.codecs.table import codec
from oracle import rounded

HIDDEN, INNER = 64, 96
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
TOUCHED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
NUMPY: dict[str, np.dtype] = {
    "BF16": BF16, "F16": F16, "F32": F32, "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Form:
    """A stored form: its codec, options of new weights, and changes of settings that it cannot make itself."""

    codec: str
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> ModuleType:
        return codec(self.codec)

    def settings(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {**self.file.fresh(shape, self.options), **self.changes}


GPTQ = {"bits": 4, "group_size": 32}
FORMS: dict[str, Form] = {
    "bnb-nf4": Form("bnb4", {"double_quant": False}),
    "bnb-nf4-double": Form("bnb4"),
    "bnb-fp4": Form("bnb4", {"quant_type": "fp4", "blocksize": 128}),
    "bnb-nf4-bf16-storage": Form("bnb4", {"storage": "bfloat16", "double_quant": False}),
    "bnb-int8": Form("bnb8"),
    "gptq-4": Form("gptq", GPTQ),
    "gptq-4-asym": Form("gptq", {**GPTQ, "sym": False, "scale": "BF16"}),
    "gptq-2": Form("gptq", {**GPTQ, "bits": 2}),
    "gptq-3": Form("gptq", {**GPTQ, "bits": 3}),
    "gptq-8-v2": Form("gptq", {**GPTQ, "bits": 8, "sym": False}, {"zeros": "plain", "format": "gptq_v2"}),
    "gptq-desc-act": Form("gptq", GPTQ, {"order": "given", "desc_act": True}),
    "awq-gemm": Form("awq", {"group_size": 32}),
    "awq-gemv": Form("awq", {"group_size": 32}, {"version": "gemv"}),
    "ct-w4": Form("compressed_pack", {"scheme": "W4A16", "group_size": 32}),
    "ct-w4-asym": Form("compressed_pack", {"scheme": "W4A16_ASYM", "group_size": 32}),
    "ct-w8": Form("compressed_pack", {"scheme": "W8A16", "group_size": 32}),
    "ct-int8": Form("compressed", {"scheme": "W8A8"}),
    "ct-fp8": Form("compressed", {"scheme": "FP8_DYNAMIC"}),
    "ct-fp8-block": Form("compressed", {"scheme": "FP8_BLOCK"}),
    "ct-mxfp8": Form("compressed", {"scheme": "MXFP8A16"}),
    "ct-nvfp4": Form("compressed_fp4", {"scheme": "NVFP4A16"}),
    "ct-mxfp4": Form("compressed_fp4", {"scheme": "MXFP4A16"}),
    "fp8-block": Form("fp8"),
    "fp8-block-32": Form("fp8", {"weight_block_size": [32, 48]}),
    "fp8-ue8m0": Form("fp8", {"scale_fmt": "ue8m0"}),
    "fp8-channel": Form("fp8", {"strategy": "channel"}),
    "fp8-tensor": Form("fp8", {"strategy": "tensor"}),
    "modelopt-nvfp4": Form("modelopt"),
    "modelopt-fp8-block": Form("modelopt", {"scheme": "FP8_PB_WO"}),
    "hqq-4": Form("hqq"),
    "hqq-3": Form("hqq", {"nbits": 3}),
    "mlx-4": Form("mlx", {"group_size": 32}),
    "mlx-6": Form("mlx", {"group_size": 32, "bits": 6, "scale": "F16"}),
}  # fmt: skip


def plain_tensors(dtype: np.dtype = BF16, seed: int = 0) -> dict[str, np.ndarray]:
    """The weights before they were quantised."""
    tensors = base_tensors(dtype=dtype, seed=seed, linears=LINEARS)
    wide = np.random.default_rng(seed + 9)
    for key, old in tensors.items():
        if len(old.shape) == 2 and "layers" not in key:  # embedding and head: as wide as the model
            tensors[key] = (wide.standard_normal((len(old), HIDDEN)) * 0.1).astype(np.float32).astype(dtype)
    return tensors


@dataclass
class Coded:
    """A base in codes: its directory, and of each weight its codec's settings, parts (raw bits) and values."""

    form: Form
    path: Path
    settings: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, np.ndarray]]
    values: dict[str, np.ndarray]

    def key(self, module: str, part: str) -> str:
        return key_of(self.form, module, part)


def key_of(form: Form, module: str, part: str) -> str:
    file = form.file
    return f"{module}.weight".removesuffix(file.NAME_SUFFIX) + {**file.PARTS, **file.OPTIONAL}[part]


def encode(form: Form, weight: np.ndarray, known: Mapping[str, np.ndarray] | None = None, settings: Any = None) -> Any:
    """All parts of a weight (kept ones included) in one block, and the settings that read them."""
    file = form.file
    settings = form.settings(weight.shape) if settings is None else settings
    known = dict(known or {})
    if settings.get("order") == "given" and "g_idx" not in known:
        columns, size = weight.shape[1], settings["group_size"]
        known["g_idx"] = np.random.default_rng(3).permutation(np.arange(columns) // size).astype(np.int32)
    spans = file.spans(settings, 0, math.prod(weight.shape[:-1]))
    rows = weight.astype(np.float32).reshape(-1, weight.shape[-1])

    def kept(first: int, last: int) -> dict[str, np.ndarray]:
        return {part: cut(value, spans.get(part)) for part, value in known.items()}

    made = {**known, **encode_whole(file, settings, lambda: [(0, rows)], kept)}
    parts = {part: made[part] for part in file.layout(settings)}
    return parts, {**settings, **{k: v for k, v in settled(file, settings, parts).items() if k in ("state", "nested")}}


def cut(part: np.ndarray, span: tuple[int, int, int] | None) -> np.ndarray:
    return part if span is None else part[(slice(None),) * span[0] + (slice(span[1], span[2]),)]


def decode(form: Form, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> np.ndarray:
    """All values, float64."""
    rows = math.prod(settings["shape"][:-1])
    spans = form.file.spans(settings, 0, rows)
    values: np.ndarray = form.file.decode({p: cut(parts[p], s) for p, s in spans.items()}, settings, 0, rows)
    return values.astype(np.float64)


def typed(form: Form, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parts with the types that a file names."""
    made = {}
    for part, (dtype, shape) in form.file.layout(settings).items():
        made[part] = np.ascontiguousarray(parts[part]).reshape(-1).view(NUMPY[dtype]).reshape(shape)
    return made


def write_coded(
    directory: Path,
    name: str,
    *,
    shards: int = 1,
    dtype: np.dtype = BF16,
    excluded: Iterable[str] = ("lm_head",),
    arrange: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
    sidecars: Mapping[str, str | bytes] | None = None,
    **config: Any,
) -> Coded:
    """The small Llama with its linear layers in this form, but for the excluded modules. `arrange` orders the keys."""
    form, plain, excluded = FORMS[name], plain_tensors(dtype), list(excluded)
    made = Coded(form, directory, {}, {}, {})
    tensors: dict[str, np.ndarray] = {}
    some: dict[str, Any] = {}
    for key, weight in plain.items():
        module = key.removesuffix(".weight")
        if "layers" not in key or len(weight.shape) != 2 or module in excluded:
            tensors[key] = weight
            continue
        parts, settings = encode(form, weight.astype(np.float32))
        made.parts[module], made.settings[module], some = parts, settings, settings
        made.values[module] = decode(form, parts, settings)
        tensors |= {made.key(module, part): array for part, array in typed(form, parts, settings).items()}
    quant = form.file.config(some, excluded)
    write_model(
        directory, arrange(tensors), shards=shards, sidecars=sidecars,
        config={**CONFIG, "hidden_size": HIDDEN, "torch_dtype": "bfloat16", "quantization_config": quant, **config},
    )  # fmt: skip
    return made


def write_lora(directory: Path, modules: Iterable[str] = TOUCHED, *, size: float = 0.1, **more: Any) -> Path:
    """A LoRA on these modules of the small Llama."""
    shapes = {module: LINEARS[module.split(".", 3)[3]] for module in modules}
    return write_adapter(directory, shapes, size=size, **more)


def delta(adapter: Path, module: str, scaling: float = 2.0) -> np.ndarray:
    """s · B A in float64."""
    tensors = {}
    for key, (_, shape, data) in read_tensors(adapter / "adapter_model.safetensors").items():
        tensors[key] = np.frombuffer(data, np.float32).reshape(shape).astype(np.float64)
    product: np.ndarray = tensors[f"{PREFIX}{module}.lora_B.weight"] @ tensors[f"{PREFIX}{module}.lora_A.weight"]
    return scaling * product


def stored(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory: dtype name, shape, bytes."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= read_tensors(path)
    return found


def floats(directory: Path) -> dict[str, np.ndarray]:
    """Values of the float tensors of a directory, float64."""
    kinds = {name: NUMPY[name] for name in ("BF16", "F16", "F32")}
    with np.errstate(invalid="ignore"):  # codes may be stored as floats
        return {
            key: np.frombuffer(data, kinds[dtype]).reshape(shape).astype(np.float64)
            for key, (dtype, shape, data) in stored(directory).items()
            if dtype in kinds
        }


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def once(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded once to a stored type, by a rounding that is not inlay's."""
    return rounded(values, dtype)
