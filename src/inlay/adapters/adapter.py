"""An adapter directory: its config, its parts by module, its digest."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from inlay.adapters.mlx import WEIGHTS as MLX_WEIGHTS
from inlay.adapters.mlx import is_mlx, parse_mlx_config, parse_mlx_name
from inlay.adapters.peft_config import PeftConfig, parse_peft_config
from inlay.adapters.peft_names import FULL, ORIGINAL, PartName, parse_name, part_patterns
from inlay.checkpoints.header import TensorInfo, read_header
from inlay.checkpoints.json_files import read_json_object
from inlay.checkpoints.torch_bin import read_torch_bin
from inlay.digests import digest_file, join
from inlay.errors import AdapterError, CheckpointError
from inlay.tuners import dense

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FINGERPRINT = "inlay_base.json"
FINGERPRINT_FORMAT = 1
ARGS = "args.json"


@dataclass(frozen=True)
class Adapter:
    """One adapter; tensors are known by span and not read.

    `parts` maps module -> part name -> tensor, `shared` part name -> tensor for what all modules share,
    `full` maps the name of a tensor to its full copy. `turned` says that the pairs are stored transposed:
    A (in, r), B (r, out).
    Names are those of the model in memory when it was trained, without PEFT's prefix.
    """

    path: Path
    name: str
    config: PeftConfig
    weights_file: str
    tensors: tuple[TensorInfo, ...]
    parts: Mapping[str, Mapping[str, TensorInfo]]
    full: Mapping[str, TensorInfo]
    unused: tuple[str, ...]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, TensorInfo] = field(default_factory=dict)
    turned: bool = False

    @cached_property
    def digest(self) -> str:
        """Digest of config and weights: the identity of the adapter, wherever it lies."""
        return join(digest_file(self.path / name) for name in (CONFIG, self.weights_file))

    @property
    def parameters(self) -> int:
        """Number of trained parameters in the file."""
        return sum(_count(t) for t in self.tensors)

    @property
    def base_model(self) -> str | None:
        """The base that the adapter names: its config, or the trainer's `args.json` beside it."""
        named = self.config.base_model or self.args.get("model")
        return str(named) if named else None


def _count(t: TensorInfo) -> int:
    return t.nbytes * 8 // t.dtype.bits


def read_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Read config and headers of an adapter directory.

    Raises AdapterError when something is missing, malformed, refused or not understood.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise AdapterError(f"{directory}: no such directory")
    if not (directory / CONFIG).exists():
        raise AdapterError(f"{directory}: {_what_is_here(directory)}")
    raw = read_json_object(directory / CONFIG, AdapterError)
    from_mlx = is_mlx(raw)
    config = (parse_mlx_config if from_mlx else parse_peft_config)(raw, directory / CONFIG)
    weights_file, tensors = _read_weights(directory, (MLX_WEIGHTS,) if from_mlx else WEIGHTS)
    parse = parse_mlx_name if from_mlx else _parser(config)
    parts, full, unused = _sort(tensors, directory / weights_file, parse)
    if from_mlx and parts and raw.get("fine_tune_type") == "full":
        raise AdapterError(f"{directory / CONFIG}: fine_tune_type is full, and {weights_file} holds pairs for LoRA")
    shared = parts.pop("", {})
    fingerprint = _optional(directory / FINGERPRINT)
    _check_fingerprint(fingerprint, directory / FINGERPRINT)
    return Adapter(
        path=directory,
        name=name or directory.name,
        config=config,
        weights_file=weights_file,
        tensors=tensors,
        parts=parts,
        full=full,
        unused=unused,
        shared=shared,
        turned=from_mlx,
        fingerprint=fingerprint,
        args=_optional(directory / ARGS),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path, AdapterError) if path.exists() else {}


def _check_fingerprint(record: Mapping[str, Any], where: Path) -> None:
    """The record of the base is of the format that this version reads."""
    if not record:
        return
    tensors = record.get("tensors")
    right = isinstance(tensors, dict) and all(isinstance(v, str) for v in tensors.values())
    if record.get("format") != FINGERPRINT_FORMAT or not isinstance(record.get("headers"), str) or not right:
        raise AdapterError(f"{where}: not a record of a base in format {FINGERPRINT_FORMAT}, which this version reads")


def _same_bytes(path: Path, a: TensorInfo, b: TensorInfo) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(path, "rb") as file:
        file.seek(a.start)
        first = file.read(a.nbytes)
        file.seek(b.start)
        return first == file.read(b.nbytes)


def _what_is_here(directory: Path) -> str:
    inner = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG}"))
    if inner:
        return f"no {CONFIG} here, but in {', '.join(inner[:5])}: name one of these folders"
    if (directory / "config.json").exists():
        return f"this is a model, not an adapter (config.json and no {CONFIG}); pass it with --model"
    return f"no {CONFIG}: not an adapter in PEFT's format"


def _read_weights(directory: Path, names: Sequence[str]) -> tuple[str, tuple[TensorInfo, ...]]:
    for file in names:
        path = directory / file
        if path.exists():
            try:
                return file, read_header(path).tensors if file.endswith(".safetensors") else read_torch_bin(path)
            except CheckpointError as error:
                raise AdapterError(str(error)) from None
    raise AdapterError(f"{directory}: {CONFIG} is there, but none of {', '.join(names)}")


Sorted = tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], tuple[str, ...]]


def _parser(config: PeftConfig) -> Callable[[str], PartName]:
    """How the tensor names of this method are read."""
    if config.peft_type not in dense.FILES:
        return parse_name
    file = dense.tuner(dense.FILES[config.peft_type])
    aliases = getattr(file, "ALIASES", {})
    patterns = part_patterns((*file.REQUIRED, *file.OPTIONAL, *aliases), file.SHARED)
    return partial(parse_name, patterns=patterns, aliases=aliases)


def _sort(tensors: tuple[TensorInfo, ...], where: Path, parse: Callable[[str], PartName]) -> Sorted:
    """Tensors by module and part, full copies by name; two tensors for one place are an error."""
    parts: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    full: dict[str, TensorInfo] = {}
    unused: list[str] = []
    names: set[str] = set()
    for t in tensors:
        found = parse(t.key)
        if found.adapter_name:
            names.add(found.adapter_name)
        if found.part == ORIGINAL:
            unused.append(t.key)
            continue
        place = full if found.part == FULL else parts[found.module]
        label = found.module if found.part == FULL else found.part
        if label not in place:
            place[label] = t
        elif _same_bytes(where, t, place[label]):  # PEFT saves the bias of a saved module twice
            unused.append(t.key)
        else:
            raise AdapterError(f"{where}: {t.key!r} and {place[label].key!r} are the same part of {found.module}")
    if len(names) > 1:
        raise AdapterError(f"{where}: holds several adapters ({', '.join(sorted(names))}); save each in its own folder")
    return dict(parts), full, tuple(unused)
