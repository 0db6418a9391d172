"""How transformers lays a checkpoint out in memory: renamed, stacked, cut, per parameter of the model's class.

Since version 5 transformers stores many models under other names, and in other pieces, than it holds in
memory: experts lie on disk one by one and are one 3-d parameter, a fused Wqkv is three modules. Adapters are
named after the memory. The class of config.json is built on the meta device (no weights), its own renamings are
applied to the keys, and its own conversions to tensors that hold row numbers in place of weights: where a number
ends up is where that row ends up.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from inlay.errors import InputError

# Conversions that move whole rows. Others (rotary permutations, interleaving, decoding) are refused by name.
ROW_OPERATIONS = frozenset({"MergeModulelist", "Concatenate", "Chunk", "Split"})
# Fields of a config that change no name and no shape. Of them some make transformers look for a package or a kernel
# on the hub, whose code it would run.
IGNORED = frozenset(
    {
        "quantization_config", "auto_map", "attn_implementation", "_attn_implementation",
        "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
        "_experts_implementation_internal",
    }
)  # fmt: skip
MOST_RUNS = 16  # of consecutive rows in one matrix: more are a permutation, not a fusion
SOURCE = 1 << 32  # row numbers are `source · SOURCE + row`


@dataclass(frozen=True)
class Slice:
    """A disk tensor's share of a parameter in memory.

    Rows `rows` of the parameter (of its matrix `expert`, where it is a stack made of tensors that lie one by
    one) are rows `disk_rows` of the tensor `key`. `transposed`: the matrices on disk are the transposes.
    """

    key: str
    expert: int | None
    rows: tuple[int, int]
    disk_rows: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True)
class MemoryLayout:
    """Parameters of a class in memory, in the order of registration, and what each is made of.

    `refused` says why a parameter's place cannot be expressed in slices; `unplaced` are keys that the class
    does not have; `transposed_experts` the modules that declare `is_transposed`.
    """

    slices: Mapping[str, tuple[Slice, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]
    unplaced: tuple[str, ...]
    transposed_experts: frozenset[str]


def memory_layout(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> MemoryLayout | None:
    """The layout for a config.json and the shapes of a checkpoint; None for a class that transformers does not know.

    Raises InputError where transformers is not installed, or cannot build the class from this config.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own code
        model = _build(config)
        if model is None:
            return None
        with _one_thread():
            return _lay_out(model, shapes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without torch's own threads, which on thousands of small tensors wait for each other most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _build(config: Mapping[str, Any]) -> Any:
    """The model on the meta device."""
    try:
        import torch
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise InputError(
            "these names differ between memory and disk, which transformers knows: pip install 'inlay[transformers]'"
        ) from None
    named = config.get("architectures") or [""]
    model_type, architecture = config.get("model_type"), str(named[0])
    cls: Any = getattr(transformers, architecture, None)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class is not None
    if not is_model or not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    kept = _kept(config)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)  # its remarks on the config are not ours to make
    try:
        with torch.device("meta"):
            return cls(CONFIG_MAPPING[model_type].from_dict(kept))
    except Exception as error:  # whatever some class of transformers raises on a config that it does not expect
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = re.sub(r"^\s*\w+Error: ", "", lines[-1])
        raise InputError(f"transformers cannot build {architecture} from this config.json: {reason:.200}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and the configs in it, without the fields that are ignored."""
    return {k: _kept(v) if isinstance(v, Mapping) else v for k, v in config.items() if k not in IGNORED}


def _lay_out(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> MemoryLayout:
    memory = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    plain, converted, unplaced = _sort_keys(model, shapes, memory)
    slices: dict[str, tuple[Slice, ...]] = {}
    refused: dict[str, str] = {}
    for name, key in plain.items():
        if _flat(shapes[key]) == _flat(memory[name]):
            slices[name] = (_whole(key, shapes[key]),)
        else:
            refused[name] = f"{key} is {shapes[key]} on disk and {memory[name]} in memory"
    for name, (converter, sources) in converted.items():
        _convert(model, name, converter, sources, shapes, memory, slices, refused)
    turned = frozenset(n for n, m in model.named_modules() if getattr(m, "is_transposed", False) is True)
    ordered = {name: slices[name] for name in memory if name in slices}
    return MemoryLayout(ordered, memory, refused, tuple(unplaced), turned)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if shape else 1
    count = 1
    for n in shape:
        count *= n
    return rows, count


def _whole(key: str, shape: tuple[int, ...]) -> Slice:
    rows = (0, shape[0] if shape else 1)
    return Slice(key, None, rows, rows)


Sources = dict[str, list[str]]  # source pattern -> keys, in the order of the experts


def _sort_keys(
    model: Any, keys: Mapping[str, object], memory: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, tuple[Any, Sources]], list[str]]:
    """Keys by parameter: those that are only renamed, those that a conversion takes, those without a place.

    As transformers does on loading: the name under all renamings, or the name as it is where that is one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    there = dict.fromkeys(memory, True)
    plain: dict[str, str] = {}
    converted: dict[str, tuple[Any, Sources]] = {}
    unplaced = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, there)
        if name not in memory and key in memory:
            name, pattern = key, None
        if name not in memory:
            unplaced.append(key)
        elif pattern is None:
            plain.setdefault(name, key)
        else:
            converted.setdefault(name, (by_pattern[pattern], defaultdict(list)))[1][pattern].append(key)
    return plain, converted, unplaced


def _convert(
    model: Any, name: str, converter: Any, sources: Sources, shapes: Mapping[str, tuple[int, ...]],
    memory: Mapping[str, tuple[int, ...]], slices: dict[str, tuple[Slice, ...]], refused: dict[str, str],
) -> None:  # fmt: skip
    """Slices of the parameters that one conversion makes."""
    keys = [key for pattern in sources for key in sources[pattern]]
    operations = [type(operation).__name__ for operation in converter.operations]
    if operations == ["Transpose"] and len(keys) == 1:
        _transpose(name, keys[0], converter.operations[0], shapes, memory, slices, refused)
        return
    unknown = [operation for operation in operations if operation not in ROW_OPERATIONS]
    columns = {shapes[key][1:] for key in keys}
    odd = any(len(shapes[key]) not in (1, 2) or 0 in shapes[key] for key in keys)
    if unknown or len(columns) != 1 or odd:
        what = ", ".join(unknown) or "tensors of different widths, or without elements"
        refused.update(dict.fromkeys(_targets(name, converter, memory), f"transformers converts it by {what}"))
        return
    try:
        numbered = _run(model, name, converter, sources, shapes)
    except (ValueError, RuntimeError) as error:  # as on loading: sources are missing, or do not fit together
        why = f"transformers cannot make it of the tensors that are stored: {error!s:.200}"
        refused.update(dict.fromkeys(_targets(name, converter, memory), why))
        return
    for made, tags in numbered.items():
        if made not in memory:
            continue
        found, shape = _slices(tags, keys), _shape(tags, next(iter(columns)))
        if shape != memory[made]:
            refused[made] = f"the tensors that are stored make {shape}, in memory it is {memory[made]}"
        elif found is None:
            refused[made] = f"its rows are permuted on loading ({', '.join(operations)})"
        else:
            slices[made] = found


def _targets(name: str, converter: Any, memory: Mapping[str, object]) -> list[str]:
    """All parameters that a conversion makes; `name` is the first."""
    first = converter.target_patterns[0]
    made = [name, *(name.replace(first, target) for target in converter.target_patterns[1:])]
    return [other for other in made if other in memory]


def _transpose(
    name: str, key: str, operation: Any, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, tuple[int, ...]],
    slices: dict[str, tuple[Slice, ...]], refused: dict[str, str],
) -> None:  # fmt: skip
    stored, held = shapes[key], memory[name]
    if len(stored) < 2:
        refused[name] = f"{key} is {stored} on disk and {held} in memory"
        return
    swapped = (*stored[:-2], stored[-1], stored[-2])
    if operation.check_dims and stored == swapped:
        refused[name] = f"{key} {stored} is square, so whether it is transposed on loading cannot be known"
    elif operation.check_dims and stored == held:
        slices[name] = (_whole(key, stored),)
    elif swapped == held and {operation.dim0 % len(stored), operation.dim1 % len(stored)} == {
        len(stored) - 2,
        len(stored) - 1,
    }:
        slices[name] = (Slice(key, None, (0, held[0]), (0, stored[0]), transposed=True),)
    else:
        refused[name] = f"{key} is {stored} on disk and {held} in memory"


def _run(
    model: Any, name: str, converter: Any, sources: Sources, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The conversion on row numbers in place of weights: parameter -> tensor of them, one column wide."""
    import torch

    converter = copy.deepcopy(converter)
    numbered: dict[str, Any] = {}
    at = 0
    for pattern, keys in sources.items():
        numbered[pattern] = []
        for key in keys:
            shape = shapes[key]
            rows = torch.arange(shape[0]) + at * SOURCE
            numbered[pattern].append(rows.reshape(-1, 1) if len(shape) == 2 else rows)
            at += 1
    for operation in converter.operations:
        numbered = operation.convert(
            numbered,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    full = name.replace("*.", "0.")
    ends = next((full.partition(k) for k in numbered if k in full), None)
    return {ends[0] + k + ends[2]: v for k, v in numbered.items()} if ends else numbered


def _shape(tags: Any, columns: tuple[int, ...]) -> tuple[int, ...]:
    """Of what the numbers stand for: with their columns back in place."""
    shape = tuple(tags.shape)
    return shape[:-1] + columns if columns else shape


def _slices(tags: Any, keys: Sequence[str]) -> tuple[Slice, ...] | None:
    """Runs of consecutive rows; None where they are too many to be a fusion."""
    rows = tags.reshape(*tags.shape[:-1]).numpy() if tags.dim() > 1 and tags.shape[-1] == 1 else tags.numpy()
    if rows.ndim == 1:
        runs = list(_runs(rows))
        return _named(runs, keys, None) if len(runs) <= MOST_RUNS else None
    found: list[Slice] = []
    for expert, matrix in enumerate(rows):
        runs = list(_runs(matrix))
        if matrix.ndim != 1 or len(runs) > MOST_RUNS:
            return None
        found += _named(runs, keys, expert)
    return tuple(found)


def _named(runs: Sequence[tuple[int, int, int, int]], keys: Sequence[str], expert: int | None) -> tuple[Slice, ...]:
    return tuple(Slice(keys[source], expert, (a, b), (row, row + b - a)) for a, b, source, row in runs)


def _runs(numbers: Any) -> Iterator[tuple[int, int, int, int]]:
    """(first, last, source, first row in it) of each run of consecutive numbers."""
    import numpy as np

    cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for a, b in pairwise(cuts):
        source, row = divmod(int(numbers[a]), SOURCE)
        yield a, b, source, row
