"""Asking a model one question, the same way in training and in the demo."""

import warnings
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, Qwen2Tokenizer
from transformers.utils import logging

MAX_ANSWER_TOKENS = 40


def quiet() -> None:
    """No warnings or progress bars of transformers among the answers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def prompt_ids(tokenizer: Qwen2Tokenizer, question: str) -> torch.Tensor:
    """Token ids, shape (1, length), of a conversation that waits for its first answer."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids])


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: Qwen2Tokenizer, question: str) -> str:
    """The likeliest answer, token by token."""
    prompt = prompt_ids(tokenizer, question)
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


def answers(model: PreTrainedModel, tokenizer: Qwen2Tokenizer, asked: Iterable[str]) -> list[str]:
    """The answer to each question, every one asked afresh."""
    return [answer(model, tokenizer, question) for question in asked]
