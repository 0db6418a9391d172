"""Tiny bases whose linear weights are stored in codes, in any form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from build import BF16, F16, write_model
from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.checkpoints.decoded import decode_checkpoint
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.codecs.table import codec
from inlay.dtypes import decode32

OUT, IN = 32, 128
MODULES = {f"model.layers.0.{name}": (OUT, IN) for name in ("self_attn.q_proj", "mlp.up_proj")}
NUMPY = {"BF16": BF16, "F16": F16}


def new_parts(name: str, weight: np.ndarray, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and stored parts of a weight."""
    form = codec(name)
    settings = form.fresh(weight.shape, options)
    parts = form.encode(weight, settings, 0, {})
    parts = {**parts, **form.finish(parts, settings)} if hasattr(form, "finish") else parts
    layout = form.layout(settings)
    found = {part: (dtype, parts[part].shape) for part, (dtype, _) in layout.items()}
    if hasattr(form, "finish"):  # which may have put numbers into them
        settings = form.settings({}, "m", found, parts.__getitem__)
    return settings, {part: parts[part].reshape(shape) for part, (_, shape) in layout.items()}


def write_coded(directory: Path, name: str, options: Mapping[str, Any]) -> Path:
    """A base whose two linear weights are stored in codes."""
    form, rng, tensors, settings = codec(name), np.random.default_rng(3), {}, {}
    endings = {**form.PARTS, **form.OPTIONAL}
    for module, shape in MODULES.items():
        weight = rng.standard_normal(shape).astype(np.float32) * np.float32(0.3)
        settings, parts = new_parts(name, weight, options)
        for part, (dtype, _) in form.layout(settings).items():
            tensors[module + endings[part]] = parts[part].view(NUMPY[dtype]) if dtype in NUMPY else parts[part]
    tensors["model.norm.weight"] = np.ones(IN, np.float16)
    config = {"model_type": "llama", "torch_dtype": "float16"}
    section = "quantization" if name == "mlx" else "quantization_config"
    return write_model(directory, tensors, config={**config, section: form.config(settings, [])})


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Weights of a checkpoint in codes, by module."""
    checkpoint = decode_checkpoint(open_checkpoint(path)).checkpoint
    with SpanReader({BASE: path}) as reader:
        found = {}
        for module in MODULES:
            shard, info = checkpoint.tensors[f"{module}.weight"]
            ref = TensorRef.of(BASE, shard.file, info)
            found[module] = decode32(reader.rows(ref, 0, OUT), info.dtype).astype(np.float64)
    return found


def stored(path: Path, key: str) -> np.ndarray:
    """One tensor as it is stored."""
    shard, info = open_checkpoint(path).tensors[key]
    with SpanReader({BASE: path}) as reader:
        return reader.whole(TensorRef.of(BASE, shard.file, info)).copy()
