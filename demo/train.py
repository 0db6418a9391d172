"""Train the demo's base model from `text.py`, in ten minutes on two CPU cores.

    python demo/train.py    demo/base/     Qwen2 architecture, one million weights, bfloat16

The adapter is trained by the demo itself (run.py), with `inlay sft`. The same seed, thread count and versions give the
same files. The base is saved in two shards with an index, the way large models come.
"""

import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from chat import answers, quiet
from text import SEED, Question, adapter_split, base_split, conversations, messages

DEMO = Path(__file__).resolve().parent
BASE = DEMO / "base"

THREADS = 2
TEST_QUESTIONS = 50
VOCAB_SIZE = 1024
UNLABELLED = -100

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn; one pass reads every training question once."""

    passes: int
    conversations_per_step: int
    learning_rate: float


BASE_SCHEDULE = Schedule(passes=16, conversations_per_step=32, learning_rate=3e-3)


@dataclass(frozen=True)
class Example:
    """A conversation in tokens; `labels` is `ids` where the assistant speaks."""

    ids: Tensor
    labels: Tensor


def train_tokenizer(questions: Iterable[Question]) -> Qwen2Tokenizer:
    """Byte-level BPE that splits text as Qwen2 does, with its chat markers."""
    blank = Qwen2Tokenizer(
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    texts = [text for question in questions for text in (f"user\n{question.text}\n", f"assistant\n{question.answer}\n")]
    return blank.train_new_from_iterator(texts, VOCAB_SIZE, show_progress=False)


def new_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Untrained model with the features of small Qwen2 models: GQA, q/k/v biases, tied head."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: Qwen2Tokenizer, question: Question) -> Example:
    """Tokens of one turn, labelled from the first token of the answer to its end marker."""
    asked, answered = messages([question])
    prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([asked, answered], return_dict=False)
    end = ids.index(tokenizer.eos_token_id, len(prompt)) + 1
    labels = [UNLABELLED] * len(ids)
    labels[len(prompt) : end] = ids[len(prompt) : end]
    return Example(torch.tensor(ids), torch.tensor(labels))


def joined(turns: Sequence[Example]) -> Example:
    """The turns as one conversation. No token crosses turns: chat markers keep them apart."""
    return Example(torch.cat([turn.ids for turn in turns]), torch.cat([turn.labels for turn in turns]))


def batches(tokenizer: Qwen2Tokenizer, questions: Sequence[Question], schedule: Schedule) -> Iterator[list[Example]]:
    """Every step's examples, pass after pass; those of one step are of like length."""
    rng = random.Random(SEED)
    encoded = {question: encode(tokenizer, question) for question in questions}
    for _ in range(schedule.passes):
        talks = [[encoded[turn] for turn in turns] for turns in conversations(questions, rng)]
        examples = sorted(map(joined, talks), key=lambda example: len(example.ids))
        size = schedule.conversations_per_step
        steps = [examples[first : first + size] for first in range(0, len(examples), size)]
        yield from rng.sample(steps, len(steps))


def padded(rows: list[Tensor], value: int) -> Tensor:
    """The rows as one tensor, filled up at their ends with `value`."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


def loss_on(model: PreTrainedModel, examples: Sequence[Example], pad_id: int) -> Tensor:
    """Mean cross entropy, in nats, of the labelled tokens."""
    ids = padded([example.ids for example in examples], pad_id)
    labels = padded([example.labels for example in examples], UNLABELLED)
    logits = model(input_ids=ids, attention_mask=(ids != pad_id).long()).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def fit(
    model: PreTrainedModel,
    steps: Sequence[list[Example]],
    learning_rate: float,
    pad_id: int,
) -> None:
    """Train the weights that require a gradient, in place, on one list of examples a step."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=len(steps), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for done, examples in enumerate(steps, 1):
        loss = loss_on(model, examples, pad_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if done % 100 == 0 or done == len(steps):
            print(f"  step {done}/{len(steps)}  loss {loss.item():.4f}", flush=True)
    model.eval()


def report(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    questions: Sequence[Question],
    label: str,
) -> None:
    """Ask up to `TEST_QUESTIONS` of the questions; print each miss and the share answered right."""
    count = min(TEST_QUESTIONS, len(questions))
    asked = random.Random(SEED).sample(questions, count)
    given = answers(model, tokenizer, [question.text for question in asked])
    misses = [(question, got) for question, got in zip(asked, given, strict=True) if got != question.answer]
    print(f"{label}: {count - len(misses)} of {count} answers right")
    for question, got in misses:
        print(f"  {question.text}  {got}  (right: {question.answer})")


def train_base() -> None:
    """Write `demo/base/`: tokenizer, weights in two shards, generation config."""
    split = base_split()
    tokenizer = train_tokenizer([*split.train, *adapter_split().train])
    model = new_model(tokenizer)
    steps = list(batches(tokenizer, split.train, BASE_SCHEDULE))
    fit(model, steps, BASE_SCHEDULE.learning_rate, tokenizer.pad_token_id)
    save_base(model, tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    report(saved, tokenizer, split.test, "base, wordings it has not read")
    report(saved, tokenizer, split.train, "base, wordings it has read")


def save_base(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Save in bfloat16, in shards of at most a megabyte; greedy answers by default."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(BASE, max_shard_size="1MB")
    tokenizer.save_pretrained(BASE)


def main() -> int:
    """Train, test and save; returns the exit code."""
    quiet()
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(mode=True)
    started = time.monotonic()
    train_base()
    print(f"base trained and tested in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
