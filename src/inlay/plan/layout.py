"""Which tensor goes to which output file: the base's own layout, unless another shard size is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inlay.checkpoints.checkpoint import INDEX_SUFFIX, SAFETENSORS, Checkpoint
from inlay.plan.types import Coded, Entry, ShardPlan

TORCH_METADATA = {"format": "pt"}
USUAL_SHARD_BYTES = 5_000_000_000


def lay_out(
    base: Checkpoint, by_shard: Sequence[tuple[str, Sequence[Entry | Coded]]], max_shard_bytes: int | None
) -> tuple[ShardPlan, ...]:
    """Output shards. `by_shard` holds the entries of each base shard, new ones at its end."""
    if max_shard_bytes is not None:
        return _split([entry for _, entries in by_shard for entry in entries], max_shard_bytes)
    shards = {shard.file: shard for shard in base.on_disk.shards}  # with codes and all that belongs to them
    plans = []
    for file, entries in by_shard:
        header = shards[file].header
        stored = [(t.key, t.dtype, t.shape) for t in shards[file].tensors]
        same = header is not None and [(e.key, e.dtype, e.shape) for e in entries] == stored
        metadata = dict(header.metadata) if header is not None else TORCH_METADATA
        plans.append(ShardPlan(as_safetensors(file), tuple(entries), metadata, file if same else None))
    return tuple(plans)


def as_safetensors(file: str) -> str:
    """Output name of a shard: `.bin` shards become safetensors under the name that loaders look for."""
    if not file.endswith(".bin"):
        return file
    folder, slash, name = file.rpartition("/")
    if name.startswith("pytorch_model"):  # diffusers keeps the stem: diffusion_pytorch_model
        name = name.replace("pytorch_model", "model", 1)
    return folder + slash + name.removesuffix(".bin") + ".safetensors"


def stored_key(file: str, key: str) -> str:
    """The name of a tensor in its file: that of the plan without the folder of a pipeline's component."""
    folder, slash, _ = file.partition("/")
    return key.removeprefix(folder + slash) if slash else key


def _split(entries: Sequence[Entry | Coded], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Fill shards in order; a tensor larger than the limit has a shard of its own."""
    groups: list[list[Entry | Coded]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    if len(groups) == 1:
        return (ShardPlan(SAFETENSORS, tuple(groups[0]), TORCH_METADATA),)
    count = len(groups)
    return tuple(
        ShardPlan(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group), TORCH_METADATA)
        for i, group in enumerate(groups, 1)
    )


def index_file(shards: Sequence[ShardPlan]) -> str | None:
    """Name of the index that these shards need."""
    return None if [s.file for s in shards] == [SAFETENSORS] else SAFETENSORS + INDEX_SUFFIX


def make_index(base: Checkpoint, shards: Sequence[ShardPlan]) -> Mapping[str, Any] | None:
    """Content of the index: the base's own, with the places and the total size of what is written.

    None where one file holds everything, or where the base's index is right as it is.
    """
    if base.components or index_file(shards) is None:  # a component's index is copied, its size edited
        return None
    places = {entry.key: shard.file for shard in shards for entry in shard.entries}
    old = base.index.get("weight_map", {})
    ordered = {key: places[key] for key in old if key in places} | places
    metadata = dict(base.index.get("metadata") or {})
    metadata["total_size"] = sum(entry.nbytes for shard in shards for entry in shard.entries)
    if "total_parameters" in metadata and set(places) != set(old):
        metadata["total_parameters"] = sum(entry.count for shard in shards for entry in shard.entries)
    index = {**base.index, "metadata": metadata, "weight_map": ordered}
    return None if index == base.index and base.index_file == SAFETENSORS + INDEX_SUFFIX else index
