"""Which weights are quantised: the matrices of the decoder's layers, and nothing else.

Embeddings, the head, norms, vision towers stay as they are, and so do routers and gates of experts: they decide where
a token goes, and are small.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from inlay.errors import SHOWN_PROBLEMS, InputError

if TYPE_CHECKING:
    from inlay.quantising.skeleton import Skeleton

Module = Any
FEWEST_ROWS = 32  # a matrix with fewer is a gate


@dataclass(frozen=True)
class Choice:
    """Parameters that are quantised, the settings of the codec by key on disk, and modules that stay as they are."""

    parameters: frozenset[str]
    settings: Mapping[str, Mapping[str, Any]]
    excluded: tuple[str, ...]


def choose(skeleton: Skeleton, codec: ModuleType, options: Mapping[str, Any], keep: Sequence[str]) -> Choice:
    """The choice for a model. `keep` are patterns (`re.search`) of modules to leave as they are.

    Raises InputError naming all weights whose shape the format does not hold.
    """
    patterns = [_pattern(text) for text in keep]
    wanted = [
        prefix + name
        for prefix, layer in zip(skeleton.prefixes, skeleton.layers, strict=True)
        for name in _matrices(layer)
        if _stored_alone(skeleton, prefix + name)
    ]
    wanted = [name for name in wanted if not any(p.search(name) for p in patterns)]
    keys = _keys(skeleton, wanted)
    settings, problems = {}, []
    for key in keys:
        try:
            settings[key] = codec.fresh(skeleton.base.tensors[key][1].shape, options)
        except ValueError as error:
            problems.append(f"  {key}  {error}")
    if problems:
        shown = "\n".join(problems[:SHOWN_PROBLEMS])
        more = f"\n  … and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise InputError(
            f"cannot quantise ({len(problems)} weights do not fit, nothing was written)\n{shown}{more}\n"
            "  Choose another group size, or leave these modules as they are."
        )
    if not settings:
        raise InputError(f"{skeleton.base.path}: the layers have no linear modules to quantise")
    chosen = {name for name in wanted if all(piece.key in settings for piece in skeleton.slices(name))}
    return Choice(frozenset(chosen), settings, _excluded(skeleton, settings, codec.NAME_SUFFIX))


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"{text!r} is no pattern: {error}") from error


def _matrices(layer: Module) -> list[str]:
    """Weights of linear modules, and stacks of experts."""
    import torch

    routers = _routers(layer)
    linears = [
        f"{name}.weight"
        for name, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear) and m.out_features >= FEWEST_ROWS and f"{name}.weight" not in routers
    ]
    return linears + [name for name, p in layer.named_parameters() if p.dim() == 3]


def _routers(layer: Module) -> list[str]:
    """Matrices with a row for each expert, beside the experts: linear modules, or modules of their own as in most."""
    stacks = [(_above(name, 2), p.shape[0]) for name, p in layer.named_parameters() if p.dim() == 3]
    matrices = [(_above(name, 2), p.shape[0], name) for name, p in layer.named_parameters() if p.dim() == 2]
    return [name for block, rows, name in matrices if (block, rows) in stacks]


def _above(name: str, levels: int) -> str:
    return ".".join(name.split(".")[:-levels])


def _stored_alone(skeleton: Skeleton, name: str) -> bool:
    """Whether each of its pieces is a matrix of its own on disk; a stack that is stored as one has no place in AWQ."""
    tensors = skeleton.base.tensors
    return all(
        piece.key.endswith(".weight") and len(tensors[piece.key][1].shape) == 2 and not piece.transposed
        for piece in skeleton.slices(name)
    )


def _keys(skeleton: Skeleton, names: Sequence[str]) -> list[str]:
    """Keys all of whose rows belong to these parameters, in the order of these."""
    rows: dict[str, int] = defaultdict(int)
    for name in names:
        for piece in skeleton.slices(name):
            rows[piece.key] += piece.disk_rows[1] - piece.disk_rows[0]
    return [key for key, count in rows.items() if count == skeleton.base.tensors[key][1].shape[0]]


def _excluded(skeleton: Skeleton, settings: Mapping[str, Any], suffix: str) -> tuple[str, ...]:
    """Linear modules that are not quantised; a whole part of the model by its name, where nothing in it is.

    Loaders take an entry for a beginning of names (transformers) or for a part of them (vLLM), so an entry must not
    occur in the name of a quantised module.
    """
    import torch

    quantised = [key.removesuffix(suffix) for key in settings]
    others = []
    for name, module in skeleton.model.named_modules():
        if isinstance(module, torch.nn.Linear) or (module is skeleton.model.get_output_embeddings()):
            others += [name] if f"{name}.weight" not in settings else []
    for prefix, layer in zip(skeleton.prefixes, skeleton.layers, strict=True):
        others += [prefix + name.removesuffix(".weight") for name in _routers(layer)]
    found: list[str] = []
    for name in dict.fromkeys(others):
        if name in quantised:
            continue
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        short = next((p for p in prefixes if not any(p in module for module in quantised)), None)
        if short is not None:
            found.append(short)
    return tuple(dict.fromkeys(found))
