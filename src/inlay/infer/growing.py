"""A reply while its tokens come: its text, its length and its end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from inlay.infer.backend import STOP, Reply, Request
from inlay.infer.detokenise import Detokeniser


class GrowingReply:
    """A reply as its tokens come, up to a token or a word that ends it; what comes after that is passed over."""

    def __init__(self, tokenizer: Any, request: Request, ends: set[int], words: Sequence[str]) -> None:
        self._text = Detokeniser(tokenizer, request.tokens, words)
        self._ends, self._prompt = ends, len(request.tokens)
        self._said: list[str] = []
        self._count = 0
        self._ended = False

    @property
    def done(self) -> bool:
        return self._ended or self._text.stopped

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is settled with these tokens."""
        before = len(self._said)
        for token in tokens:
            if self.done:
                break
            self._count += 1
            if token in self._ends:
                self._ended = True
            else:
                self._said.append(self._text.add([token]))
        return "".join(self._said[before:])

    def finish(self) -> str:
        """The rest, when no token follows."""
        self._said.append(self._text.finish())
        return self._said[-1]

    def reply(self, otherwise: str) -> Reply:
        """`otherwise` is why it ended if nothing that ends a reply came."""
        return Reply("".join(self._said), self._prompt, self._count, STOP if self.done else otherwise)


def stop_criterion(tokenizer: Any, words: Sequence[str], width: int, signals: Sequence[threading.Event]) -> Any:
    """Ends a row whose last characters hold a stop word, and every row once a signal is set."""
    import torch

    longest = max(map(len, words), default=0)

    def check(input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG001  # scores are of transformers' protocol
        done = [any(signal.is_set() for signal in signals)] * len(input_ids)
        if words and not done[0]:
            # A character takes up to four tokens of single bytes; one token more, for a word that begins inside one.
            first = max(width, input_ids.shape[1] - 4 * longest - 1)
            done = [_holds(tokenizer, row, first, words) for row in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)

    return check


def _holds(tokenizer: Any, row: list[int], first: int, words: Sequence[str]) -> bool:
    """Whether the tokens from `first` on, read as a reply to those before, hold one of the words."""
    text = Detokeniser(tokenizer, row[:first], words)
    text.add(row[first:])
    text.finish()
    return text.stopped
