"""Model and tokenizer, ready for training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from inlay.errors import InputError, first_line
from inlay.extras import needs
from inlay.train import codes
from inlay.train.examples import read_template
from inlay.train.launch import sharding
from inlay.train.recipe import FULL, Recipe

DEFAULT_MAX_LENGTH = 2048  # where the model names none


def read_tokenizer(path: Path, recipe: Recipe) -> Any:
    """The base's tokenizer, with the chat template that is asked for, and something to fill rows up with."""
    with needs("train", "training"):
        import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no tokenizer can be read ({first_line(error)})") from error
    if recipe.chat_template:
        tokenizer.chat_template = read_template(recipe.chat_template)
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """An id to fill rows up with: labels and masks leave it out, so any will do."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0


def read_config(path: Path, recipe: Recipe) -> Any:
    """The config of a model that tells the next word. Raises InputError for any other."""
    with needs("train", "training"):
        import transformers
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no model that transformers knows ({first_line(error)})") from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{path}: {config.model_type} has an encoder and a decoder; only decoders are trained here")
    return config


def find_class(config: Any, path: Path) -> Any:
    """The loader for a config: of words alone, or of words and images."""
    import transformers
    from transformers.models.auto import modeling_auto

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not _is_multimodal(config):
        return transformers.AutoModelForCausalLM
    if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return transformers.AutoModelForCausalLM
    raise InputError(f"{path}: {config.model_type} is no model that tells the next word, which is what sft trains")


def _is_multimodal(config: Any) -> bool:
    return config.get_text_config(decoder=True) is not config


def load_model(path: Path, config: Any, recipe: Recipe, stored: str | None = None) -> Any:
    """The model with its own weights, in the type to train in; `stored` names the codes that the base is in.

    Raises InputError when weights or a library are missing.
    """
    import torch

    name = dtype_name(config, recipe)
    _check_device(name, recipe)
    _check_head(config, path)
    kwargs: dict[str, Any] = {"config": config, "dtype": getattr(torch, name), "local_files_only": True}
    if recipe.quant_method:
        kwargs["quantization_config"] = _quantisation(recipe, getattr(torch, name))
    if torch.cuda.is_available() and not sharding(recipe):
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        model, found = find_class(config, path).from_pretrained(
            path,
            output_loading_info=True,
            trust_remote_code=recipe.trust_remote_code,
            **kwargs,
            **codes.loading(stored),
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        cure = f"; if it cannot be had here: {codes.cure(path)}" if stored else ""
        raise InputError(f"{path}: cannot be loaded for training ({first_line(error)}){cure}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(f"{path}: lacks {len(missing)} weights of the model: {', '.join(missing[:5])}")
    model.config.use_cache = False
    return model


def _check_head(config: Any, path: Path) -> None:
    """A classifier stored under the same config would be trained with a new head of words."""
    names = [n for n in config.architectures or [] if "SequenceClassification" in n or "TokenClassification" in n]
    if names:
        raise InputError(f"{path}: {names[0]} is a classifier; sft trains models that tell the next word")


def _quantisation(recipe: Recipe, dtype: Any) -> Any:
    import transformers

    config: Any = transformers.BitsAndBytesConfig
    with needs("qlora", "--quant_method bnb"):
        import bitsandbytes  # type: ignore[import-not-found, unused-ignore] # noqa: F401
    if recipe.quant_bits == 8:
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=recipe.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=recipe.bnb_4bit_use_double_quant,
    )


def dtype_name(config: Any, recipe: Recipe) -> str:
    """The type to load in: what is asked for, else that of the base."""
    if recipe.torch_dtype:
        return recipe.torch_dtype
    stored = config.get_text_config(decoder=True).dtype or config.dtype
    name = str(stored or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "bfloat16"


def _check_device(name: str, recipe: Recipe) -> None:
    import torch

    if name == "float16" and not torch.cuda.is_available():
        raise InputError("--torch_dtype float16 cannot be trained on the processor: give bfloat16 or float32")
    if name == "float16" and recipe.train_type == FULL:
        raise InputError("--torch_dtype float16: all weights in float16 cannot be trained; give bfloat16 or float32")


def longest(config: Any, recipe: Recipe) -> int:
    """Tokens in a row at most: as asked, or what the model can read."""
    reads = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if recipe.max_length is not None:
        if reads and recipe.max_length > reads:
            raise InputError(f"--max_length {recipe.max_length}: the base reads at most {reads} tokens")
        return recipe.max_length
    return min(reads, DEFAULT_MAX_LENGTH) if reads else DEFAULT_MAX_LENGTH
