"""The modules of a model: what they are, where they belong, what they do.

Told by what the modules are and how they are nested, not by their names, so it holds for any architecture. In a model
of several modes each module belongs to a part:

    text      the sub-model that the text config describes, and a model without sub-models
    vision    blocks of the other sub-models (images, video, sound)
    aligner   what stands between: projectors, mergers
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

from inlay.train.names import prefixes

TEXT, VISION, ALIGNER = "text", "vision", "aligner"
# Arguments by which a module shows that it reads other tokens than its own.
SEES_OTHERS = frozenset(
    {
        "attention_mask", "position_embeddings", "position_ids", "past_key_values", "past_key_value", "layer_past",
        "cu_seqlens", "cache_params", "alibi", "rotary_pos_emb",
    }
)  # fmt: skip


class Anatomy:
    """The modules of a model: which are linear, where they belong, what they do."""

    def __init__(self, model: Any) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        self.model = model
        self.modules: dict[str, Any] = {name: m for name, m in model.named_modules() if name}
        self._linear = (torch.nn.Linear, Conv1D)
        self._embedding = torch.nn.Embedding
        self._fused_attention = torch.nn.MultiheadAttention
        self._lists = (torch.nn.ModuleList, torch.nn.Sequential)

    @cached_property
    def linear(self) -> tuple[str, ...]:
        """Linear layers, but those that a MultiheadAttention holds: it reads their weights and never calls them."""
        hidden = tuple(f"{name}." for name, m in self.modules.items() if isinstance(m, self._fused_attention))
        return tuple(n for n, m in self.modules.items() if isinstance(m, self._linear) and not n.startswith(hidden))

    @cached_property
    def embeddings(self) -> tuple[str, ...]:
        return tuple(name for name, m in self.modules.items() if isinstance(m, self._embedding))

    @cached_property
    def head(self) -> str | None:
        """Name of the layer that makes words, or labels, of the last state."""
        head = self.model.get_output_embeddings()
        if head is None:
            return next((name for name in ("score", "classifier") if name in self.modules), None)
        return next(name for name, m in self.modules.items() if m is head)

    @cached_property
    def _parts(self) -> dict[str, str]:
        """Name of a sub-model -> the part it is; empty where the model is one of text alone."""
        from transformers import PreTrainedModel

        config = self.model.config
        text = config.get_text_config(decoder=True)
        if text is config:
            return {}
        others = [c for key in config.sub_configs if (c := getattr(config, key, None)) not in (None, text)]
        found: dict[str, str] = {}
        for name, module in self.modules.items():
            if not isinstance(module, PreTrainedModel) or any(name.startswith(f"{outer}.") for outer in found):
                continue
            if type(module.config) is type(text):
                found[name] = TEXT
            elif any(type(module.config) is type(other) for other in others):
                found[name] = VISION
        return found

    def part(self, name: str) -> str:
        """TEXT, VISION or ALIGNER."""
        if not self._parts or name == self.head:
            return TEXT
        outer = next((outer for outer in self._parts if name == outer or name.startswith(f"{outer}.")), None)
        if outer is None:
            return ALIGNER
        if self._parts[outer] == TEXT:
            return TEXT
        block = self.block(name)
        around = block or ".".join(name.split(".")[: outer.count(".") + 2])  # or the sub-model's own child
        if any(self._mixes(n) for n in self.modules if n == around or n.startswith(f"{around}.")):
            return VISION
        return VISION if block is None and "embed" in name.removeprefix(outer) else ALIGNER

    def block(self, name: str) -> str | None:
        """The outermost element of a list that holds the module: a layer of the network."""
        for above in prefixes(name):
            if isinstance(self.modules.get(above.rpartition(".")[0]), self._lists):
                return above
        return None

    def role(self, name: str) -> str | None:
        """`attention` or `mlp` for a layer inside a block, None elsewhere."""
        block = self.block(name)
        if block is None:
            return None
        inner = [above for above in prefixes(name) if len(block) < len(above) < len(name)]
        return "attention" if any(map(self._mixes, inner)) else "mlp"

    def _mixes(self, name: str) -> bool:
        """Whether the module lets tokens see each other."""
        module = self.modules[name]
        if isinstance(module, (*self._linear, self._embedding, *self._lists)):
            return False
        seen = SEES_OTHERS & inspect.signature(module.forward).parameters.keys()
        return bool(seen) or "attention" in type(module).__name__.lower()

    @cached_property
    def stacks(self) -> tuple[str, ...]:
        """Parameters that hold the matrices of many experts, which no linear layer stands for."""
        return tuple(
            name for name, p in self.model.named_parameters()
            if p.dim() == 3 and ".experts." in f".{name}"
        )  # fmt: skip
