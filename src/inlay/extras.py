"""Packages of the extras, which are not there by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from inlay.errors import InputError


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """An import within fails with the name of the extra that brings the package."""
    try:
        yield
    except ImportError as error:
        missing = error.name or str(error)
        raise InputError(f"{what} needs {missing}, which is not installed: pip install 'inlay[{extra}]'") from error
