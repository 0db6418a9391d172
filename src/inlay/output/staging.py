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
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class Staging:
    """The staging folder of one plan for one destination; while it is open, no other run writes there.

    `plan` names the folder, `inputs` describes the files it is made from: records made from other inputs
    are not taken up.
    """

    def __init__(self, destination: Path, plan: str, inputs: Mapping[str, Any]) -> None:
        self.destination = Path(os.path.abspath(destination))
        self._prefix = f".{self.destination.name}.inlay-"
        self.path = self.destination.parent / (self._prefix + plan.removeprefix("blake3:")[:16])
        self._records = self.path / RECORDS
        self._inputs = inputs
        self._made: list[Path] = []
        self._lock = _Lock(self.destination.parent / f".{self.destination.name}.inlay.lock")

    def __enter__(self) -> Staging:
        try:
            self._made = _make_folders(self.destination.parent)
            self._lock.acquire(self.destination)
            self._prepare()
        except OutputError:
            self._leave()
            raise
        except OSError as error:
            if self._lock.held:  # otherwise the folder may be another run's
                self.discard()
            self._leave()
            raise OutputError(f"{self.destination}: cannot be written: {error.strerror or error}") from None
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _prepare(self) -> None:
        for other in self.path.parent.glob(f"{glob.escape(self._prefix)}*"):
            if other != self.path:
                _remove(other)
        self._records.mkdir(parents=True, exist_ok=True)
        if self._stored_inputs() != self._inputs:
            for entry in list(os.scandir(self.path)):
                _remove(Path(entry.path))
            write_durably(self._records / INPUTS, json.dumps(self._inputs).encode())

    def _leave(self) -> None:
        """Let the next run in; folders that were made and hold nothing are removed again."""
        self._lock.release()
        for folder in self._made:
            if not folder.is_dir() or os.listdir(folder):
                return
            folder.rmdir()

    def _stored_inputs(self) -> Any:
        try:
            return json.loads((self._records / INPUTS).read_text())
        except (OSError, ValueError):
            return None

    def discard(self) -> None:
        """Remove the folder: the plan cannot be carried out."""
        _remove(self.path)

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
        _remove(self._records)
        sync_tree_folders(self.path)
        if os.path.lexists(self.destination):
            _exchange(self.path, self.destination)
        else:
            os.rename(self.path, self.destination)
        sync_folder(self.destination.parent)
        _remove(self.path)


class _Lock:
    """A lock file beside a destination, removed when it is let go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self, what: Path) -> None:
        """Raises OutputError if another process holds it."""
        import fcntl

        while self._fd is None:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise OutputError(f"{what}: another run is writing it; wait for that one to end") from None
            except OSError:  # a file system without locks: nothing can be said, so go on
                self._fd = fd
                return
            if self._is_current(fd):
                self._fd = fd
            else:  # the last holder removed the file between our open and our lock
                os.close(fd)

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._fd is None:
            return
        try:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(self._fd)
            self._fd = None


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
