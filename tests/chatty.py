"""Tiny models that can be talked to: those of `cases.py` with a tokenizer of 40 single characters and a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Kit
from inlay.adapters.adapter import read_adapter
from inlay.infer.backend import Request, Sampling, Source

LETTERS = "abcdefghijklmnopqrstuvwxyz .,?!\n[]:#"  # 36, after four tokens that are none
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
GREEDY = Sampling(max_new_tokens=10, temperature=0)


def add_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write a tokenizer into a model directory; a text begins with `<s>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *LETTERS))}
    assert len(vocabulary) == 40
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>",
    }  # fmt: skip
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def talking(kit: Kit, where: Path, model: str = "qwen2", dtype: str = "F32", template: str | None = TEMPLATE) -> Path:
    """A copy of one of the kit's bases that has a tokenizer."""
    return add_tokenizer(kit.copy_of(kit.base(model, dtype), where), template)


def source_of(base: Path, adapters: Sequence[Path] = (), **more: Any) -> Source:
    return Source(base, tuple(read_adapter(a, f"{a.name}#{i}") for i, a in enumerate(adapters)), **more)


def ask(backend: Any, text: str, sampling: Sampling = GREEDY) -> Request:
    return Request(tuple(backend.tokenizer(text)["input_ids"]), sampling)


def logits(model: Any, seed: int = 7) -> Any:
    """For a fixed prompt of 2 × 9 tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=torch.randint(0, 40, (2, 9), generator=generator)).logits
