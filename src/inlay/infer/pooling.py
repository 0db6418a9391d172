"""Vectors of prompts: pooled hidden states, or the scores of a classification head.

How a checkpoint pools is what its `1_Pooling/config.json` (sentence-transformers) says: the first token, the mean, or
the last token. Without one a decoder gives its last token, as only that has seen all others, and an encoder the mean.
Embeddings have length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.errors import InputError
from inlay.infer.description import read_sidecar, read_sidecar_list
from inlay.plan.types import Plan

FILE = "1_Pooling/config.json"
CLS, MEAN, LAST = "cls", "mean", "last"
STEPS = "modules.json"
KNOWN_STEPS = ("Transformer", "Pooling", "Normalize")
MODES = {"pooling_mode_cls_token": CLS, "pooling_mode_mean_tokens": MEAN, "pooling_mode_lasttoken": LAST}


def pooling_of(plan: Plan, config: Any) -> str:
    """CLS, MEAN or LAST. Raises InputError for a pooling that is none of these, or for what else follows the model."""
    _check_steps(plan)
    said = read_sidecar(plan, FILE)
    if said is None:
        named = str((config.architectures or [""])[0])
        return LAST if getattr(config, "is_decoder", False) or named.endswith(("ForCausalLM", "LMHeadModel")) else MEAN
    asked = [name for name, on in said.items() if name.startswith("pooling_mode_") and on is True]
    if len(asked) == 1 and asked[0] in MODES:
        return MODES[asked[0]]
    if said.get("pooling_mode") in MODES.values():
        return str(said["pooling_mode"])
    raise InputError(f"{FILE}: pools by {', '.join(asked) or 'nothing known'}; supported are {', '.join(MODES)}")


def _check_steps(plan: Plan) -> None:
    """sentence-transformers' list of what a text goes through: layers behind the pooling would be left out here."""
    steps = read_sidecar_list(plan, STEPS) or []
    kinds = [str(step.get("type", "")).rpartition(".")[2] for step in steps if isinstance(step, dict)]
    if other := [kind for kind in kinds if kind not in KNOWN_STEPS]:
        raise InputError(f"{STEPS}: has {', '.join(other)}, which is not supported; known are {', '.join(KNOWN_STEPS)}")


def vectors(model: Any, prompts: Sequence[tuple[int, ...]], how: str | None, pad: int | None) -> list[list[float]]:
    """One vector for each prompt, float32; `how` None takes the logits of a head.

    Without a token for padding each prompt runs alone.
    """
    import torch

    if pad is None and len(prompts) > 1:
        return [v for prompt in prompts for v in vectors(model, [prompt], how, pad)]
    if how is None and pad is not None:
        model.config.pad_token_id = pad  # a head of a decoder looks for the last token before it
    width = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*p, *[pad or 0] * (width - len(p))] for p in prompts], device=device)
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts], device=device)
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask)
    if how is None:
        scores: list[list[float]] = out.logits.float().tolist()
        return scores
    states = out.last_hidden_state.float()
    if how == MEAN:
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        at = mask.sum(1) - 1 if how == LAST else torch.zeros(len(prompts), dtype=torch.long, device=device)
        pooled = states[torch.arange(len(prompts), device=device), at]
    found: list[list[float]] = torch.nn.functional.normalize(pooled, dim=-1).tolist()
    return found
