"""Tiny diffusers pipelines, made up: the names and kinds of layers of a Stable Diffusion, a few elements wide."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
UNET_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
WIDTH, INNER, TEXT, TIME = 8, 12, 10, 16


def _attention(place: str, width: int, conv: bool) -> dict[str, tuple[int, ...]]:
    kernel = (1, 1) if conv else ()
    block = f"{place}.transformer_blocks.0"
    shapes: dict[str, tuple[int, ...]] = {f"{place}.norm.weight": (width,)}
    shapes |= {f"{place}.{name}.weight": (width, width, *kernel) for name in ("proj_in", "proj_out")}
    for attention, source in (("attn1", width), ("attn2", TEXT)):
        shapes |= {f"{block}.{attention}.to_{x}.weight": (width, width if x == "q" else source) for x in "qkv"}
        shapes |= {
            f"{block}.{attention}.to_out.0.weight": (width, width),
            f"{block}.{attention}.to_out.0.bias": (width,),
        }
    return shapes | {
        f"{block}.ff.net.0.proj.weight": (4 * width, width),
        f"{block}.ff.net.2.weight": (width, 2 * width),
    }


def _resnet(place: str, source: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{place}.norm1.weight": (source,),
        f"{place}.conv1.weight": (width, source, 3, 3),
        f"{place}.conv1.bias": (width,),
        f"{place}.time_emb_proj.weight": (width, TIME),
        f"{place}.conv2.weight": (width, width, 3, 3),
    }
    if source != width:
        shapes[f"{place}.conv_shortcut.weight"] = (width, source, 1, 1)
    return shapes


def unet_shapes(conv: bool = False) -> dict[str, tuple[int, ...]]:
    """Two blocks down, of which the second attends, a middle, two up; `conv` for SD 1's proj_in and proj_out."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv_in.weight": (WIDTH, 4, 3, 3),
        "conv_in.bias": (WIDTH,),
        "time_embedding.linear_1.weight": (TIME, WIDTH),
        "time_embedding.linear_2.weight": (TIME, TIME),
        "add_embedding.linear_1.weight": (TIME, 6),
        "add_embedding.linear_2.weight": (TIME, TIME),
        "conv_out.weight": (4, WIDTH, 3, 3),
        "down_blocks.0.downsamplers.0.conv.weight": (WIDTH, WIDTH, 3, 3),
        "up_blocks.0.upsamplers.0.conv.weight": (INNER, INNER, 3, 3),
        "up_blocks.1.upsamplers.0.conv.weight": (WIDTH, WIDTH, 3, 3),
    }
    for j in (0, 1):
        shapes |= _resnet(f"down_blocks.0.resnets.{j}", WIDTH, WIDTH)
        shapes |= _resnet(f"down_blocks.1.resnets.{j}", INNER if j else WIDTH, INNER)
        shapes |= _attention(f"down_blocks.1.attentions.{j}", INNER, conv)
        shapes |= _resnet(f"mid_block.resnets.{j}", INNER, INNER)
    shapes |= _attention("mid_block.attentions.0", INNER, conv)
    for j in range(3):
        shapes |= _resnet(f"up_blocks.0.resnets.{j}", 2 * INNER, INNER)
        shapes |= _attention(f"up_blocks.0.attentions.{j}", INNER, conv)
        shapes |= _resnet(f"up_blocks.1.resnets.{j}", INNER if j else 2 * INNER, WIDTH)
    return shapes


def text_shapes(prefix: str = "text_model.", width: int = TEXT) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.token_embedding.weight": (20, width),
        f"{prefix}final_layer_norm.weight": (width,),
    }
    for i in (0, 1):
        layer = f"{prefix}encoder.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (width, width) for x in ("q", "k", "v", "out")}
        shapes |= {f"{layer}.mlp.fc1.weight": (2 * width, width), f"{layer}.mlp.fc2.weight": (width, 2 * width)}
    return shapes


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_sharded(folder: Path, tensors: Tensors, stem: str, variant: str = "") -> None:
    """Two shards and an index, named as diffusers and transformers do."""
    dot = f".{variant}" if variant else ""
    keys = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((keys[::2], keys[1::2]), 1):
        file = f"{stem}{dot}-{i:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index{dot}.json", index)


def write_pipeline(path: Path, dtype: torch.dtype = torch.float32, *, conv: bool = False, second: bool = False) -> Path:
    """A pipeline with a U-Net, one or two text encoders, a VAE, and what stands beside them."""
    models = {"unet": unet_shapes(conv), "text_encoder": text_shapes(), "vae": {"decoder.conv_in.weight": (8, 4, 3, 3)}}
    classes = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
    if second:
        models["text_encoder_2"], classes["text_encoder_2"] = text_shapes(width=TEXT + 2), "CLIPTextModelWithProjection"
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.34.0"}
    index |= {n: ["transformers" if n.startswith("text") else "diffusers", c] for n, c in classes.items()}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    write_json(path / "model_index.json", {**index, "safety_checker": [None, None], "requires_safety_checker": False})
    for seed, (name, shapes) in enumerate(models.items()):
        (path / name).mkdir(parents=True)
        file = TEXT_FILE if name.startswith("text") else UNET_FILE
        tensors = draw(shapes, seed, dtype)
        if name.startswith("text"):  # whole numbers, as the encoders of Stable Diffusion 1 have them
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, path / name / file, {"format": "pt"})
        write_json(path / name / "config.json", {"_class_name": classes[name]})
    write_json(path / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "layers_per_block": 2})
    text = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": str(dtype)[6:]}
    write_json(path / "text_encoder" / "config.json", text)
    write_json(path / "scheduler" / "scheduler_config.json", {"_class_name": "PNDMScheduler", "steps_offset": 1})
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
    (path / "README.md").write_text("---\nlicense: openrail++\n---\n# A pipeline\n")
    return path


def read_component(path: Path, component: str) -> Tensors:
    return {k: t for file in sorted((path / component).glob("*.safetensors")) for k, t in load_file(file).items()}


def product(up: torch.Tensor, down: torch.Tensor) -> np.ndarray:
    """The weight of one convolution (or matrix) that does what `down` and then `up` (1 × 1) do, in float64."""
    return np.asarray(torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double()).numpy())


def pair(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`down` and `up` for a weight of this shape."""
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
