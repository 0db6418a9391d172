"""What the behaviour check found, and whether it passes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from inlay.infer.distance import Distance, largest_of

# The draws are few; over the positions of all prompts their distances scatter by far less than a factor of two.
MARGIN = 2.0


@dataclass(frozen=True)
class PromptResult:
    """One prompt: base + adapters against merged, and against the base; the greedy texts of all three."""

    where: str
    prompt: str
    merged: Distance
    base: Distance
    text_base: str
    text_adapters: str
    text_merged: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "merged": self.merged.to_json(), "base": self.base.to_json()}


@dataclass(frozen=True)
class Behaviour:
    """What was found. `draws` are distances of right merges from base + adapters."""

    prompts: tuple[PromptResult, ...]
    merged: Distance
    base: Distance
    draws: tuple[Distance, ...]
    what: str

    @property
    def tolerance(self) -> Distance:
        """The largest distances that pass; agreement is reported and not judged, as ties fall either way."""
        worst = [largest_of([getattr(d, name) for d in self.draws]) for name in ("largest", "rms", "kl")]
        largest, rms, kl = worst[0] * MARGIN, worst[1] * MARGIN, worst[2] * MARGIN**2
        return Distance(largest, rms, kl, min(d.agreement for d in self.draws), self.merged.positions)

    @property
    def alike(self) -> bool:
        """Merged behaves like base + adapters, up to rounding; never where a logit is Inf or NaN."""
        most = self.tolerance
        return (
            self.merged.finite
            and most.finite
            and all(getattr(self.merged, name) <= getattr(most, name) for name in ("largest", "rms"))
        )

    @property
    def acts(self) -> bool:
        """The adapters change the base by more than rounding does."""
        return self.base.finite and self.base.rms > self.tolerance.rms

    @property
    def ok(self) -> bool:
        return self.alike and self.acts

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it fails."""
        compared = (
            ("merged", self.merged),
            ("the base", self.base),
            ("merged, rounded in another way", self.tolerance),
        )
        if wild := [name for name, d in compared if not d.finite]:
            return (f"logits are Inf or NaN, so there is nothing to compare: base + adapters, or {' and '.join(wild)}",)
        found = []
        if not self.acts:
            found.append(
                "the adapters do nothing: base + adapters is as near to the base as roundings of the weights are"
            )
        if not self.alike:
            share = self.merged.rms / self.base.rms if self.base.rms else math.inf
            found.append(
                f"merged does not behave like base + adapters: its logits are {self.merged.rms:.3g} away (rms), "
                f"{share:.0%} of what the adapters change, and roundings explain {self.tolerance.rms:.3g}"
                + ("; it behaves like the base" if self.acts and 0.95 < share < 1.05 else "")
            )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok, "alike": self.alike, "acts": self.acts, "reasons": list(self.reasons), "what": self.what,
            "merged": self.merged.to_json(), "base": self.base.to_json(), "tolerance": self.tolerance.to_json(),
            "draws": [d.to_json() for d in self.draws], "margin": MARGIN,
            "prompts": [p.to_json() for p in self.prompts],
        }  # fmt: skip
