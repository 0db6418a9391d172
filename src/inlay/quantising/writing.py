"""The quantised checkpoint as files: shards in the layout of the source, and what lies beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from inlay.checkpoints.checkpoint import INDEX_SUFFIX, SAFETENSORS, Checkpoint
from inlay.checkpoints.header import layout
from inlay.checkpoints.refs import TensorInfo
from inlay.checkpoints.spans import BASE, SpanReader, byte_view
from inlay.dtypes import DTYPES, Array, round_nearest
from inlay.output.copying import copy_span, write_at
from inlay.output.json_edit import edit_json
from inlay.output.staging import write_durably
from inlay.plan.layout import TORCH_METADATA, as_safetensors
from inlay.plan.sidecars import CONFIG, plan_sidecars

ROWS_AT_ONCE = 1024  # of a weight that is encoded; a multiple of what any codec wants together


class ShardWriter:
    """Files laid out from headers alone; tensors are put where they belong in any order.

    `settings` says for each key that is quantised how. What is never put is copied from the source, as bytes.
    """

    def __init__(
        self, base: Checkpoint, reader: SpanReader, folder: Path, codec: ModuleType, settings: Mapping[str, Any]
    ) -> None:
        self._base, self._reader, self._folder = base, reader, folder
        self._codec, self._settings = codec, settings
        self._places: dict[str, tuple[str, TensorInfo]] = {}
        self._files: dict[str, int] = {}
        self._put: set[str] = set()
        for shard in base.shards:
            entries = [entry for t in shard.tensors for entry in self._entries(t)]
            metadata = dict(shard.header.metadata) if shard.header is not None else TORCH_METADATA
            header, infos = layout(entries, metadata)
            self._create(as_safetensors(shard.file), header, infos)

    def _entries(self, t: TensorInfo) -> list[tuple[str, Any, tuple[int, ...]]]:
        """A tensor as the output has it: itself, or the parts of its codes."""
        if t.key not in self._settings:
            return [(t.key, t.dtype, t.shape)]
        parts = self._codec.layout(self._settings[t.key])
        return [(self._part(t.key, part), DTYPES[dtype], shape) for part, (dtype, shape) in parts.items()]

    def _part(self, key: str, part: str) -> str:
        return key.removesuffix(self._codec.NAME_SUFFIX) + str(self._codec.PARTS[part])

    def _create(self, file: str, header: bytes, infos: tuple[TensorInfo, ...]) -> None:
        path = self._folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(fd, infos[-1].end if infos else len(header))
        write_at(fd, header, 0)
        self._files[file] = fd
        self._places |= {t.key: (file, t) for t in infos}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def put_weight(self, key: str, weight: Array) -> None:
        """A weight (out, in) in float32, encoded."""
        settings = self._settings[key]
        wholes = {
            part: np.empty(shape, np.dtype(DTYPES[d].raw)) for part, (d, shape) in self._codec.layout(settings).items()
        }
        for first in range(0, len(weight), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, len(weight))
            spans = self._codec.spans(settings, first, last)
            for part, block in self._codec.encode(weight[first:last], settings, first, {}).items():
                axis, begin, end = spans[part]
                wholes[part][(slice(None),) * axis + (slice(begin, end),)] = block
        for part, whole in wholes.items():
            self._write(self._part(key, part), whole)

    def put_rounded(self, key: str, values: Array) -> None:
        """A tensor in float32, rounded once to the type that the source stores it in."""
        dtype = self._base.tensors[key][1].dtype
        self._write(key, round_nearest(values.astype(np.float64), dtype))

    def _write(self, key: str, stored: Array) -> None:
        file, info = self._places[key]
        assert info.nbytes == stored.nbytes, f"{key}: {stored.nbytes} bytes for {info.nbytes}"
        write_at(self._files[file], byte_view(np.ascontiguousarray(stored)), info.start)
        self._put.add(key)

    def finish(self) -> None:
        """Copy what was not put, sync, and write the index where the source has one."""
        for key, (file, info) in self._places.items():
            if key not in self._put:
                shard, source = self._base.tensors[key]
                copy_span(
                    self._reader.fileno(BASE, shard.file), source.start, self._files[file], info.start, info.nbytes
                )
        for fd in self._files.values():
            os.fsync(fd)
        if self._base.index_file is not None:
            write_durably(self._folder / (SAFETENSORS + INDEX_SUFFIX), self._index().encode())

    def _index(self) -> str:
        metadata = dict(self._base.index.get("metadata") or {})
        metadata["total_size"] = sum(info.nbytes for _, info in self._places.values())
        places = {key: file for key, (file, _) in self._places.items()}
        return json.dumps({**self._base.index, "metadata": metadata, "weight_map": places}, indent=2) + "\n"


def write_sidecars(base: Checkpoint, folder: Path, quantisation: Mapping[str, Any]) -> None:
    """Every file beside the weights of the source, byte for byte; config.json gets its `quantization_config`."""
    sidecars, _ = plan_sidecars(base, [], {CONFIG: {"quantization_config": dict(quantisation)}}, (), [])
    for sidecar in sidecars:
        source, target = base.path / sidecar.source, folder / sidecar.file
        if sidecar.edits:
            text = source.read_bytes().decode("utf-8")
            write_durably(target, edit_json(text, sidecar.edits, sidecar.removed).encode())
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as read, open(target, "wb") as write:
            copy_span(read.fileno(), 0, write.fileno(), 0, source.stat().st_size)
            os.fsync(write.fileno())
