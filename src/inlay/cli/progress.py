"""A progress bar with bytes per second and time left, on stderr."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any


class Bar:
    """Counts bytes from any thread; draws nothing when quiet, or where stderr is not a terminal."""

    def __init__(self, total: int, label: str, quiet: bool) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr, mininterval=0.2, dynamic_ncols=True
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, nbytes: int) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.update(nbytes)
