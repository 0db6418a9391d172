"""What a model class knows and a checkpoint does not say: orientation of weights, names of tied ends.

Declared here, by `model_type` of config.json, because a square matrix fits both ways and a tied head is
not stored at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

# Families whose attention and MLP weights are transformers' Conv1D, stored (in, out).
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

# Last words of the modules that hold the input embedding, and the keys of the head tied to it.
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "shared"}
)
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "language_model.lm_head.weight")
MASKED_HEADS = {
    "bert": "cls.predictions.decoder.weight",
    "roberta": "lm_head.decoder.weight",
    "xlm-roberta": "lm_head.decoder.weight",
    "distilbert": "vocab_projector.weight",
}
# A head that comes apart takes its bias along, where that is tied too: key -> where the value is stored.
TIED_BIASES = {
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}


def stored_transposed(model_type: str | None, module: str) -> bool | None:
    """Whether the family stores this module's weight as (in, out); None where the family is not declared."""
    if model_type in CONV1D_FAMILIES:
        return module.rpartition(".")[2] in CONV1D_MODULES
    return None


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in EMBEDDINGS


def text_config(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Dotted path and content of the part of a config that describes the language model."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), Mapping):
            return name + ".", config[name]
    return "", config


def is_tied(config: Mapping[str, Any], keys: Set[str]) -> bool:
    """Whether input embedding and head are one tensor in memory.

    The config decides where it says so; many leave it to the default of their class. Then a head that
    is not stored must come from the embedding.
    """
    for part in (config, text_config(config)[1]):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return has_head(config) and not any(key in keys for key in HEADS)


def head_key(config: Mapping[str, Any], keys: Set[str]) -> str | None:
    """Key of the output head: the stored one, else the name under which the class would load it.

    None for a model without a head, or one whose head's name is not known here.
    """
    stored = [key for key in HEADS if key in keys]
    if stored:
        return stored[0]
    architecture = architecture_of(config)
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        return MASKED_HEADS.get(str(config.get("model_type")))
    if not has_head(config) or config.get("is_encoder_decoder"):
        return None
    if any(key.startswith("language_model.model.") for key in keys):
        return "language_model.lm_head.weight"
    return "embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether the class has an output head over the vocabulary at all."""
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "WithLMHead")
    return architecture_of(config).endswith(endings)


def architecture_of(config: Mapping[str, Any]) -> str:
    """First name in `architectures`, or the empty string."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""
