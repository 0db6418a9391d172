"""Digests of bytes and of JSON: BLAKE3, written with its name, `blake3:…`.

BLAKE3 because a merge digests what it writes while the bytes are still in cache, at several times
the speed of SHA-256, and because it is a cryptographic hash: equal digests mean equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

CHUNK = 1 << 22


def hasher() -> Any:
    """A digest in progress: `update(bytes)`, then `name(h)`."""
    return blake3()


def name(h: Any) -> str:
    """The digest of what went into `h`, with the name of its function."""
    return f"blake3:{h.hexdigest()}"


def digest_bytes(data: Any) -> str:
    """Digest of `data`: bytes, or a contiguous array of them."""
    return name(blake3(data))


def digest_json(value: Any) -> str:
    """Digest of a JSON value in one spelling: sorted keys, no spaces."""
    return digest_bytes(_spelled(value))


def digest_object(members: Mapping[str, Any], listed: str, items: Iterable[Any]) -> str:
    """Digest of a JSON object with one more member, a list that is spelled item by item, since it may be long.

    Law: `digest_object(m, listed, i) == digest_json({**m, listed: [*i]})`.
    """
    h = blake3()
    for i, member in enumerate(sorted({*members, listed})):
        h.update((b"," if i else b"{") + _spelled(member) + b":")
        if member != listed:
            h.update(_spelled(members[member]))
            continue
        h.update(b"[")
        for j, item in enumerate(items):
            h.update(b"," * (j > 0) + _spelled(item))
        h.update(b"]")
    h.update(b"}")
    return name(h)


def _spelled(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def digest_file(path: Path) -> str:
    """Digest of a file's content."""
    h = blake3()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            h.update(chunk)
    return name(h)


def join(digests: Iterable[str]) -> str:
    """Digest of a sequence of digests: how the parts of one tensor become its digest."""
    return digest_bytes("\n".join(digests).encode())
