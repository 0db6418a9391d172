"""Where the modules of torchtune's models lie in Hugging Face's: reordered rows, fused tensors.

torchtune turns neighbouring elements (0, 1), (2, 3) … of a head in its rotary embedding, as Meta's models do;
Hugging Face's turn (0, h/2), (1, h/2 + 1) … with h the width of a head. So row 2d + p of a head of q_proj or
k_proj in torchtune is row p·h/2 + d in Hugging Face's, for the families in PERMUTED. Qwen2 and Phi-3 keep the
order. Phi-3 has one tensor for q, k, v and one for gate and up.
Source: torchtune, models/convert_weights.py (`tune_to_hf`), models/{qwen2,gemma2,phi3}/_convert_weights.py and
training/checkpointing/_checkpointer.py, which chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay.keys.memory import Slice

PERMUTED = frozenset({"llama", "mistral", "gemma", "gemma2"})
AS_THEY_ARE = frozenset({"qwen2"})
FUSED = frozenset({"phi3"})
FAMILIES = PERMUTED | AS_THEY_ARE | FUSED
ROTATED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class Stretch:
    """Rows `first`, `first` + 2 … of torchtune's matrix, that are rows `[begin, end)` of the stored one."""

    first: int
    begin: int
    end: int


def is_permuted(model_type: object, module: str) -> bool:
    """Whether the rows of this module have another order in torchtune."""
    return model_type in PERMUTED and module.rpartition(".")[2] in ROTATED


def head_width(config: Mapping[str, Any]) -> int | None:
    """Elements of a head of attention, where the config says so."""
    if config.get("head_dim") is not None:
        return _count(config, "head_dim")
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    return hidden // heads if hidden and heads else None


def _count(config: Mapping[str, Any], name: str) -> int | None:
    """A field that is a positive number."""
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def stretches(outputs: int, width: int) -> list[Stretch]:
    """The halves of all heads. Law: they tile the `outputs` rows in order."""
    half = width // 2
    return [
        Stretch(head * width + part, head * width + part * half, head * width + (part + 1) * half)
        for head in range(outputs // width)
        for part in (0, 1)
    ]


def fused(module: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Slice, ...]:
    """The rows of a fused tensor of Phi-3 that are this module; empty for one that has a tensor of its own."""
    parent, _, name = module.rpartition(".")
    if name in ("gate_proj", "up_proj"):
        key, parts = f"{parent}.gate_up_proj.weight", {"gate_proj": (0, 1), "up_proj": (1, 2)}
        rows = shapes[key][0] // 2 if key in shapes else 0
        return _slice(key, tuple(end * rows for end in parts[name]), shapes)
    width, heads = head_width(config), _count(config, "num_attention_heads")
    shared = heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads")
    key = f"{parent}.qkv_proj.weight"
    if name not in ("q_proj", "k_proj", "v_proj") or key not in shapes or not (width and heads and shared):
        return ()
    q, kv = heads * width, shared * width
    if shapes[key][0] != q + 2 * kv:
        return ()
    ends = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}[name]
    return _slice(key, ends, shapes)


def _slice(key: str, ends: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Slice, ...]:
    if key not in shapes:
        return ()
    return (Slice(key, None, (0, ends[1] - ends[0]), (ends[0], ends[1])),)
