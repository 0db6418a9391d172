"""`--combine`: how several adapters become one change of the base.

sum, override            in `inlay.plan.combine`: every adapter by its own steps
PEFT's methods           one adapter made of the factors of all (`combined_adapter`), placed like any other
mergekit's methods       in `inlay.plan.mixtures`: the steps of all on one tensor become one delta
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from inlay.adapters.adapter import CONFIG, Adapter
from inlay.adapters.peft_config import Strength, parse_peft_config
from inlay.adapters.peft_names import PREFIX
from inlay.checkpoints.refs import Made, TensorInfo, TensorRef
from inlay.checkpoints.spans import adapter_root
from inlay.dtypes import F32
from inlay.errors import Problem
from inlay.plan.combinable import Module, check_adapter, find_modules, is_lora
from inlay.tuners import combining, mixing
from inlay.tuners.combining import MAJORITY_SIGNS, Recipe

SUMS = ("sum", "override")
METHODS = (*SUMS, *combining.METHODS, *mixing.METHODS)


@dataclass(frozen=True)
class Options:
    """Settings of a method; None where not given. `density` in (0, 1], `gamma` and `epsilon` are shares."""

    density: float | None = None
    majority_sign_method: str | None = None
    svd_rank: int | None = None
    seed: int | None = None
    gamma: float | None = None
    epsilon: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


NO_OPTIONS = Options()


def by_place(name: str) -> bool:
    """Whether an adapter's place in the list decides something: the random elements that are kept of it, or the way."""
    peft, mergekit = combining.METHODS.get(name), mixing.METHODS.get(name)
    return bool((peft and peft.prunes == "random") or (mergekit and mergekit.prunes == "ranks"))


def method_problems(name: str, options: Options) -> list[Problem]:
    """Settings that are missing, out of range, or of no effect on the method."""
    if name not in METHODS:
        return [Problem("combine", f"{name} is not one of {', '.join(METHODS)}")]
    peft, mergekit = combining.METHODS.get(name, combining.Method()), mixing.METHODS.get(name, mixing.Method())
    prunes = peft.prunes or mergekit.prunes
    used = {
        "density": bool(prunes),
        "majority_sign_method": peft.elects_sign or mergekit.elects_sign,
        "svd_rank": peft.on_deltas,
        "seed": prunes in ("random", "ranks"),
        "gamma": prunes == "outliers",
        "epsilon": prunes == "ranks",
    }
    given = options.given()
    problems = [Problem(n, f"has no effect on {name}; leave it out") for n in given if not used[n]]
    if prunes and options.density is None:
        problems.append(Problem("density", f"{name} needs it: the share of elements to keep, in (0, 1]"))
    return problems + _range_problems(options, prunes)


def _range_problems(options: Options, prunes: str) -> list[Problem]:
    problems = []
    density, gamma = options.density, options.gamma
    if density is not None and not 0 < density <= 1:
        problems.append(Problem("density", f"must be in (0, 1], not {density}"))
    sign = options.majority_sign_method
    if sign is not None and sign not in MAJORITY_SIGNS:
        problems.append(Problem("majority_sign_method", f"must be {' or '.join(MAJORITY_SIGNS)}, not {sign}"))
    if options.svd_rank is not None and options.svd_rank < 1:
        problems.append(Problem("svd_rank", f"must be positive, not {options.svd_rank}"))
    if gamma is not None and not 0 <= gamma < 1:
        problems.append(Problem("gamma", f"must be in [0, 1), not {gamma}"))
    epsilon = mixing.EPSILON if options.epsilon is None else options.epsilon
    if prunes == "ranks" and density is not None and density < 1 and not epsilon < density < 1 - epsilon:
        what = f"{epsilon} does not leave density ± epsilon between 0 and 1 (density {density})"
        problems.append(Problem("epsilon", what))
    if not 0 <= epsilon < 1:
        problems.append(Problem("epsilon", f"must be in [0, 1), not {epsilon}"))
    return problems


