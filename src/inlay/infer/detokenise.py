"""Text from tokens as they come: nothing is said that a later token would change, and nothing of a stop word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEFORE = 6  # tokens of the prompt that a decoding begins with, so that the space between it and the reply is kept
REPLACEMENT = "�"  # stands for bytes that are no whole character yet


class Detokeniser:
    """Law: what `add` returns, one after another, and then `finish`, is the text that the tokens add to that of
    `prompt`, special ones left out, up to the first stop word.

    A new piece is the difference of two decodings that begin at the same token, as a tokenizer may write a token
    otherwise at the beginning; the window moves on, so the cost of a token does not grow.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop_words: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._words = stop_words
        self._tokens = list(prompt[-BEFORE:])
        self._first, self._said = 0, len(self._tokens)  # the window: what is before `_said` was returned, or is held
        self._held = ""
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is settled with these tokens."""
        self._tokens += tokens
        before, after = self._decode(self._first, self._said), self._decode(self._first, None)
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._first, self._said = self._said, len(self._tokens)
        return self._release(after[len(before) :], last=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        before, after = self._decode(self._first, self._said), self._decode(self._first, None)
        self._said = len(self._tokens)
        return self._release(after[len(before) :], last=True)

    def _decode(self, first: int, last: int | None) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _release(self, text: str, *, last: bool) -> str:
        """Text up to a stop word, without what may be the beginning of one."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for word in self._words if (at := text.find(word)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """Length of the longest beginning of `word`, not all of it, that `text` ends with."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
