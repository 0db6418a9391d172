"""Which adapters can be combined, and into what: the pairs of each module, or every reason against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inlay.adapters.adapter import PEFT, Adapter
from inlay.adapters.values import scan_values
from inlay.checkpoints.refs import TensorInfo
from inlay.errors import Problem
from inlay.tuners.combining import Recipe, result_rank

KINDS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
PAIRED = {name for kind in KINDS for name in kind}
SHOWN = 3

# Fields of a config with which a pair is not B A for the module of its name.
NOT_PLAIN = (
    "alora_invocation_tokens", "arrow_config", "enable_lora", "kasa_config", "layer_replication", "target_parameters",
    "use_bdlora", "use_qalora",
)  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """The pair of the adapter at `position`: a (r, in, kernel…), b (out, r, 1…)."""

    position: int
    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Module:
    """A module and the pairs of the adapters that have it; `kind` names its two tensors in a file."""

    name: str
    kind: tuple[str, str]
    factors: tuple[Factors, ...]

    @property
    def outputs(self) -> int:
        return self.factors[0].b.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of A, with the axes of a kernel flattened."""
        return math.prod(self.factors[0].a.shape[1:])

    def rank(self, recipe: Recipe) -> int:
        """Rank of the combination."""
        return result_rank(recipe, [f.rank for f in self.factors], self.outputs, self.inputs)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B of this rank, as a file has them."""
        a, b = self.factors[0].a.shape, self.factors[0].b.shape
        return (rank, *a[1:]), (b[0], rank, *b[2:])


def is_lora(adapter: Adapter) -> bool:
    return bool(adapter.config.raw.get("peft_type") == "LORA")


def check_adapter(adapter: Adapter) -> list[Problem]:
    """Everything in an adapter that is not a pair for a module, and so cannot be combined."""
    config, parts = adapter.config, {name for parts in adapter.parts.values() for name in parts}
    if not is_lora(adapter):
        kind = f"peft_type {config.raw.get('peft_type')}" + ("" if adapter.format == PEFT else f", {adapter.format}")
        what = f"is not a LoRA in PEFT's format ({kind}), which alone can be combined"
        return [Problem(str(adapter.path), what)]
    reasons = [f"sets {name}, which is more than a plain LoRA" for name in NOT_PLAIN if config.raw.get(name)]
    if config.variant:
        reasons.append(f"is {config.variant}, which changes the base too; merge it into the base instead")
    if config.use_dora or "magnitude" in parts:
        reasons.append("is a DoRA, which also scales the base; merge it into the base instead")
    if config.lora_bias or "lora_bias" in parts:
        reasons.append("has lora_bias: biases cannot be combined")
    if config.modules_to_save:
        reasons.append(f"has saved modules ({_some(config.modules_to_save)}), of which only one adapter's can be kept")
    elif adapter.full:
        reasons.append(f"has full copies of base tensors ({_some(sorted(adapter.full))}), which cannot be combined")
    if config.trainable_token_indices or "token_rows" in parts:
        reasons.append("has trained token rows (trainable_token_indices), which cannot be combined")
    if unknown := sorted(parts - PAIRED - {"magnitude", "lora_bias", "token_rows"}):
        reasons.append(f"has {_some(unknown)}, which are no parts of a plain LoRA")
    if not parts & PAIRED:
        reasons.append("has no pair of LoRA factors")
    reasons += [f"has NaN or Inf in {key}" for key in scan_values(adapter).nonfinite]
    return [Problem(str(adapter.path), reason) for reason in reasons]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def find_modules(adapters: Sequence[Adapter], recipe: Recipe) -> tuple[list[Module], list[Problem]]:
    """The modules of all adapters by name, each with the adapters that have it; and what does not fit."""
    modules, problems = [], []
    for name in sorted({name for adapter in adapters for name in adapter.parts}):
        found = _module(name, adapters)
        if isinstance(found, Module):
            problems += _disagreements(found, adapters, recipe)
            modules.append(found)
        else:
            problems += found
    return modules, problems


def _module(name: str, adapters: Sequence[Adapter]) -> Module | list[Problem]:
    """The module, from all adapters that have a pair for it; parts outside of pairs are for `check_adapter`."""
    factors, kinds, problems = [], set(), []
    for position, adapter in enumerate(adapters):
        parts = {n: t for n, t in adapter.parts.get(name, {}).items() if n in PAIRED}
        if not parts:
            continue
        kind = next((kind for kind in KINDS if parts.keys() == set(kind)), None)
        if kind is None:
            problems.append(Problem(name, f"incomplete: {adapter.path} has {', '.join(sorted(parts))}"))
        elif reason := _bad_pair(name, adapter, parts, kind):
            problems.append(Problem(name, f"{reason} in {adapter.path}"))
        else:
            kinds.add(kind)
            factors.append(Factors(position, parts[kind[0]], parts[kind[1]], adapter.config.scaling(name)))
    if len(kinds) > 1:
        problems.append(Problem(name, "is an embedding in one adapter and a layer in another"))
    return problems if problems or not factors else Module(name, kinds.pop(), tuple(factors))


def _bad_pair(name: str, adapter: Adapter, parts: Mapping[str, TensorInfo], kind: tuple[str, str]) -> str | None:
    a, b = parts[kind[0]], parts[kind[1]]
    if not a.dtype.mergeable or not b.dtype.mergeable:
        return f"tensors of type {a.dtype.name} and {b.dtype.name}, which are no floats of 16 bits or more,"
    fits = len(a.shape) == len(b.shape) >= 2 and a.shape[0] == b.shape[1] and 0 not in (*a.shape, *b.shape)
    if not fits or any(n != 1 for n in b.shape[2:]):
        return f"A {a.shape} and B {b.shape} are no pair"
    if a.shape[0] != adapter.config.rank(name):
        return f"rank {a.shape[0]} in the file, {adapter.config.rank(name)} in the config"
    return None


def _disagreements(module: Module, adapters: Sequence[Adapter], recipe: Recipe) -> list[Problem]:
    problems, first = [], module.factors[0]
    for other in module.factors[1:]:
        if module.shapes(first.rank) != Module("", module.kind, (other,)).shapes(first.rank):
            what = f"is for {_weight(other)} in {adapters[other.position].path}, for {_weight(first)} in "
            problems.append(Problem(module.name, f"{what}{adapters[first.position].path}"))
    ranks = [f.rank for f in module.factors]
    if recipe.needs_equal_ranks and len(set(ranks)) > 1:
        # `linear` has its counterpart on deltas in `svd` itself.
        instead = "svd" if recipe.name == "linear" else f"{recipe.name}_svd"
        what = f"ranks {', '.join(map(str, ranks))}: {recipe.name} needs equal ones; use {instead} or cat"
        problems.append(Problem(module.name, what))
    return problems


def _weight(f: Factors) -> tuple[int, ...]:
    """Shape of the weight that a pair belongs to, as (out, in, kernel…)."""
    return (f.b.shape[0], *f.a.shape[1:])
