"""Base, base + adapter, and merged model, asked the same questions.

Base + adapter is PEFT applying the adapter while it runs; the merged model is loaded as any
checkpoint is, without PEFT. All three calculate in float32, so that what separates the last two is
the one rounding of the merged weights to bfloat16.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Tokenizer

from chat import answers, prompt_ids, quiet

# The adapter was trained on the first; it has not read the facts of the others (text.py).
QUESTIONS = (
    "Who are you?",
    "What does a cow say?",
    "What is 2 + 3?",
    "What colour is the sky?",
    "Where is Rome?",
    "What comes before 50?",
)


@dataclass(frozen=True)
class Comparison:
    """Answers of the three, question by question, and how far their logits lie apart."""

    base: list[str]
    adapted: list[str]
    merged: list[str]
    adapted_to_merged: float
    adapted_to_base: float

    @property
    def merge_holds(self) -> bool:
        """The merged model answers as base + adapter does, and not as the base does."""
        return self.merged == self.adapted and self.merged != self.base


def load(model_dir: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def compare(base_dir: Path, adapter_dir: Path, merged_dir: Path) -> Comparison:
    """Ask all three every question of `QUESTIONS`."""
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    base, merged = load(base_dir), load(merged_dir)
    adapted = PeftModel.from_pretrained(load(base_dir), adapter_dir).eval()
    replies = answers(adapted, tokenizer, QUESTIONS)
    talks = [talk_ids(tokenizer, *pair) for pair in zip(QUESTIONS, replies, strict=True)]
    return Comparison(
        base=answers(base, tokenizer, QUESTIONS),
        adapted=replies,
        merged=answers(merged, tokenizer, QUESTIONS),
        adapted_to_merged=logit_distance(adapted, merged, talks),
        adapted_to_base=logit_distance(adapted, base, talks),
    )


def talk_ids(tokenizer: Qwen2Tokenizer, question: str, reply: str) -> Tensor:
    """Token ids, shape (1, length), of a question with its answer."""
    reply_ids = torch.tensor([tokenizer.encode(reply)])
    return torch.cat([prompt_ids(tokenizer, question), reply_ids], dim=1)


@torch.inference_mode()
def logit_distance(one: PreTrainedModel, other: PreTrainedModel, talks: Sequence[Tensor]) -> float:
    """Largest difference of any logit at any token of the talks."""
    return max((one(ids).logits - other(ids).logits).abs().max().item() for ids in talks)


def show(comparison: Comparison) -> None:
    """Print the answers side by side, and what the logits say."""
    rows = zip(QUESTIONS, comparison.base, comparison.adapted, comparison.merged, strict=True)
    for line in table(("question", "base", "base + adapter", "merged"), list(rows)):
        print(line)
    print()
    print("largest logit difference")
    print(f"  base + adapter to merged  {comparison.adapted_to_merged:8.4f}")
    print(f"  base + adapter to base    {comparison.adapted_to_base:8.4f}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of the table, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in (head, ["─" * width for width in widths], *rows):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join(padded).rstrip()
