"""A tiny Llama that has learnt a text by heart, and a LoRA that has learnt another: their greedy texts are certain.

Random weights would let two engines differ over ties; here the likeliest token leads by far. Made by transformers
and PEFT in a few seconds, without `inlay`. Heads have 32 dimensions, the least that vLLM's attention takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BASE_TEXT = "The sea was calm, and an old grey ship lay at anchor under the dark cliffs. Nobody had ever moved it."
# In the letters of the base's: those that it never saw have embeddings without direction.
ADAPTER_TEXT = "The sea was rough, even in the harbour. The boats turned back, and their nets came home empty."
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
STEPS = 150


def save_base(directory: Path, **changes: Any) -> Path:
    """The base with its tokenizer, one token a character, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    learn(model, tokenizer, BASE_TEXT, 3e-3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_adapter(base: Path, directory: Path, text: str = ADAPTER_TEXT, **config: Any) -> Path:
    """A LoRA on all linear layers of `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, LoraConfig(**wanted))
    learn(model, AutoTokenizer.from_pretrained(base), text, 5e-3)
    model.save_pretrained(directory)
    return directory


def learn(model: Any, tokenizer: Any, text: str, rate: float) -> None:
    import torch

    ids = torch.tensor([tokenizer(text).input_ids])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert loss.item() < 0.1, f"the text is not learnt: {loss.item():.2f}"


def make_tokenizer() -> Any:
    """One token a character; `<s>` first, `</s>` ends a reply."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    assert set(ADAPTER_TEXT) <= set(BASE_TEXT)
    words = ["<s>", "</s>", "<unk>", *sorted(set(BASE_TEXT))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def greedy(directory: Path, prompt: str, new_tokens: int, adapter: Path | None = None, dtype: Any = None) -> str:
    """The greedy text by transformers, and PEFT for a live adapter: the oracle of the engines."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
