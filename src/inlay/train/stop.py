"""A way to stop that loses nothing."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from inlay.train.launch import SAME_SECONDS, is_first


class Stop:
    """Whether somebody asked to stop. The first Ctrl-C, or SIGTERM, ends the run after the step under way, with a
    checkpoint; a second one ends it at once. Service managers tell every process of a run, and whoever started them
    tells them again: what comes within a second is the same."""

    def __init__(self) -> None:
        self.asked = False
        self._heard = -math.inf

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._heard < SAME_SECONDS:
            return
        self._heard = now
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if is_first():
            what = "stopping after this step, with a checkpoint"
            print(f"{signal.Signals(number).name}: {what}", file=sys.stderr, flush=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, signals are heard; only the main thread may ask for that."""
        try:
            before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def anywhere(self) -> bool:
        """The same answer in every process."""
        import torch
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return self.asked
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        asked = torch.tensor(int(self.asked), device=device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked.item())
