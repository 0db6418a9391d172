"""What a plan says of the choices that it made, for people to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.decoded import Decoded
from inlay.plan.check import Findings
from inlay.plan.memory import whole
from inlay.plan.quant import Quant, trained_as
from inlay.plan.steps import Dense
from inlay.plan.types import Coded, ShardPlan


def explain_base(decoded: Decoded | None, quant: Quant, adapters: Sequence[Adapter], found: Findings) -> None:
    """What the base is taken for, and why another choice may be wanted."""
    if decoded and decoded.encodings:
        forms = Counter(e.codec for e in decoded.encodings.values())
        what = ", ".join(f"{n} of {name}" for name, n in forms.items())
        kept = "what no adapter changes keeps its codes" if quant.keep else "the result is in floats"
        found.notes.append(f"base_as dequantised: {what} decoded, which is what an adapter was trained against; {kept}")
        return
    name = trained_as(quant, adapters)
    if name is None or decoded is not None:
        return
    if quant.base_as == "simulated":
        what = f"decode(encode(W)) with {name}, which is what the adapters were trained against"
        found.notes.append(f"base_as simulated: {what}; --base_as original takes the finer weights W themselves")
    else:
        what = f"the adapters were trained on a base quantised to {name} while it was loaded, and go onto W itself"
        why = "closer to training is --base_as simulated, which also bakes the errors of the codes in"
        (found.notes if quant.base_as else found.warnings).append(f"base_as original: {what}; {why}")


def explain_memory(shards: Sequence[ShardPlan], notes: list[str]) -> None:
    """Tensors that no block of rows is enough for."""
    weights = {w.key: w for w in (e.weight if isinstance(e, Coded) else e for s in shards for e in s.entries)}
    found = [e for e in weights.values() if whole(e)]
    if found:
        methods = ", ".join(sorted({step.tuner for e in found for step in e.steps if isinstance(step, Dense)}))
        largest = max(found, key=lambda e: e.count)
        what = f"{len(found)} tensors are worked on as whole matrices ({methods})"
        notes.append(f"{what}, the largest {largest.key} {list(largest.shape)}; --max_memory counts them")
