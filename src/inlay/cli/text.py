"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Sequence

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size(nbytes: float) -> str:
    """Bytes with a unit: 14.2 GB."""
    for unit in UNITS:
        if nbytes < 1000 or unit == UNITS[-1]:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError(nbytes)


def count(n: int) -> str:
    """A count with a unit where it is large: 7.62 B."""
    for limit, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}"
    return str(n)


def rows(pairs: Sequence[tuple[str, str]]) -> str:
    """Two columns."""
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs)


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("" if n == 1 else "s")
