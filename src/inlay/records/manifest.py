"""`inlay.json`: what a merged directory is, and what it was made from.

    {"format": 1, "inlay": version, "plan": digest,
     "base":     {"name", "headers", "recipe"?: the manifest of a base that was itself merged},
     "adapters": [{"name", "digest", "tuner", "weight", "rank", "scaling", …}],
     "settings": {"dtype", "combine", "max_shard_bytes", "options", "quant"},
     "tensors":  {key: digest of each tensor that differs from the base},
     "files":    {file: {"nbytes", "digest"?}},
     "survival": {"changed", "error", "kept", …: how much of the adapters is in the result},
     "order_matters", "notes", "warnings",
     "digest": of all of the above}

It is written last, so that a directory with a manifest is whole. It names no path and no time: the same
plan on the same inputs writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.checkpoints.json_files import read_json_object
from inlay.digests import digest_json
from inlay.dtypes import DTYPES
from inlay.errors import CheckpointError

FORMAT = 1
MANIFEST = "inlay.json"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, or None where it has none. Raises CheckpointError for another format."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    found = read_json_object(path, CheckpointError)
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path}: manifest format {found.get('format')!r}, this version reads {FORMAT}")
    return found


def seal(content: Mapping[str, Any]) -> str:
    """Text of a manifest with its own digest: one spelling, so that any change of a byte shows."""
    sealed = {**content, "digest": digest_json(content)}
    return json.dumps(sealed, indent=1, ensure_ascii=False) + "\n"


def _well_formed(content: Mapping[str, Any]) -> bool:
    """Whether the parts that are read have the types they should have."""
    sections = [content.get(name) for name in ("base", "settings", "tensors", "files")]
    adapters = content.get("adapters")
    if not all(isinstance(s, dict) for s in sections) or not isinstance(adapters, list):
        return False
    base, settings, tensors, files = sections
    assert base is not None and settings is not None and tensors is not None and files is not None
    return (
        isinstance(base.get("headers"), str)
        and settings.get("dtype") in (None, *DTYPES)
        and isinstance(settings.get("combine"), str)
        and isinstance(settings.get("max_shard_bytes"), (int, type(None)))
        and all(isinstance(settings.get(name, {}), dict) for name in ("options", "quant"))
        and all(isinstance(digest, str) for digest in tensors.values())
        and all(isinstance(f, dict) and isinstance(f.get("nbytes"), int) for f in files.values())
        and all(isinstance(a, dict) and isinstance(a.get("digest"), str) for a in adapters)
        and all(isinstance(a.get("weight"), (int, float)) for a in adapters)
    )


def is_sealed(directory: Path) -> bool:
    """Whether the manifest of `directory` is byte for byte what `seal` wrote, and of the form that it should have."""
    if not (directory / MANIFEST).exists():
        return False
    content = read_manifest(directory) or {}
    content.pop("digest", None)
    if not _well_formed(content):
        return False
    return (directory / MANIFEST).read_bytes() == seal(content).encode("utf-8", "surrogatepass")