def weight_problems(name: str, weights: Sequence[float] | None, count: int) -> list[Problem]:
    """Weights that are too few or many, no numbers, or without meaning for the method."""
    problems = []
    mergekit = mixing.METHODS.get(name)
    if mergekit and mergekit.most and count > mergekit.most:
        problems.append(Problem("combine", f"{name} takes {mergekit.most} adapters, not {count}"))
    if weights is None:
        return problems
    if len(weights) != count:
        problems.append(Problem("adapter_weights", f"{len(weights)} for {count} adapters; give one each"))
    if not all(math.isfinite(w) for w in weights):
        problems.append(Problem("adapter_weights", "must be finite numbers"))
    if mergekit and not mergekit.weighted and any(w != 1 for w in weights):
        problems.append(Problem("adapter_weights", f"have no meaning for {name}; leave them out"))
    if name == "slerp" and (min(weights, default=0) < 0 or not 0 < sum(weights) < math.inf):
        what = "slerp takes weights that are not negative, and not both zero, with a sum that is a number"
        problems.append(Problem("adapter_weights", what))
    return problems


def different_bases(adapters: Sequence[Adapter]) -> list[Problem]:
    """Adapters whose records show that they were trained on different weights."""
    headers: dict[str, Path] = {}
    tensors: dict[str, dict[str, Path]] = defaultdict(dict)
    for adapter in adapters:
        if adapter.fingerprint:
            headers.setdefault(adapter.fingerprint["headers"], adapter.path)
        for key, digest in adapter.fingerprint.get("tensors", {}).items():
            tensors[key].setdefault(digest, adapter.path)
    if len(headers) > 1:
        return [Problem(str(path), f"was trained on another base than the others: {h}") for h, path in headers.items()]
    return [
        Problem(key, f"is another tensor in the bases of {' and '.join(map(str, found.values()))}")
        for key, found in tensors.items()
        if len(found) > 1
    ]


# PEFT's methods.


@dataclass(frozen=True)
class Combined:
    """One adapter made of several, with what decides it and its ranks. Its tensors are made when they are read."""

    adapter: Adapter
    recipe: Recipe
    ranks: Mapping[str, int]


def combined_adapter(
    adapters: Sequence[Adapter], weights: Sequence[float] | None, name: str, options: Options
) -> tuple[Combined | None, list[Problem]]:
    """The combination, float32 with a scaling of 1; or everything that speaks against it."""
    problems = [problem for adapter in adapters for problem in check_adapter(adapter)]
    problems += different_bases(adapters)
    if not adapters or name not in combining.METHODS:
        return None, problems
    recipe = Recipe(
        name,
        1.0 if options.density is None else options.density,
        options.majority_sign_method or MAJORITY_SIGNS[0],
        options.svd_rank or max((_largest_rank(a) for a in adapters), default=1),
        options.seed or 0,
    )
    modules, misfits = find_modules([a for a in adapters if is_lora(a)], recipe)
    problems += misfits
    if problems or not modules:
        return None, problems
    factors = tuple(weights or [1.0] * len(adapters))
    ranks = {module.name: module.rank(recipe) for module in modules}
    parts = {m.name: dict(zip(m.kind, _made(m, adapters, factors, recipe), strict=True)) for m in modules}
    first = adapters[0]
    adapter = Adapter(
        path=first.path,
        name="+".join(a.name for a in adapters),
        config=replace(
            parse_peft_config(_config(modules, ranks, adapters), first.path / CONFIG),
            strengths={name: Strength(rank, rank, 1.0) for name, rank in ranks.items()},
        ),
        weights_file=first.weights_file,
        tensors=tuple(t for tensors in parts.values() for t in tensors.values()),
        parts=parts,
        full={},
        unused=(),
    )
    return Combined(adapter, recipe, ranks), []


def describe(recipe: Recipe, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Any]:
    """What decides the result."""
    method = recipe.method
    return {
        "method": recipe.name,
        "adapters": [a.digest for a in adapters],
        "weights": list(weights),
        **({"density": recipe.density} if method.prunes else {}),
        **({"majority_sign_method": recipe.majority_sign} if method.elects_sign else {}),
        **({"svd_rank": recipe.svd_rank} if method.on_deltas else {}),
        **({"seed": recipe.seed} if method.prunes == "random" else {}),
    }


