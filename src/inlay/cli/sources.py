"""Where base and adapters come from: a directory, or an id on a hub."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from inlay.adapters.adapter import Adapter, read_adapter
from inlay.errors import InputError

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(name: str, revision: str | None = None, use_modelscope: bool = False) -> Path:
    """Local directory of a model or adapter, or an adapter's file; an id is downloaded, or found in the local cache."""
    path = Path(name)
    if os.path.exists(path):  # False for names that no file system can hold
        return path
    if not _ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"{name}: no such directory")
    return _from_modelscope(name, revision) if use_modelscope else _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: no such directory, and not to be had from the Hugging Face Hub ({reason})") from None


def _from_modelscope(name: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise InputError("--use_modelscope needs the modelscope package: pip install 'inlay[modelscope]'") from None
    return Path(snapshot_download(name, revision=revision))


def open_adapters(args: argparse.Namespace) -> list[Adapter]:
    """The adapters of the command line, in order; equal names get a number."""
    adapters: list[Adapter] = []
    for name in args.adapters:
        path = resolve(name, None, args.use_modelscope)
        label = path.stem if path.is_file() else path.resolve().name
        taken = [a.name for a in adapters]
        unique = label if label not in taken else f"{label}#{taken.count(label) + 1}"
        adapters.append(read_adapter(path, unique))
    return adapters


def find_model(args: argparse.Namespace, adapters: Sequence[Adapter]) -> Path:
    """The base: `--model`, or the one that the adapters name."""
    if args.model:
        return resolve(args.model, args.revision, args.use_modelscope)
    named = {a.base_model for a in adapters} - {None}
    if not named:
        raise InputError("no base: give --model (the adapter does not name one)")
    if len(named) > 1:
        raise InputError(
            f"the adapters name different bases: {', '.join(sorted(map(str, named)))}; choose with --model"
        )
    name = str(named.pop())
    try:
        return resolve(name, args.revision, args.use_modelscope)
    except InputError as error:
        raise InputError(f"the base that the adapter names cannot be found; give --model. {error}") from None
