"""Merged models kept for engines that cannot take merged tensors as a stream.

    <cache>/merged/<key>/        an ordinary merged directory, as `run_plan` publishes it: whole or absent
    <cache>/merged/<key>.lock    held while the directory is made (exclusive) or used (shared)
    <cache>/digests.json         digests of base files, by path, size and times, so that they are read once

The key is a digest of contents: every file of the base that takes part, the adapters, the settings and the version
of `inlay`. A retrained adapter, or another base of the same shapes, has another key. Only directories with a sealed
manifest whose files all have the sizes that it says count; others are made again.

The place is `--cache_dir`, else the variable INLAY_CACHE_DIR, else `$XDG_CACHE_HOME/inlay` (~/.cache/inlay).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay import __version__
from inlay.checkpoints.spans import BASE
from inlay.digests import digest_file, digest_json
from inlay.errors import CheckFailed, CheckpointError, InputError, OutputError, PlanError
from inlay.output.destination import check_destination
from inlay.output.staging import write_durably
from inlay.plan.build import OVERHEAD_BYTES
from inlay.plan.types import Plan
from inlay.records.manifest import is_sealed, read_manifest
from inlay.run.execute import run_plan
from inlay.run.shard import Progress
from inlay.verification.verify import verify_plan

VARIABLE = "INLAY_CACHE_DIR"
KEY_CHARACTERS = 32
# What a merge leaves in the folder: entries, locks, and the staging folders of interrupted ones.
_ENTRY = re.compile(rf"[0-9a-f]{{{KEY_CHARACTERS}}}")
_LEFTOVER = re.compile(rf"\.([0-9a-f]{{{KEY_CHARACTERS}}})\.inlay[-.].*")


@dataclass(frozen=True)
class CacheEntry:
    """One merged model of the cache. `used` is the time of its last use, in seconds since the epoch."""

    key: str
    path: Path
    nbytes: int
    used: float
    base: str
    adapters: tuple[str, ...]
    complete: bool


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the cache, which need not be there."""
    given = cache_dir or os.environ.get(VARIABLE)
    if given:
        return Path(os.path.abspath(os.path.expanduser(given)))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "inlay"


@contextmanager
def merged_copy(
    plan: Plan, cache_dir: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> Iterator[Path]:
    """The merged model of `plan` as a directory, made unless it is there; `clear_cache` leaves it alone meanwhile.

    Another process that makes the same one is waited for. Raises what `run_plan` raises.
    """
    root = cache_folder(cache_dir)
    folder = root / "merged"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}; choose another with --cache_dir") from None
    path = folder / cache_key(plan, root)
    while True:
        with _locked(path, fcntl.LOCK_EX) as fd:
            if not is_complete(path):
                _make(plan, path, progress)
            os.utime(path)
            fcntl.flock(fd, fcntl.LOCK_SH)
            # Another process may hold the lock between the one and the other, and clear the entry.
            if _is_current(fd, _lock_of(path)) and path.is_dir():
                yield path
                return


def _make(plan: Plan, path: Path, progress: Progress | None) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    if problems := check_destination(path, plan.roots, False, plan.cost.written + OVERHEAD_BYTES):
        raise PlanError(problems, ["This merged copy goes to the cache; --cache_dir chooses another place."])

    def check(folder: Path) -> None:
        if not verify_plan(plan, folder, full=False, staged=True).exact:
            raise CheckFailed(f"{path}: the merged weights are not what was planned; nothing was kept")

    run_plan(plan, path, progress=progress, check=check)


@contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    """The lock beside a path; raises BlockingIOError with LOCK_NB if another process holds it."""
    lock = _lock_of(path)
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, how)
            if _is_current(fd, lock):
                yield fd
                return
        finally:
            os.close(fd)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_current(fd: int, path: Path) -> bool:
    """Whether the lock file is still there under its name: who clears the cache removes it."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def cache_key(plan: Plan, root: Path) -> str:
    """Digest of all that decides the merged directory, shortened. Base files are read once, and then known by `root`.

    The plan's own digest has the adapters' contents, the settings and the base's headers; the bytes of the base's
    weights and of all other files come in here.
    """
    weights = [(f.root, f.file) for f in plan.inputs.files if f.root == BASE]
    others = [(s.root, s.source) for s in plan.sidecars]
    with _known_digests(root / "digests.json") as known:
        files = [[root_, file, known.digest(plan.roots[root_] / file)] for root_, file in sorted({*weights, *others})]
    digest = digest_json({"inlay": __version__, "plan": plan.digest, "files": files})
    return digest.removeprefix("blake3:")[:KEY_CHARACTERS]


class _Known:
    """Digests of files by path, size, inode and times."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.changed = False

    def digest(self, path: Path) -> str:
        real = os.path.realpath(path)
        stat = os.stat(real)
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = self.found.get(real)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == mark):
            entry = self.found[real] = [mark, digest_file(Path(real))]
            self.changed = True
        return str(entry[1])


@contextmanager
def _known_digests(path: Path) -> Iterator[_Known]:
    """Those on record; new ones are added. One process reads files at a time, so that a large base is read once.

    A record that cannot be read only costs time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, fcntl.LOCK_EX):
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            found = {}
        known = _Known(found if isinstance(found, dict) else {})
        yield known
        if known.changed:
            there = {name: entry for name, entry in known.found.items() if os.path.exists(name)}
            write_durably(path, json.dumps(there).encode())


def is_complete(path: Path) -> bool:
    """Whether an entry has a sealed manifest, and every file that it names has its size."""
    try:
        if not is_sealed(path):
            return False
        files = (read_manifest(path) or {})["files"]
        return all((path / name).stat().st_size == f["nbytes"] for name, f in files.items())
    except (OSError, CheckpointError):
        return False


def list_cache(cache_dir: str | os.PathLike[str] | None = None) -> list[CacheEntry]:
    """What the cache has, last used first; interrupted merges are listed as not complete.

    Raises InputError for a place that is no folder, or one that cannot be read.
    """
    folder = cache_folder(cache_dir) / "merged"
    try:
        paths = [path for path in folder.iterdir() if _key(path) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted(filter(None, map(_entry, paths)), key=lambda e: (-e.used, e.key))


def _key(path: Path) -> str | None:
    """The key that a folder of the cache belongs to; None for what is not the cache's."""
    if _ENTRY.fullmatch(path.name):
        return path.name
    leftover = _LEFTOVER.fullmatch(path.name)
    return leftover[1] if leftover else None


def _entry(path: Path) -> CacheEntry | None:
    """None for what another process has removed, or published under another name, meanwhile."""
    try:
        return _described(path)
    except FileNotFoundError:
        return None


def _described(path: Path) -> CacheEntry:
    complete = bool(_ENTRY.fullmatch(path.name)) and is_complete(path)
    manifest = (read_manifest(path) or {}) if complete else {}
    nbytes = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return CacheEntry(
        key=_key(path) or "",
        path=path,
        nbytes=nbytes,
        used=path.stat().st_mtime,
        base=manifest["base"]["name"] if manifest else "",
        adapters=tuple(a["name"] for a in manifest.get("adapters", ())),
        complete=complete,
    )


def clear_cache(
    cache_dir: str | os.PathLike[str] | None = None, keys: Sequence[str] = ()
) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove entries, all of them or those whose keys begin with one of `keys`: what was removed, and what is in use.

    Only folders that the cache made are touched. Raises InputError for a key that fits none.
    """
    entries = list_cache(cache_dir)
    for key in keys:
        if not key or not any(e.key.startswith(key) for e in entries):
            raise InputError(f"{key!r}: no such entry in {cache_folder(cache_dir)}; `inlay cache list` shows them")
    removed, used = [], []
    for entry in entries:
        if keys and not entry.key.startswith(tuple(keys)):
            continue
        try:
            with _locked(entry.path.with_name(entry.key), fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(entry.path)
                _lock_of(entry.path.with_name(entry.key)).unlink(missing_ok=True)
            removed.append(entry)
        except BlockingIOError:
            used.append(entry)
        except FileNotFoundError:  # cleared by another process meanwhile
            continue
        except OSError as error:
            raise OutputError(f"{entry.path}: cannot be removed: {error.strerror}") from None
    return removed, used
