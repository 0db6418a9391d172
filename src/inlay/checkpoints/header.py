"""The safetensors layout: one definition for reading and for writing.

    8 bytes      n, little-endian unsigned: length of the header
    n bytes      JSON object {key: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__"?: {str: str}}
    the rest     the tensors, row-major, little-endian, end to end with no hole

Offsets count from the end of the header, ends are exclusive. The rules that a file must keep are
those of the format's own validator (https://github.com/huggingface/safetensors, README, "Format"):
spans tile the rest of the file, keys are unique, sizes agree with shape and dtype.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.checkpoints.refs import TensorInfo
from inlay.digests import digest_bytes
from inlay.dtypes import DTYPES, DType
from inlay.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_SIZE = 1 << 62
ALIGNMENT = 8
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors, in the order in which they lie."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    raw: bytes  # length field and JSON as stored, so that a copy can keep them

    @property
    def digest(self) -> str:
        return digest_bytes(self.raw)


class _Duplicate(Exception):
    """A key that stands twice in one JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Duplicate(key)
        found[key] = value
    return found


def read_header(path: Path) -> Header:
    """Header of the safetensors file at `path`, checked; no tensor data is read.

    Raises CheckpointError for anything that the format does not allow.
    """
    nbytes = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(len(LFS_POINTER))
        if prefix == LFS_POINTER:
            raise CheckpointError(
                f"{path} is a Git-LFS pointer, not the file itself: fetch it with `git lfs pull` in that repository"
            )
        length = header_length(prefix[:8], nbytes, str(path))
        file.seek(0)
        return parse_header(file.read(8 + length), nbytes, str(path))


def header_length(prefix: bytes, file_nbytes: int, where: str) -> int:
    """Length of the JSON part, from the first eight bytes of a file of `file_nbytes`."""
    if len(prefix) < 8:
        raise CheckpointError(f"{where}: not a safetensors file: {file_nbytes} bytes, a header length needs 8")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: not a safetensors file: header of {length} bytes, the limit is {MAX_HEADER_BYTES}"
        )
    if 8 + length > file_nbytes:
        raise CheckpointError(
            f"{where}: truncated: the header alone has {length} bytes, the file {file_nbytes}; download it again"
        )
    return length


def parse_header(raw: bytes, file_nbytes: int, where: str) -> Header:
    """Header from its bytes (length field included) and the size of the whole file.

    Law: the spans of the result are ordered and tile `[len(raw), file_nbytes)`.
    """
    try:
        parsed = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_unique)
    except _Duplicate as error:
        raise CheckpointError(f"{where}: key {error.args[0]!r} stands twice in the header") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: header is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: header is not a JSON object")
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map strings to strings")
    tensors = [_tensor(key, entry, len(raw), where) for key, entry in parsed.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    _check_tiling(tensors, len(raw), file_nbytes, where)
    return Header(tuple(tensors), metadata, raw)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _count(shape: Sequence[int]) -> int:
    """Elements of a shape; MAX_SIZE stands for anything larger, however long the shape is."""
    count = 0 if 0 in shape else 1
    for size in shape:
        count *= size
        if count >= MAX_SIZE:
            return MAX_SIZE
    return count


def _tensor(key: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    if not key.isascii() and any("\ud800" <= c <= "\udfff" for c in key):
        raise CheckpointError(f"{where}: {key!r}: a key with half a character (a lone surrogate)")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: {key!r}: expected dtype, shape and data_offsets, found {entry!r:.200}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: {key!r}: unknown dtype {entry['dtype']!r:.40}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise CheckpointError(f"{where}: {key!r}: bad shape {shape!r:.100}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise CheckpointError(f"{where}: {key!r}: bad data_offsets {offsets!r:.100}")
    start, end = offsets
    count = _count(shape)
    if count * dtype.bits != 8 * (end - start):
        needs = f"{count * dtype.bits / 8:g} bytes" if count < MAX_SIZE else "more bytes than there are"
        raise CheckpointError(
            f"{where}: {key!r}: {dtype.name} {shape!r:.100} needs {needs}, its span has {end - start}"
        )
    return TensorInfo(key, dtype, tuple(shape), data_start + start, data_start + end)


def _check_tiling(tensors: Sequence[TensorInfo], data_start: int, file_nbytes: int, where: str) -> None:
    at, before = data_start, "the header"
    for t in tensors:
        if t.start != at:
            kind = "overlaps" if t.start < at else "leaves a hole after"
            raise CheckpointError(f"{where}: {t.key!r} {kind} {before} (starts at {t.start}, expected {at})")
        at, before = t.end, repr(t.key)
    if at != file_nbytes:
        what = "truncated" if at > file_nbytes else "longer than its header says"
        raise CheckpointError(f"{where}: {what}: tensors end at byte {at}, the file at {file_nbytes}")


def layout(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """Header bytes for `entries` in this order, and where each tensor goes in the file.

    The order is kept while every tensor stays aligned to its element, which loaders rely on;
    otherwise wider elements come first, as the format's own writer has it.
    Law: `parse_header(*layout(…))` gives the same tensors.
    """
    ordered = list(entries)
    if not _aligned(ordered):
        ordered.sort(key=lambda e: -e[1].bits)
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, spans = 0, []
    for key, dtype, shape in ordered:
        end = at + dtype.nbytes(math.prod(shape))
        described[key] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [at, end]}
        spans.append((key, dtype, shape, at, end))
        at = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    raw = struct.pack("<Q", len(text)) + text
    return raw, tuple(TensorInfo(k, d, s, len(raw) + a, len(raw) + b) for k, d, s, a, b in spans)


def _aligned(entries: Iterable[tuple[str, DType, tuple[int, ...]]]) -> bool:
    at = 0
    for _, dtype, shape in entries:
        if at % max(1, dtype.bits // 8):
            return False
        at += dtype.nbytes(math.prod(shape))
    return True
