"""Digests of tensors, and the record of the base that an adapter was trained on.

A tensor is digested in leaves of whole rows, about LEAF_BYTES each, so that threads can share the work
and a digest can be taken while the bytes pass by: its digest is that of the list of its leaves.

`inlay_base.json` beside an adapter holds
    {"format": 1, "headers": digest of all names, dtypes and shapes, "tensors": {key: digest}, "tokenizer": digest}

The tensors are those that the adapter touches, as they are stored: of a base in codes, codes and scales. `tokenizer`
is missing in older records, and null for a base without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inlay.adapters.adapter import FINGERPRINT_FORMAT
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.digests import digest_bytes, digest_file, digest_json, hasher, join, name
from inlay.errors import InputError

LEAF_BYTES = 1 << 22
PIECE_BYTES = 1 << 20


def leaf_rows(row_nbytes: int) -> int:
    """Rows in a leaf of a tensor whose rows have this many bytes."""
    return max(1, LEAF_BYTES // max(1, row_nbytes))


def tensor_digest(reader: SpanReader, ref: TensorRef) -> str:
    """Digest of a stored tensor, read leaf by leaf."""
    rows, _ = ref.matrix
    row_nbytes = ref.nbytes // rows if rows else 0
    step = leaf_rows(row_nbytes)
    return join(_leaf(reader, ref, i * row_nbytes, min(rows, i + step) * row_nbytes) for i in range(0, rows, step))


def _leaf(reader: SpanReader, ref: TensorRef, start: int, end: int) -> str:
    """Digest of a leaf; one that is a single long row is read in pieces."""
    h = hasher()
    for at in range(start, end, PIECE_BYTES):
        block = np.empty(min(PIECE_BYTES, end - at), np.uint8)
        reader.into(ref, at, block)
        h.update(block)
    return name(h)


def array_digest(data: memoryview, shape: Sequence[int]) -> str:
    """Digest of a tensor of this shape from all of its bytes: that of `tensor_digest`."""
    rows = shape[0] if len(shape) > 1 else 1
    row_nbytes = len(data) // rows if rows else 0
    step = leaf_rows(row_nbytes) * row_nbytes
    return join(digest_bytes(data[at : at + step]) for at in range(0, len(data), step))


# The files that decide which numbers a text becomes; how a conversation becomes a text is no part of it.
VOCABULARY_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "added_tokens.json", "tekken.json",
)  # fmt: skip


def tokenizer_digest(directory: Path) -> str | None:
    """Digest of the vocabulary of a model directory; None where it has none."""
    found = {name: digest_file(directory / name) for name in VOCABULARY_FILES if (directory / name).is_file()}
    return digest_json(found) if found else None


def make_fingerprint(base: Checkpoint, keys: Iterable[str]) -> Mapping[str, Any]:
    """The record of `base` for an adapter that touches `keys`, names of tensors in its files."""
    base = base.on_disk
    tensors = dict(stored_digests(base, sorted(keys)))
    return {
        "format": FINGERPRINT_FORMAT,
        "headers": base.fingerprint,
        "tensors": tensors,
        "tokenizer": tokenizer_digest(base.path),
    }


def stored_digests(base: Checkpoint, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Key and digest of tensors as the files of `base` have them."""
    with SpanReader({BASE: base.path}) as reader:
        for key in keys:
            shard, info = base.on_disk.tensors[key]
            yield key, tensor_digest(reader, TensorRef.of(BASE, shard.file, info))


def check_recorded(base: Checkpoint, recorded: Mapping[str, str], adapter: str) -> None:
    """Raises InputError when a tensor of `base` is not the one that `adapter` recorded: key -> digest."""
    for key, found in stored_digests(base, recorded):
        check_digest(key, found, recorded[key], adapter)


def check_digest(key: str, found: str, recorded: str, adapter: str) -> None:
    """Raises InputError when the digest is not the recorded one."""
    if found != recorded:
        raise InputError(
            f"{adapter} was trained on another base: {key} has other values (recorded {recorded}, here {found}). "
            "Give the base it was trained on with --model. Nothing was written"
        )
