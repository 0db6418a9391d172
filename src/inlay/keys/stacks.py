"""Where experts that lie on disk one by one are one parameter in memory, for families whose layout is declared here.

    model.layers.3.mlp.experts.7.gate_proj.weight   (I, H)      model.layers.3.mlp.experts.gate_up_proj   (E, 2·I, H)
    model.layers.3.mlp.experts.7.up_proj.weight     (I, H)   =  rows [0, I) are gate's, rows [I, 2·I) are up's
    model.layers.3.mlp.experts.7.down_proj.weight   (H, I)   =  model.layers.3.mlp.experts.down_proj      (E, H, I)

transformers says the same (`keys/memory.py`), after an import that takes seconds and hundreds of megabytes. The table
is for the classes that are merged most; a checkpoint that differs from its config in anything that the
table rests on is left to transformers. Law: what is found here is what `memory_layout` finds; the tests hold every
class of the table against it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay.keys.memory import MemoryLayout, Slice

Shapes = Mapping[str, tuple[int, ...]]
STACKS = ("gate_up_proj", "down_proj")  # the parameters of a stack, in the order of registration
ANY_EXPERT = re.compile(r"(?:^|\.)experts\.")  # not shared_experts, which is a plain MLP


@dataclass(frozen=True)
class Family:
    """A class with a stack of experts in every layer from the first sparse one on.

    `parts` are gate, up and down as they are called on disk; `experts` and `width` the fields of config.json with the
    number of experts and their inner width, `first` that of the first layer that has experts. `fixed` are fields
    that have to have this value where they are given, since others make layers dense.
    """

    model_type: str
    folder: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"
    first: str | None = None
    fixed: tuple[tuple[str, tuple[Any, ...]], ...] = ()


QWEN: tuple[tuple[str, tuple[Any, ...]], ...] = (("decoder_sparse_step", (1,)), ("mlp_only_layers", ([], None)))
ROUTED = ("n_routed_experts", "num_local_experts", "num_experts")
FAMILIES = {
    "Qwen2MoeForCausalLM": Family("qwen2_moe", fixed=QWEN),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", fixed=QWEN),
    "OlmoeForCausalLM": Family("olmoe", width="intermediate_size"),
    "MixtralForCausalLM": Family("mixtral", "block_sparse_moe", ("w1", "w3", "w2"), width="intermediate_size"),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", experts=ROUTED, first="first_k_dense_replace"),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", experts=ROUTED, first="first_k_dense_replace"),
    "Glm4MoeForCausalLM": Family("glm4_moe", experts=ROUTED, first="first_k_dense_replace"),
}


def names_stack(target: str) -> bool:
    """Whether an entry of `target_parameters` can name nothing but stacks: all else in these classes ends otherwise."""
    return target.rpartition(".")[2] in STACKS


def stacked_experts(config: Mapping[str, Any], shapes: Shapes) -> MemoryLayout | None:
    """The stacks of experts and nothing else; None where the table does not settle all of them."""
    family = FAMILIES.get(str(next(iter(config.get("architectures") or ()), "")))
    if family is None or config.get("model_type") != family.model_type:
        return None
    sizes = _sizes(config, family)
    if sizes is None or not _complete(sizes, family, shapes):
        return None
    width, hidden = sizes.width, sizes.hidden
    slices: dict[str, tuple[Slice, ...]] = {}
    made: dict[str, tuple[int, ...]] = {}
    for layer in sizes.sparse:
        fused, last = (f"model.layers.{layer}.mlp.experts.{name}" for name in STACKS)
        made[fused], made[last] = (sizes.experts, 2 * width, hidden), (sizes.experts, hidden, width)
        gate_up: list[Slice] = []
        down: list[Slice] = []
        for e in range(sizes.experts):
            where = f"model.layers.{layer}.{family.folder}.experts.{e}."
            keys = [f"{where}{part}.weight" for part in family.parts]
            gate_up += Slice(keys[0], e, (0, width), (0, width)), Slice(keys[1], e, (width, 2 * width), (0, width))
            down.append(Slice(keys[2], e, (0, hidden), (0, hidden)))
        slices[fused], slices[last] = tuple(gate_up), tuple(down)
    return MemoryLayout(slices, made, {}, (), frozenset())


@dataclass(frozen=True)
class _Sizes:
    layers: int
    first: int
    experts: int
    width: int
    hidden: int

    @property
    def sparse(self) -> range:
        return range(self.first, self.layers)


def _sizes(config: Mapping[str, Any], family: Family) -> _Sizes | None:
    """What the config says of the stacks; None where it leaves something to the defaults of the class."""
    if any(name in config and config[name] not in allowed for name, allowed in family.fixed):
        return None
    counts = {config[name] for name in family.experts if isinstance(config.get(name), int)}
    first = config.get(family.first) if family.first else 0
    given = [config.get("num_hidden_layers"), first, *counts, config.get(family.width), config.get("hidden_size")]
    numbers = [n for n in given if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    if len(numbers) != 5 or len(given) != 5 or 0 in numbers[2:]:
        return None
    return _Sizes(*numbers)


def _complete(sizes: _Sizes, family: Family, shapes: Shapes) -> bool:
    """Whether the experts on disk are those of the class: each one there, of its shape, and none besides.

    Layers beyond the last are for the prediction of further tokens, and no part of the class.
    """
    gate, up, down = family.parts
    fits = {gate: (sizes.width, sizes.hidden), up: (sizes.width, sizes.hidden), down: (sizes.hidden, sizes.width)}
    one = re.compile(
        rf"model\.layers\.(0|[1-9]\d*)\.{family.folder}\.experts\.(0|[1-9]\d*)\.({gate}|{up}|{down})\.weight"
    )
    count = 0
    for key, shape in shapes.items():
        if ANY_EXPERT.search(key) is None:
            continue
        found = one.fullmatch(key)
        if found is None:
            return False
        layer, expert = int(found[1]), int(found[2])
        if layer >= sizes.layers:
            continue
        if layer < sizes.first or expert >= sizes.experts or shape != fits[found[3]]:
            return False
        count += 1
    return count == 3 * sizes.experts * len(sizes.sparse) > 0
