"""A checkpoint directory: which tensors it has, and in which bytes of which file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from inlay.checkpoints import pipeline
from inlay.checkpoints.header import Header, read_header
from inlay.checkpoints.json_files import read_json_object
from inlay.checkpoints.refs import TensorInfo
from inlay.checkpoints.torch_bin import read_torch_bin
from inlay.digests import digest_json
from inlay.errors import CheckpointError

SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Shard:
    """One file of weights. `header` is None for a `.bin`."""

    file: str
    nbytes: int
    tensors: tuple[TensorInfo, ...]
    header: Header | None


@dataclass(frozen=True)
class Checkpoint:
    """Weights, index and config of a model directory; headers only, no tensor data.

    `index_file` is None where one file holds everything. Shards are in the order of their names.

    A diffusers pipeline has `components`, each a checkpoint of its own. Its shards and keys are theirs with the
    component's folder in front (`unet/conv_in.weight`); in the files the keys stand without it.

    The decoded form of a quantised checkpoint has that as `stored` (`inlay.checkpoints.decoded`).
    """

    path: Path
    shards: tuple[Shard, ...]
    index_file: str | None
    config: Mapping[str, Any]
    index: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, Checkpoint] = field(default_factory=dict)
    stored: Checkpoint | None = None

    @property
    def on_disk(self) -> Checkpoint:
        """The checkpoint as its files have it: itself, unless this is its decoded form."""
        return self.stored or self

    @cached_property
    def tensors(self) -> dict[str, tuple[Shard, TensorInfo]]:
        """Key -> where it lies."""
        return {t.key: (shard, t) for shard in self.shards for t in shard.tensors}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all names, dtypes and shapes, and of nothing that a change of shard layout would touch."""
        tensors = self.on_disk.tensors.values()
        return digest_json(sorted((t.key, t.dtype.name, list(t.shape)) for _, t in tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for _, t in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a model directory.

    `model.safetensors`, its sharded form with an index, `pytorch_model.bin` and its sharded form are
    looked for in this order, as transformers does; or a diffusers pipeline. Raises CheckpointError.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if pipeline.is_pipeline(directory):
        return _open_pipeline(directory)
    config_path = directory / "config.json"
    config = read_config(config_path) if config_path.exists() else {}
    for single in (SAFETENSORS, TORCH_BIN):
        if (directory / single).exists():
            return Checkpoint(directory, (_read_shard(directory, single),), None, config)
        index_file = single + INDEX_SUFFIX
        if (directory / index_file).exists():
            return _open_sharded(directory, index_file, config)
    raise CheckpointError(f"{directory}: {_what_is_here(directory)}")


def _open_pipeline(directory: Path) -> Checkpoint:
    components = {
        name: _open_component(directory / name, file) for name, file in pipeline.weights_of(directory).items()
    }
    shards = tuple(_within(name, shard) for name, component in components.items() for shard in component.shards)
    name = pipeline.class_name(directory)
    return Checkpoint(directory, shards, None, {"architectures": [name]} if name else {}, components=components)


def _open_component(directory: Path, file: str) -> Checkpoint:
    """One model of a pipeline, by the file of its weights or their index."""
    config_path = directory / "config.json"
    config = read_config(config_path) if config_path.exists() else {}
    if not file.endswith(".json"):
        return Checkpoint(directory, (_read_shard(directory, file),), None, config)
    if ".bin." in file:
        raise CheckpointError(
            f"{directory / file}: a component in several .bin files is not supported; save the pipeline as safetensors "
            "first (diffusers: save_pretrained with safe_serialization=True)"
        )
    return _open_sharded(directory, file, config)


def _within(folder: str, shard: Shard) -> Shard:
    """The shard of a component as one of the pipeline."""
    tensors = tuple(replace(t, key=f"{folder}/{t.key}") for t in shard.tensors)
    return Shard(f"{folder}/{shard.file}", shard.nbytes, tensors, shard.header)


# The fields that a merge looks at, and what they have to be.
CONFIG_TYPES: dict[str, type] = {
    "model_type": str, "architectures": list, "vocab_size": int, "tie_word_embeddings": bool,
    "text_config": dict, "llm_config": dict, "language_config": dict, "quantization_config": dict,
    "is_encoder_decoder": bool, "id2label": dict,
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """`config.json`, with the fields that a merge looks at of the types they should have, or null."""
    config = read_json_object(path, CheckpointError)
    for section in (config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))):
        for name, kind in CONFIG_TYPES.items():
            value = section.get(name)
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if value is not None and not right:
                raise CheckpointError(f"{path}: {name} must be of type {kind.__name__}, found {value!r:.80}")
    if not all(isinstance(name, str) for name in config.get("architectures") or []):
        raise CheckpointError(f"{path}: architectures must be a list of names")
    return config


def _what_is_here(directory: Path) -> str:
    if (directory / "adapter_config.json").exists():
        return "this is an adapter, not a model: pass it with --adapters, and the base with --model"
    if any(directory.glob("diffusion_pytorch_model*")):
        return f"this is one component of a diffusers pipeline; pass the folder above, with its {pipeline.MODEL_INDEX}"
    return f"no weights found (looked for {SAFETENSORS}, {TORCH_BIN} and their {INDEX_SUFFIX})"


def _read_shard(directory: Path, file: str) -> Shard:
    path = directory / file
    nbytes = path.stat().st_size
    if file.endswith(".safetensors"):
        header = read_header(path)
        return Shard(file, nbytes, header.tensors, header)
    return Shard(file, nbytes, read_torch_bin(path), None)


def _open_sharded(directory: Path, index_file: str, config: Mapping[str, Any]) -> Checkpoint:
    where = directory / index_file
    index = read_json_object(where, CheckpointError)
    if not isinstance(index.get("metadata", {}), (dict, type(None))):
        raise CheckpointError(f"{where}: metadata must be an object, found {index['metadata']!r:.80}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{where}: weight_map must map tensor names to files")
    files = sorted(set(weight_map.values()))
    _check_files(directory, files, where)
    _check_folders(weight_map, where)
    shards = tuple(_read_shard(directory, file) for file in files)
    _check_agreement(shards, weight_map, where)
    return Checkpoint(directory, shards, index_file, config, index)


def _check_files(directory: Path, files: list[str], where: Path) -> None:
    for file in files:
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file or not file:
            raise CheckpointError(f"{where}: names a file outside its directory: {file!r}")
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} of {len(files)} shards missing: {', '.join(missing[:5])}")


def _check_folders(weight_map: Mapping[str, str], where: Path) -> None:
    """A key that begins with the folder of its shard would be taken for a component's."""
    for key, file in weight_map.items():
        if "/" in file and key.startswith(file.partition("/")[0] + "/"):
            raise CheckpointError(
                f"{where}: {key!r} begins with the folder of its shard, {file}; that is not supported"
            )


def _check_agreement(shards: tuple[Shard, ...], weight_map: Mapping[str, str], where: Path) -> None:
    """Index and headers must name the same place for each key."""
    found: dict[str, str] = {}
    for shard in shards:
        for t in shard.tensors:
            if t.key in found:
                raise CheckpointError(f"{where}: {t.key!r} is in two shards, {found[t.key]} and {shard.file}")
            found[t.key] = shard.file
    wrong = [key for key, file in weight_map.items() if found.get(key) != file]
    if wrong:
        key = wrong[0]
        where_found = f"it is in {found[key]}" if key in found else "it is in no shard"
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors are not where the index says: {key!r} should be in {weight_map[key]}, "
            f"{where_found}"
        )
