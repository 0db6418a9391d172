"""An adapter, a directory or a single file: its config, its parts by module, its digest."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from inlay.adapters import diffusers, torchtune
from inlay.adapters.mlx import WEIGHTS as MLX_WEIGHTS
from inlay.adapters.mlx import is_mlx, parse_mlx_config, parse_mlx_name
from inlay.adapters.peft_config import PeftConfig, parse_peft_config
from inlay.adapters.peft_names import FULL, ORIGINAL, PartName, parse_name, part_patterns
from inlay.checkpoints.header import read_header
from inlay.checkpoints.json_files import read_json_object
from inlay.checkpoints.pipeline import is_pipeline
from inlay.checkpoints.refs import TensorInfo
from inlay.checkpoints.torch_bin import read_torch_bin
from inlay.digests import digest_file, join
from inlay.errors import AdapterError, CheckpointError
from inlay.tuners import dense

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FINGERPRINT = "inlay_base.json"
FINGERPRINT_FORMAT = 1
ARGS = "args.json"
PEFT, MLX, IMAGE, TORCHTUNE = "peft", "mlx", "image", "torchtune"
# Where LLaMA-Factory and TRL keep the head of a reward model, which is no part of the causal model.
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
SINGLE_FILES = (".safetensors", ".bin", ".pt", ".ckpt")


@dataclass(frozen=True)
class Adapter:
    """One adapter; tensors are known by span and not read.

    `parts` maps module -> part name -> tensor, `shared` part name -> tensor for what all modules share,
    `full` maps the name of a tensor to its full copy. `turned` says that the pairs are stored transposed:
    A (in, r), B (r, out).
    Names are those of the model in memory when it was trained, without PEFT's prefix.
    `format` says whose files they are. Where `path` is the file of weights itself, `weights_file` is empty.
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
    format: str = PEFT

    @property
    def files(self) -> tuple[str, ...]:
        """The files that decide what it does."""
        return (self.weights_file,) if self.format == IMAGE else (CONFIG, self.weights_file)

    @cached_property
    def digest(self) -> str:
        """Digest of config and weights: the identity of the adapter, wherever it lies."""
        return join(digest_file(self.path / name) for name in self.files)

    @property
    def value_head(self) -> str | None:
        """File of a value head beside the adapter."""
        return next((name for name in VALUE_HEADS if (self.path / name).is_file()), None)

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
    """Read config and headers of an adapter: a directory, or the single file of a LoRA for an image model.

    Raises AdapterError when something is missing, malformed, refused or not understood.
    """
    directory = Path(path)
    if directory.is_file():
        return _read_single(directory, name or directory.stem)
    if not directory.is_dir():
        raise AdapterError(f"{directory}: no such file or directory")
    if not (directory / CONFIG).exists():
        return _read_image_lora(directory, _image_file(directory), name or directory.name)
    raw = read_json_object(directory / CONFIG, AdapterError)
    kind = MLX if is_mlx(raw) else TORCHTUNE if torchtune.own_file(directory) else PEFT
    if kind == TORCHTUNE and (missing := [name for name in ("r", "lora_alpha") if raw.get(name) is None]):
        raise AdapterError(f"{directory / CONFIG}: lacks {' and '.join(missing)} of torchtune's adapter; give both")
    config = (parse_mlx_config if kind == MLX else parse_peft_config)(raw, directory / CONFIG)
    weights_file, tensors = _read_weights(directory, _weights_names(kind, directory))
    parts, full, unused = _sort(tensors, directory / weights_file, _parser(kind, config))
    if kind == MLX and parts and raw.get("fine_tune_type") == "full":
        raise AdapterError(f"{directory / CONFIG}: fine_tune_type is full, and {weights_file} holds pairs for LoRA")
    if kind == TORCHTUNE:
        if config.variant:
            raise AdapterError(f"{directory / CONFIG}: asks for {config.variant}, which torchtune does not train")
        config = torchtune.own_config(config, any("magnitude" in found for found in parts.values()))
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
        turned=kind == MLX,
        format=kind,
        fingerprint=fingerprint,
        args=_optional(directory / ARGS),
    )


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter rather than a model."""
    if path.is_file() or (path / CONFIG).exists():
        return True
    return not is_pipeline(path) and not (path / "config.json").exists() and bool(_image_files(path))


def _weights_names(kind: str, directory: Path) -> Sequence[str]:
    """Files that may hold the weights, first choice first."""
    own = torchtune.own_file(directory) if kind == TORCHTUNE else None
    return (own,) if own else (MLX_WEIGHTS,) if kind == MLX else WEIGHTS


def _read_single(path: Path, name: str) -> Adapter:
    """An adapter that is given by its file."""
    if path.suffix not in SINGLE_FILES:
        raise AdapterError(f"{path}: not a file of weights ({', '.join(SINGLE_FILES)})")
    if (path.parent / CONFIG).exists() and path.name in (*WEIGHTS, MLX_WEIGHTS, torchtune.own_file(path.parent)):
        raise AdapterError(f"{path}: belongs to the {CONFIG} beside it; pass the folder, {path.parent}")
    return _read_image_lora(path, "", name)


def _read_image_lora(path: Path, file: str, name: str) -> Adapter:
    """A LoRA of kohya's trainers or of diffusers: `file` below `path`, or `path` itself."""
    where = path / file
    tensors, metadata = _read_tensors(where)
    if file not in diffusers.WEIGHTS and not diffusers.is_image_lora(t.key for t in tensors):
        raise AdapterError(f"{where}: {_what_is_missing(tensors)}")
    parts, full, unused = _sort(tensors, where, diffusers.parse_diffusers_name)
    config, kept = diffusers.take_config(parts, where, metadata)
    used = {t.key for found in kept.values() for t in found.values()} | {t.key for t in full.values()} | set(unused)
    return Adapter(
        path=path,
        name=name,
        config=config,
        weights_file=file,
        tensors=tuple(t for t in tensors if t.key in used),
        parts=kept,
        full=full,
        unused=unused,
        format=IMAGE,
    )


