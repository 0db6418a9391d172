"""What one adapter contributes, and what every way of placing its tensors needs to know of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorInfo, TensorRef
from inlay.checkpoints.spans import adapter_root
from inlay.errors import Problem
from inlay.keys import families
from inlay.keys.names import Names
from inlay.keys.rules import AS_THEY_ARE
from inlay.plan.steps import AnyStep, Rows


@dataclass
class Contribution:
    """What one adapter does, by key of the base (or by a new key, for a saved head)."""

    adapter: Adapter
    position: int
    weight: float
    rule: str = AS_THEY_ARE
    copies: dict[str, TensorRef] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)  # the copies that modules_to_save lists
    rows: dict[str, Rows] = field(default_factory=dict)
    steps: dict[str, list[AnyStep]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    hint: str = ""
    parameters: set[str] = field(default_factory=set)  # the bare ones that it has pairs for
    scalings: set[float] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)

    @property
    def keys(self) -> set[str]:
        return {*self.copies, *self.rows, *self.steps}


class Placer:
    """Places the tensors of one adapter on one base."""

    def __init__(self, found: Contribution, base: Checkpoint, names: Names) -> None:
        self.found = found
        self.base = base
        self.names = names
        self.adapter = found.adapter
        self.config = found.adapter.config
        self.model_type = base.config.get("model_type")
        self.owners: dict[str, str] = {}  # key -> the module placed on it, for files that may hold one twice
        self.own_shapes: dict[str | None, tuple[int, ...]] = {
            names.rule.key(name): tensor.shape for name, tensor in self.adapter.full.items()
        }

    def ref(self, tensor: TensorInfo) -> TensorRef:
        return TensorRef.of(adapter_root(self.found.position), self.adapter.weights_file, tensor)

    def problem(self, where: str, what: str) -> None:
        self.found.problems.append(Problem(where, what))

    def weight_key(self, module: str) -> str | None:
        """Key of the module's weight, or a problem."""
        # A module inside a wrapped one keeps the wrapper's name: attn.base_layer.out_proj (MultiheadAttention).
        plain = module.replace(".base_layer.", ".")
        for leaf in (".weight", ".in_proj_weight"):
            key = self.names.rule.key(plain + leaf)
            if key in self.base.tensors or (leaf == ".weight" and key == self.tied_head()):
                return key
        key = self.names.key(plain + ".weight")
        if key in self.base.tensors:
            return key
        self.problem(module, self.names.why_not(plain + ".weight"))
        return None

    def tied_head(self) -> str | None:
        """Key of a head that is not stored because it is tied to the embedding."""
        keys = self.base.tensors.keys()
        key = families.head_key(self.base.config, keys) if families.is_tied(self.base.config, keys) else None
        return key if key and key not in keys else None

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape that a step on this weight has to fit: that of the adapter's own full copy where it brings one.

        A head that is tied and not stored has the shape of the embedding.
        """
        for end in (key, embedding_key(self.base) if key == self.tied_head() else None):
            if end in self.own_shapes:
                return self.own_shapes[end]
            if end in self.base.tensors:
                return self.base.tensors[end][1].shape
        return ()

    def target_is_float(self, module: str, key: str) -> bool:
        dtype = self.base.tensors[key][1].dtype if key in self.base.tensors else None
        if dtype is None or dtype.mergeable:
            return True
        self.problem(module, f"the base stores {key} as {dtype.name} codes, which cannot be added to")
        return False

    def parts_are_numbers(self, module: str, parts: Mapping[str, TensorInfo]) -> bool:
        """Whether the parts are floats of 16 bits and more; indices may be whole numbers."""
        wrong = {
            t.dtype.name
            for name, t in parts.items()
            if not (t.dtype.mergeable or (t.dtype.kind == "int" and "_indices" in name))
        }
        if wrong:
            self.problem(module, f"adapter tensors of type {', '.join(sorted(wrong))}")
        return not wrong

    def rank_agrees(self, module: str, rank: int) -> bool:
        if rank == self.config.rank(module):
            return True
        self.problem(module, f"rank {rank} in the file, {self.config.rank(module)} in the config")
        return False

    def magnitude_fits(self, module: str, tensor: TensorInfo | None, outputs: int) -> bool:
        """Whether the DoRA magnitude is there exactly when the config says so, one element for each output."""
        if (tensor is not None) != self.config.use_dora and not self.config.strengths:  # else the file alone says so
            here = "has a lora_magnitude_vector" if tensor else "lacks its lora_magnitude_vector"
            self.problem(module, f"{here}, but use_dora is {str(self.config.use_dora).lower()}")
            return False
        if tensor is not None and self.ref(tensor).count != outputs:
            self.problem(module, f"lora_magnitude_vector {tensor.shape} does not fit {outputs} outputs")
            return False
        return True


def embedding_key(base: Checkpoint) -> str | None:
    """Key of the input embedding: the one whose rows are as many as the vocabulary, if there are several."""
    found = [k for k in base.tensors if k.endswith(".weight") and families.is_embedding(k.removesuffix(".weight"))]
    if len(found) > 1:
        size = families.text_config(base.config)[1].get("vocab_size")
        found = [k for k in found if base.tensors[k][1].shape[:1] == (size,)] or found
    return found[0] if found else None
