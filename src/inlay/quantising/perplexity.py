"""How well a checkpoint predicts text: exp of the mean negative log-likelihood of a token."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.errors import InputError
from inlay.extras import needs
from inlay.plan.build import make_plan
from inlay.quantising.calibration import MAX_LENGTH, Text, encode, read_tokenizer
from inlay.quantising.skeleton import make_config, model_class
from inlay.run.tensors import merged_tensors


def perplexity(directory: str | os.PathLike[str], texts: Sequence[Text], max_length: int = MAX_LENGTH) -> float:
    """Perplexity in float32 of a checkpoint that `inlay` reads, quantised or not.

    The texts are put end to end and cut into blocks of `max_length` tokens, the last of them shorter; the first token
    of a block is given. The whole model is held in memory, in float32. Quantised weights are decoded by `inlay`, so no
    kernel library is needed; what a kernel would lose in 16-bit arithmetic is not in the figure.
    """
    with needs("quant", "perplexity"):
        import torch
    path = Path(directory)
    tokenizer = read_tokenizer(path)
    tokens = [token for text in texts for token in encode(tokenizer, text)]
    blocks = [b for at in range(0, len(tokens), max_length) if len(b := tokens[at : at + max_length]) > 1]
    if not blocks:
        raise InputError("perplexity needs a text of at least 2 tokens")
    model = load_float32(path)
    total, count = 0.0, 0
    with torch.no_grad():
        for block in blocks:
            ids = torch.tensor([block])
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            total += float(losses)
            count += len(block) - 1
    return math.exp(total / count)


def load_float32(directory: Path) -> Any:
    """The model of a checkpoint in float32, in evaluation mode."""
    stored = open_checkpoint(directory)
    plan = make_plan(directory, [], torch_dtype="float32")
    cls = model_class(stored.config, directory)
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model, info = cls.from_pretrained(
        None, config=make_config(stored.config), state_dict=dict(merged_tensors(plan)), output_loading_info=True
    )
    if info["missing_keys"]:
        raise InputError(f"{directory}: has no tensor for {sorted(info['missing_keys'])[0]}; it is not whole")
    return model.float().eval()
