"""Patterns of `rank_pattern` and `alpha_pattern`, matched to module names under one budget of time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from inlay.errors import AdapterError

PATTERN_SECONDS = 1.0  # for all names of an adapter together; real patterns take microseconds
SLOW_MATCH_SECONDS = 0.005


class Patterns:
    """Looks names up in tables of patterns; slow matches share one budget of time."""

    def __init__(self) -> None:
        self._left = PATTERN_SECONDS
        self._known: dict[tuple[str, str], bool] = {}

    def value(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        r"""Value of the first pattern that is `module` or a dotted suffix of it, read as a regular expression.

        PEFT's `get_pattern_key`: `re.match(rf"(.*\.)?({key})$", name)`, in the order of the file.
        """
        for pattern, value in patterns.items():
            if module == pattern or module.endswith("." + pattern) or self._matches(pattern, module):
                return value
        return default

    def _matches(self, pattern: str, module: str) -> bool:
        if pattern.replace("_", "").isalnum():
            return False  # a plain word, and not a suffix: no need for an engine
        if (pattern, module) not in self._known:
            started = time.monotonic()
            self._known[pattern, module] = _match(pattern, module, max(self._left, SLOW_MATCH_SECONDS))
            taken = time.monotonic() - started
            self._left -= taken if taken > SLOW_MATCH_SECONDS else 0
            if self._left < 0:
                raise _too_slow(pattern)
        return self._known[pattern, module]


def _match(pattern: str, module: str, seconds: float) -> bool:
    import regex  # has a timeout, which the standard library's engine has not

    try:
        return regex.match(rf"(.*\.)?({pattern})$", module, timeout=seconds) is not None
    except TimeoutError:
        raise _too_slow(pattern) from None
    except regex.error as error:
        raise AdapterError(f"pattern {pattern!r} in rank_pattern or alpha_pattern is not valid: {error}") from None


def _too_slow(pattern: str) -> AdapterError:
    return AdapterError(
        f"pattern {pattern!r} in rank_pattern or alpha_pattern takes more than {PATTERN_SECONDS:g} s to match the "
        "names of the modules; write it without nested repetition"
    )
