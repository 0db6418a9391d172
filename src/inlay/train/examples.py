"""Rows as tokens, with labels on answers only.

A conversation is written by the chat template and its answers are found in the text: an answer begins where the
template, given the messages before it and asked for a reply, ends, and it ends where the template with the answer ends.
Some templates write an answer otherwise once more turns follow: those of thinking models drop earlier thoughts. Such an
answer is learned in an example of its own, the conversation up to it, as the model sees and writes it in use. So every
answer is learned once, and none as something that the model does not write. What the template does not begin as it asks
for it is read and not learned, and counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.datasets.row import Message, Row
from inlay.errors import InputError

UNLABELLED = -100
DELETE, RIGHT, LEFT, RAISE = "delete", "right", "left", "raise"


@dataclass(frozen=True)
class Example:
    """Token ids of one row, and as many labels: the id where it is learned, UNLABELLED elsewhere."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


Block = list[Example]


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    cut: int = 0
    too_long: int = 0
    unanswered: int = 0
    unlearned_turns: int = 0
    split: int = 0  # examples more than rows, of conversations whose earlier answers the template rewrites


@dataclass(frozen=True)
class _Answer:
    """A conversation up to and with an answer, as the template writes it, and where the answer begins and ends."""

    text: str
    start: int
    end: int