def _what_is_missing(tensors: Sequence[TensorInfo]) -> str:
    """Why a single file cannot be merged."""
    if any(torchtune.parse_torchtune_name(t.key).part != FULL for t in tensors):
        return f"torchtune's adapter without its {CONFIG}, so alpha is not known; {torchtune.WHAT_TO_GIVE}"
    return (
        f"no names of a LoRA for an image model (kohya, diffusers), and no {CONFIG} beside it; an adapter of a "
        "language model is a folder with both"
    )


def _image_file(directory: Path) -> str:
    """The file of a LoRA for an image model in a directory without a config."""
    if (own := torchtune.own_file(directory)) is not None:
        raise AdapterError(
            f"{directory}: {own} is torchtune's, without its {CONFIG}, so alpha is not known; {torchtune.WHAT_TO_GIVE}"
        )
    files = _image_files(directory)
    if not files:
        raise AdapterError(f"{directory}: {_what_is_here(directory)}")
    named = [file for file in files if file in diffusers.WEIGHTS]
    if not named and len(files) > 1:
        raise AdapterError(f"{directory}: holds several LoRA files ({', '.join(files[:5])}); name one of them")
    return named[0] if named else files[0]


def _image_files(directory: Path) -> list[str]:
    """Files at the top of a directory that are LoRAs for an image model, best first."""
    named = [file for file in diffusers.WEIGHTS if (directory / file).is_file()]
    others = sorted(p.name for p in directory.glob("*.safetensors") if p.name not in named)
    return named or [file for file in others if _is_image_lora(directory / file)]


def _is_image_lora(path: Path) -> bool:
    try:
        return diffusers.is_image_lora(t.key for t in read_header(path).tensors)
    except CheckpointError:
        return False


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path, AdapterError) if path.exists() else {}


def _check_fingerprint(record: Mapping[str, Any], where: Path) -> None:
    """The record of the base is of the format that this version reads."""
    if not record:
        return
    tensors = record.get("tensors")
    right = isinstance(tensors, dict) and all(isinstance(v, str) for v in tensors.values())
    right = right and isinstance(record.get("tokenizer"), (str, type(None)))
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
        return (
            f"this is a model, not an adapter (config.json and no {CONFIG}); pass it with --model. What was trained "
            "with all or some layers (full, freeze, LLaMA Pro) needs no merge"
        )
    if is_pipeline(directory):
        return "this is a diffusers pipeline, not an adapter; pass it with --model"
    if (directory / "finetuning_args.json").exists():
        return (
            "an adapter of LLaMA-Factory before 2024 (finetuning_args.json), which holds the trained layers without "
            f"a {CONFIG}; load and save it with the LLaMA-Factory that made it"
        )
    return f"no {CONFIG}: not an adapter in PEFT's format, nor a LoRA file for an image model"


def _read_weights(directory: Path, names: Sequence[str]) -> tuple[str, tuple[TensorInfo, ...]]:
    for file in names:
        if (directory / file).exists():
            return file, _read_tensors(directory / file)[0]
    raise AdapterError(f"{directory}: {CONFIG} is there, but none of {', '.join(names)}")


def _read_tensors(path: Path) -> tuple[tuple[TensorInfo, ...], Mapping[str, str]]:
    """Tensors of a file and the metadata of its header."""
    try:
        if path.suffix != ".safetensors":
            return read_torch_bin(path), {}
        header = read_header(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    return header.tensors, header.metadata


Sorted = tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], tuple[str, ...]]


def _parser(kind: str, config: PeftConfig) -> Callable[[str], PartName]:
    """How the tensor names of this tool and this method are read."""
    if kind in (MLX, TORCHTUNE):
        return parse_mlx_name if kind == MLX else torchtune.parse_torchtune_name
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
