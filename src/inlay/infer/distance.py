"""How far the logits of one model are from those of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Distance:
    """How far the logits of one model are from those of another, over some positions.

    `largest` and `rms` are of the differences of the logits, `kl` the mean over the positions of KL(first ‖ second) in
    nats, `agreement` the share of positions at which the most likely token is the same.
    """

    largest: float
    rms: float
    kl: float
    agreement: float
    positions: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.rms) and math.isfinite(self.largest)

    def to_json(self) -> dict[str, float | None]:
        """Inf and NaN, which JSON has not, as null."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def distance(reference: Any, other: Any) -> Distance:
    """Between logits (positions, vocabulary) of two models; of a vocabulary that grew, the tokens of both."""
    import torch

    both = min(reference.shape[-1], other.shape[-1])
    a, b = reference[:, :both].double(), other[:, :both].double()
    difference = b - a
    log_a, log_b = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1)
    same = a.argmax(-1) == b.argmax(-1)
    return Distance(
        float(difference.abs().max()), float(difference.square().mean().sqrt()), float(kl.mean()),
        float(same.double().mean()), len(a),
    )  # fmt: skip


def together(parts: Sequence[Distance]) -> Distance:
    """Over all positions of several prompts, at least one. NaN in any of them is NaN in the whole."""
    count = sum(p.positions for p in parts)
    return Distance(
        largest_of([p.largest for p in parts]),
        math.sqrt(sum(p.rms**2 * p.positions for p in parts) / count),
        sum(p.kl * p.positions for p in parts) / count,
        sum(p.agreement * p.positions for p in parts) / count,
        count,
    )


def largest_of(values: Sequence[float]) -> float:
    """The maximum; NaN if one is NaN, which `max` would find only in the first place."""
    return math.nan if any(map(math.isnan, values)) else max(values)
