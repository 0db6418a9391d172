"""What vLLM's own LoRA can do: one plain pair for each linear layer, applied while it computes.

Everything else is refused here with its reason, because vLLM reports some of it only from within its workers, and
leaves some out without a word (a full copy of an embedding, a module that it has under another name). Merging does not
have these limits.

Written against vLLM 0.32 (`vllm.lora.peft_helper`, `vllm.config.lora`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from inlay.adapters.adapter import PEFT, Adapter
from inlay.errors import Problem

WHAT_TO_DO = "Merge it instead: --merge_lora true has none of these limits."
_KNOWN = frozenset({"lora_A", "lora_B", "lora_embedding_B"})
_REASONS = {
    "lora_embedding_A": "trains an embedding",
    "lora_bias": "has a bias on lora_B",
    "magnitude": "is DoRA",
    "token_rows": "trains single tokens of an embedding",
}


def lora_problems(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[Problem]:
    """Why vLLM cannot apply these adapters without merging them; empty if it can."""
    if len(adapters) > 1:
        names = ", ".join(a.name for a in adapters)
        return [Problem(names, "vLLM applies one adapter to a request, and cannot add several up")]
    found = [Problem(a.name, reason) for a in adapters for reason in _reasons(a)]
    if weights and any(w != 1 for w in weights):
        found.append(Problem(adapters[0].name, f"its weight is {weights[0]:g}, and vLLM knows its own scaling only"))
    return found


def _reasons(adapter: Adapter) -> list[str]:
    config = adapter.config
    if adapter.format != PEFT:
        return [f"its files are in the format of {adapter.format}, and vLLM reads PEFT's"]
    if config.tuner not in ("lora", "dora"):
        return [f"is {config.tuner}, and vLLM computes plain LoRA only"]
    found = ["is DoRA, which vLLM does not compute"] if config.use_dora else []
    if adapter.full:
        found.append(f"has full copies of {_some(adapter.full)}, which vLLM does not load")
    for part, reason in _REASONS.items():
        modules = [m for m, parts in adapter.parts.items() if part in parts]
        if modules and not (part == "magnitude" and config.use_dora):
            found.append(f"{reason} ({_some(modules)}), which vLLM does not do")
    if config.bias != "none" and not adapter.full:
        found.append(f"bias is {config.bias!r}, which vLLM refuses")
    odd = sorted({p for parts in adapter.parts.values() for p in parts} - _KNOWN - _REASONS.keys())
    if odd:
        found.append(f"has the parts {', '.join(odd)}, which vLLM does not know")
    return found


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def largest_rank(adapter: Adapter) -> int:
    """The largest rank in its file."""
    return max((parts["lora_A"].shape[0] for parts in adapter.parts.values() if "lora_A" in parts), default=1)


def allowed_rank(rank: int) -> int | None:
    """The smallest `max_lora_rank` of the installed vLLM that holds `rank`; None if there is none."""
    from vllm.config.lora import MaxLoRARanks

    return next((n for n in sorted(get_args(MaxLoRARanks)) if n >= rank), None)


def pattern_problems(adapter: Adapter) -> list[Problem]:
    """vLLM before 0.32 gives every module the same rank and alpha, whatever the adapter's patterns say."""
    from vllm.lora.peft_helper import PEFTHelper

    config = adapter.config
    if not (config.rank_pattern or config.alpha_pattern) or hasattr(PEFTHelper, "get_rank_and_scaling"):
        return []
    return [Problem(adapter.name, "has rank_pattern or alpha_pattern, which this version of vLLM ignores")]


class PlacedCheck:
    """Mixed into vLLM's workers (`worker_extension_cls`), to ask what became of an adapter.

    vLLM passes over modules that its model has under other names, and answers as the base then.
    """

    model_runner: Any

    def inlay_unplaced(self, lora_id: int) -> list[str]:
        """Modules of a loaded adapter that no layer of this worker's part of the model takes."""
        manager = self.model_runner.lora_manager._adapter_manager
        adapter = manager.get_adapter(lora_id)
        taken = {id(manager._get_lora_layer_weights(adapter, name)) for name in manager.modules}
        return [name for name, weights in adapter.loras.items() if id(weights) not in taken]


EXTENSION = f"{PlacedCheck.__module__}.{PlacedCheck.__qualname__}"


def left_out(adapter: str, found: Sequence[Sequence[str]]) -> str | None:
    """What to say of an adapter if no worker has a place for some of its modules.

    `found` is what each worker lacks; with pipeline parallelism each has its own layers only.
    """
    missed = sorted(set.intersection(*map(set, found))) if found else []
    if not missed:
        return None
    what = f"vLLM has no place for {len(missed)} of its modules, and would leave them out: {', '.join(missed[:5])}"
    return f"{adapter}: {what}. {WHAT_TO_DO}"