def _largest_rank(adapter: Adapter) -> int:
    return max(adapter.config.r, *adapter.config.rank_pattern.values(), 1)


def _made(
    module: Module, adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe
) -> tuple[TensorInfo, TensorInfo]:
    """A and B of the combination, as tensors to be made."""
    refs: dict[str, TensorRef] = {}
    pairs = []
    for i, f in enumerate(module.factors):
        root, file = adapter_root(f.position), adapters[f.position].weights_file
        refs |= {f"a{i}": TensorRef.of(root, file, f.a), f"b{i}": TensorRef.of(root, file, f.b)}
        pairs.append({"position": f.position, "weight": weights[f.position], "scaling": f.scaling})
    made = []
    for part, kind, shape in zip("AB", module.kind, module.shapes(module.rank(recipe)), strict=True):
        settings = {"recipe": asdict(recipe), "module": module.name, "part": part, "pairs": pairs}
        how = Made.of("factor", refs, settings, math.prod(shape[1:]))
        made.append(TensorInfo(factor_key(module, kind), F32, shape, 0, F32.nbytes(math.prod(shape)), how))
    return made[0], made[1]


def factor_key(module: Module, kind: str) -> str:
    """Name of a tensor as PEFT saves it: a parameter of an embedding has no `.weight`."""
    return f"{PREFIX}{module.name}.{kind}" + (".weight" if kind in ("lora_A", "lora_B") else "")


def _config(modules: Sequence[Module], ranks: Mapping[str, int], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """`adapter_config.json`: alpha is r everywhere, so that the scaling is 1."""
    r, pattern = rank_table(ranks)
    raw = [a.config.raw for a in adapters]
    return {
        "auto_mapping": _common(c.get("auto_mapping") for c in raw),
        "base_model_name_or_path": _common(a.base_model for a in adapters),
        "bias": "none",
        "fan_in_fan_out": any(a.config.fan_in_fan_out for a in adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": pattern,
        "revision": _common(c.get("revision") for c in raw),
        # A module inside a wrapped one, attn.base_layer.out_proj, is reached through its wrapper.
        "target_modules": list(dict.fromkeys(m.name.partition(".base_layer.")[0] for m in modules)),
        "task_type": _common(c.get("task_type") for c in raw),
        "use_dora": False,
        "use_rslora": False,
    }


def _common(values: Iterable[Any]) -> Any:
    """The value that all agree on, of those that have one."""
    found = [v for v in values if v is not None]
    return found[0] if found and all(v == found[0] for v in found) else None


def rank_table(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """`r` and `rank_pattern` that give each module its rank.

    r is the largest rank, for readers that set aside room by it and know no patterns. The others are named
    by their last word where all modules of that word have this rank, else in full and anchored, those of one
    rank in one pattern, since readers match every pattern to every module.
    """
    r, by_word = max(ranks.values()), defaultdict(set)
    for name, rank in ranks.items():
        by_word[name.rpartition(".")[2]].add(rank)
    table: dict[str, int] = {}
    in_full: defaultdict[int, list[str]] = defaultdict(list)
    for name, rank in ranks.items():
        word = name.rpartition(".")[2]
        if rank != r and len(by_word[word]) == 1:
            table[re.escape(word)] = rank
        elif rank != r:
            in_full[rank].append(name)
    return r, table | {f"^{_one_of([n.split('.') for n in names])}": rank for rank, names in in_full.items()}


def _one_of(names: Sequence[Sequence[str]]) -> str:
    """A pattern for names of several words; what they begin with in common is in it, and matched, once."""
    following: defaultdict[str, list[Sequence[str]]] = defaultdict(list)
    for word, *rest in names:
        following[word].append(rest)
    found = []
    for word, rests in following.items():
        longer = [rest for rest in rests if rest]
        tail = rf"\.{_one_of(longer)}" if longer else ""
        found.append(re.escape(word) + (f"({tail})?" if tail and len(longer) < len(rests) else tail))
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"