class Encoder:
    """Turns rows into examples with one tokenizer."""

    def __init__(self, tokenizer: Any, max_length: int, truncation: str, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.system = system
        added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = tuple(added | {str(t) for t in tokenizer.all_special_tokens})
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} cannot say which letters a token stands for, so answers cannot be told "
                "from questions; use the tokenizer in its fast form (tokenizer.json)"
            )

    def encode(self, rows: Sequence[Row], what: str = "rows") -> tuple[list[Example], Counts]:
        """The examples of all rows that fit, and counts of those that do not. `what` the rows are, for messages.

        Raises InputError for a row that the template refuses, and when no row is left.
        """
        if any(row.messages for row in rows) and not self.tokenizer.chat_template:
            raise InputError(
                "the base has no chat template, and the data are conversations: give one with --chat_template "
                'FILE.jinja, or data of plain text ({"text": …})'
            )
        counts, examples = Counts(), []
        for row in rows:
            made = [self._text(row)] if row.text is not None else self._talk(row, counts)
            counts.split += max(0, len(made) - 1)
            examples += [e for example in made if (e := self._fit(example, row, counts)) is not None]
        counts.rows = len(examples)
        counts.tokens = sum(len(e.ids) for e in examples)
        counts.learned = learned(examples)
        counts.longest = max((len(e.ids) for e in examples), default=0)
        if not examples:
            raise InputError(
                f"none of the {len(rows)} {what} can be learned: {counts.too_long} are longer than --max_length "
                f"{self.max_length}, {counts.unanswered} have no answer that the chat template shows as it asks for it"
            )
        return examples, counts

    def _text(self, row: Row) -> Example:
        """A plain text, all of it learned, with the end of text after it."""
        ids = list(self.tokenizer(row.text, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        return Example(tuple(ids), tuple(ids))

    def _talk(self, row: Row, counts: Counts) -> list[Example]:
        """The whole conversation, and as many beginnings of it as it takes to have every answer as it is given."""
        messages = list(row.messages)
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        told = [{k: v for k, v in m.items() if k != "loss"} for m in messages]
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("loss") is not False]
        found = [self._answer(told, position, row) for position in wanted]
        left = [answer for answer in found if answer is not None]
        counts.unlearned_turns += len(found) - len(left)
        counts.unanswered += not left
        examples, text = [], self._written(told, row)
        while left:
            here = [answer for answer in left if text.startswith(answer.text)]
            if here:
                examples.append(self._tokens(text, here))
            left = [answer for answer in left if answer not in here]
            text = left[-1].text if left else ""
        return examples

    def _answer(self, told: list[Message], position: int, row: Row) -> _Answer | None:
        """The answer at `position`; None where the template does not begin it as it asks for it."""
        if position == 0:  # no template writes an empty conversation, to see where the answer would begin
            return None
        before = self._written(told[:position], row, asked=True)
        after = self._written(told[: position + 1], row)
        if not after.startswith(before):
            return None
        return _Answer(after, len(before), self._end(after, len(before)))

    def _tokens(self, text: str, answers: Sequence[_Answer]) -> Example:
        """A text, of which these answers are learned."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        labels = [
            token if any(answer.start <= at < answer.end for answer in answers) else UNLABELLED
            for token, (at, _) in zip(ids, offsets, strict=True)
        ]
        end = self.tokenizer.eos_token_id
        if end is not None and labels and labels[-1] not in (UNLABELLED, end) and not text.endswith(self._special):
            ids, labels = [*ids, end], [*labels, end]  # a template that says nothing at the end teaches no end
        return Example(tuple(ids), tuple(labels))

    def _end(self, text: str, start: int) -> int:
        """Where an answer ends: after its end marker, not with the line break that some templates put behind."""
        answer = text[start:].rstrip()
        return start + len(answer) if answer.endswith(self._special) else len(text)

    def _written(self, messages: list[Message], row: Row, asked: bool = False) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=list(row.tools) or None, tokenize=False, add_generation_prompt=asked
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{row.where}: the chat template refuses this conversation: {error}") from None

    def _fit(self, example: Example, row: Row, counts: Counts) -> Example | None:
        if len(example.ids) > self.max_length:
            if self.truncation == RAISE:
                what = f"has {len(example.ids)} tokens, --max_length is {self.max_length}"
                raise InputError(f"{row.where}: {what}; raise it, or let --truncation_strategy delete or cut it")
            if self.truncation == DELETE:
                counts.too_long += 1
                return None
            counts.cut += 1
            part = slice(-self.max_length, None) if self.truncation == LEFT else slice(self.max_length)
            example = Example(example.ids[part], example.labels[part])
        if not learned([example]):
            counts.unanswered += 1
            return None
        return example


def split(rows: Sequence[Row], ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and to evaluate with; at least one of each where `ratio` is above 0."""
    if not ratio:
        return list(rows), []
    if len(rows) < 2:
        raise InputError("--split_dataset_ratio needs at least 2 rows")
    kept = max(1, min(len(rows) - 1, round(len(rows) * ratio)))
    chosen = set(random.Random(seed).sample(range(len(rows)), kept))
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def learned(block: Block) -> int:
    """Labels of a block that a loss is made of: all but the first of each example, which has nothing before it."""
    return sum(label != UNLABELLED for e in block for label in e.labels[1:])


def collate(batch: Sequence[Block], pad_id: int, positions: bool) -> dict[str, Any]:
    """Tensors of a batch of blocks, (rows, longest block): filled up at their ends.

    Blocks of several examples (`positions`) carry positions that begin anew with each, by which attention keeps them
    apart, and no mask; the filling is one more example there, unlabelled.
    """
    import torch

    longest = max(sum(len(e.ids) for e in block) for block in batch)
    ids, labels, masks, places = [], [], [], []
    for block in batch:
        tokens = [t for e in block for t in e.ids]
        # The first token of an example is not to be told from the last of the one before.
        wanted = [t for e in block for t in (UNLABELLED, *e.labels[1:])]
        rest = longest - len(tokens)
        ids.append(tokens + [pad_id] * rest)
        labels.append(wanted + [UNLABELLED] * rest)
        masks.append([1] * len(tokens) + [0] * rest)
        places.append([i for e in block for i in range(len(e.ids))] + list(range(rest)))
    found = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    name, values = ("position_ids", places) if positions else ("attention_mask", masks)
    return {**found, name: torch.tensor(values)}


def read_template(path: str) -> str:
    """A chat template from a file. Raises InputError."""
    import jinja2

    try:
        text = Path(path).read_text("utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise InputError(f"--chat_template {path}: cannot be read ({error})") from None
    return text
