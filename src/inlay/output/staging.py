"""A directory that appears whole or not at all.

Everything is written to a folder beside the destination, `.<name>.inlay-<plan>`. What is finished has a
record there, so that a rerun of the same plan goes on from it; a folder of another plan is removed. When
all is written and synced, one rename puts it in place; an older result is swapped out and removed after.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from inlay.errors import OutputError

RECORDS = ".inlay-records"
INPUTS = "inputs.json"
LOCK = "lock"
ASIDE = ".records"  # where the records wait while the folder is being published
NO_LOCK = -1
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class Staging:
    """The staging folder of one plan for one destination; holds its lock while open.

    `plan` names the folder, `inputs` describes the files it is made from: records made from other inputs
    are not taken up.
    """

    def __init__(self, destination: Path, plan: str, inputs: Mapping[str, Any]) -> None:
        self.destination = Path(os.path.abspath(destination))
        self._prefix = f".{self.destination.name}.inlay-"
        self.path = self.destination.parent / (self._prefix + plan.removeprefix("blake3:")[:16])
        self._records = self.path / RECORDS
        self._made: list[Path] = []
        self._inputs = inputs
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        try:
            self._made = _make_folders(self.path.parent)
            self._remove_others()
            self._records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path.parent}: cannot be written: {error.strerror}") from None
        self._lock = _lock(self._records / LOCK)
        if self._lock is None:
            raise OutputError(f"{self.destination}: another run is writing it; wait for that one to end")
        if self._stored_inputs() != self._inputs:
            self._clear()
            write_durably(self._records / INPUTS, json.dumps(self._inputs).encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _stored_inputs(self) -> Any:
        try:
            return json.loads((self._records / INPUTS).read_text())
        except (OSError, ValueError):
            return None

    def _clear(self) -> None:
        for entry in os.scandir(self.path):
            if entry.name != RECORDS:
                _remove(Path(entry.path))
        for entry in os.scandir(self._records):
            if entry.name != LOCK:
                _remove(Path(entry.path))

    def _remove_others(self) -> None:
        """Remove staging folders of other plans for this destination, unless a live run holds them."""
        found = self.path.parent.glob(f"{glob.escape(self._prefix)}*")
        for other in {path.with_name(path.name.removesuffix(ASIDE)) for path in found} - {self.path}:
            aside = other.with_name(other.name + ASIDE)
            records = other / RECORDS if (other / RECORDS).is_dir() else aside
            lock = _lock(records / LOCK) if records.is_dir() else NO_LOCK
            if lock is not None:
                _remove(other)
                _remove(aside)
                if lock != NO_LOCK:
                    os.close(lock)

    def discard(self) -> None:
        """Remove the folder, and those made to hold it: the plan cannot be carried out."""
        _remove(self.path)
        for folder in self._made:
            if os.listdir(folder):
                return
            folder.rmdir()
        _remove(self._records)

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a finished file, or None."""
        try:
            found = json.loads((self._records / f"{_flat(name)}.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put_record(self, name: str, value: Mapping[str, Any]) -> None:
        """Record that file `name` is finished and synced."""
        write_durably(self._records / f"{_flat(name)}.json", json.dumps(value).encode())

    def publish(self) -> None:
        """Put the folder in place of the destination. Everything in it must be synced."""
        aside = self.path.with_name(self.path.name + ASIDE)
        _remove(aside)
        os.rename(self._records, aside)  # with the lock in it
        self._records = aside
        sync_tree_folders(self.path)
        if os.path.lexists(self.destination):
            _exchange(self.path, self.destination)
        else:
            os.rename(self.path, self.destination)
        sync_folder(self.destination.parent)
        _remove(self.path)
        _remove(aside)


def _make_folders(path: Path) -> list[Path]:
    """Make a folder and those above it; the new ones, innermost first."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
    return missing


def _flat(name: str) -> str:
    return name.replace("/", "%2F")


def _lock(path: Path) -> int | None:
    """An exclusive lock on `path`, or None if another process has it."""
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:  # a file system without locks: nothing can be said, so go on
        return fd
    return fd


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step; where the system cannot, move the old one aside first."""
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    if swap is not None and swap(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return
    aside = old.with_name(f".{old.name}.inlay-replaced")
    _remove(aside)
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that it is whole or absent after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree_folders(path: Path) -> None:
    for folder, _, _ in os.walk(path):
        sync_folder(Path(folder))
