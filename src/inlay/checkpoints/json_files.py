"""Small JSON files of a checkpoint or adapter, read with one clear message for each way to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inlay.errors import InputError

MAX_JSON_BYTES = 200_000_000  # the largest real index has 12 MB


def read_json_object(path: Path, error: type[InputError]) -> dict[str, Any]:
    """The JSON object in `path`; `error` for a missing, oversized, broken or other-than-object file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path}: {path.stat().st_size} bytes is too large for a JSON file of this kind")
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path}: cannot be read: {reason}") from None
    if text.startswith("version https://git-lfs"):
        raise error(f"{path} is a Git-LFS pointer, not the file itself: fetch it with `git lfs pull`")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
