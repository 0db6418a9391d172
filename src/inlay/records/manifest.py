"""`inlay.json`: what a merged directory is, and what it was made from.

    {"format": 1, "inlay": version, "plan": digest,
     "base":     {"name", "headers", "recipe"?: the manifest of a base that was itself merged},
     "adapters": [{"name", "digest", "tuner", "weight", "rank", "scaling", …}],
     "settings": {"dtype", "combine", "max_shard_bytes"},
     "tensors":  {key: digest of each tensor that differs from the base},
     "files":    {file: {"nbytes", "digest"?}},
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


def is_sealed(directory: Path) -> bool:
    """Whether the manifest of `directory` is byte for byte what `seal` wrote."""
    content = read_manifest(directory) or {}
    content.pop("digest", None)
    return (directory / MANIFEST).read_text("utf-8") == seal(content)
