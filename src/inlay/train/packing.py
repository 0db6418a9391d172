"""Several examples in one block: which go together, and whether a model keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.errors import InputError
from inlay.train.examples import Block, Example, collate

PROBED_TOKENS = 16
FLOOR = 1e-4  # of the largest score: differences below it are those of rounding


def pack(examples: Sequence[Example], max_length: int) -> list[Block]:
    """Examples side by side in blocks of at most `max_length` tokens: the longest first, each into the first block that
    has room. Law: each example is in one block."""
    blocks: list[Block] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        place = next((i for i, free in enumerate(room) if free >= len(example.ids)), None)
        if place is None:
            place = len(blocks)
            blocks.append([])
            room.append(max_length)
        blocks[place].append(example)
        room[place] -= len(example.ids)
    return blocks


def check_packing(model: Any, blocks: Sequence[Block]) -> None:
    """Whether attention keeps the examples of a block apart: the second of two must be told as it is alone.

    Models that build their mask from positions do. How far off the others are is measured with the two run together as
    one text: a model that comes nearer to that than to the example alone lets rows see each other. Raises InputError.
    """
    import torch

    block = next((b for b in blocks if len(b) > 1), None)
    if block is None:
        return
    first, second = ([*e.ids[:PROBED_TOKENS]] for e in block[:2])
    pair = [Example(e.ids[:PROBED_TOKENS], e.labels[:PROBED_TOKENS]) for e in block[:2]]
    inputs = collate([pair], 0, positions=True)
    del inputs["labels"]

    def scores(**given: Any) -> Any:
        return model(**{k: v.to(model.device) for k, v in given.items()}).logits[0, -len(second) :].float()

    model.eval()
    with torch.no_grad():
        alone = scores(input_ids=torch.tensor([second]))
        together = scores(input_ids=torch.tensor([first + second]))
        try:
            packed = scores(**inputs)
        except (TypeError, ValueError):  # no argument of this name
            packed = together
    off, worst = ((found - alone).abs().max() for found in (packed, together))
    if off > max(worst / 2, FLOOR * alone.abs().max()):
        raise InputError(f"--packing: {type(model).__name__} lets the rows of a block see each other; train without it")
