"""Packages of the extra, which are not there by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from inlay.errors import InputError


@contextmanager
def needs(what: str, extra: str = "inlay[train]") -> Iterator[None]:
    """An import within fails with what to install."""
    try:
        yield
    except ImportError as error:
        missing = error.name or str(error)
        raise InputError(f"{what} needs {missing}, which is not installed: pip install '{extra}'") from error
