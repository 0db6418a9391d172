"""A base that is stored in codes: how it is loaded, so that an adapter can be trained on it.

The layers of bitsandbytes, GPTQ and AWQ hand gradients on, so these bases keep their codes. Others have layers for
inference alone: compressed-tensors rounds activations without a gradient, so that nothing would reach the adapters
below. Those are decoded by transformers while they are loaded, and take the memory of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.checkpoints.decoded import quantisation
from inlay.errors import InputError
from inlay.train.recipe import FULL, ON_CODES, Recipe

KEPT = ("bitsandbytes", "gptq", "awq")
DECODED = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}


def stored_method(base: Path, config: Any) -> str | None:
    """`quant_method` of a base in codes, None for one in floats. `config` is its config in transformers.

    Raises InputError for codes that transformers does not know of and would read as if they were weights.
    """
    found = quantisation(open_checkpoint(base))
    if found is None:
        return None
    method = _method(found)
    if not _seen_by_transformers(config) or method not in (*KEPT, *DECODED):
        raise InputError(
            f"{base}: is stored in codes ({method or 'of no name'}) that cannot be trained on; {cure(base)}"
        )
    return method


def _method(found: Mapping[str, Any]) -> str | None:
    if any(found.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"  # older checkpoints name no method
    return found.get("quant_method")


def _seen_by_transformers(config: Any) -> bool:
    parts = (config, config.get_text_config(decoder=True))
    return any(getattr(part, name, None) for part in parts for name in ("quantization_config", "compression_config"))


def check_recipe(method: str | None, recipe: Recipe, base: Path) -> None:
    """Raises InputError for what cannot be trained on a base in codes."""
    if method is None:
        return
    what = None
    if recipe.quant_method:
        what = f"--quant_method {recipe.quant_method}: {base} is stored in codes already ({method}); leave it out, or"
    elif recipe.train_type == FULL:
        what = f"--train_type full: {base} is stored in codes ({method}), which take no small steps;"
    elif method in KEPT and recipe.train_type not in ON_CODES:
        what = f"--train_type {recipe.train_type}: cannot be trained on a base in codes ({base}: {method});"
    elif method in KEPT and recipe.shifts_base:
        what = f"--init_weights {recipe.init_weights}: takes a part of {base} away, which is in codes ({method});"
    if what:
        raise InputError(f"{what} {cure(base)}")


def loading(method: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which codes are decoded that have no layers to train on.

    Raises ImportError where their library is missing.
    """
    if method not in DECODED:
        return {}
    import transformers

    return {"quantization_config": getattr(transformers, DECODED[method])(dequantize=True)}


def cure(base: Path) -> str:
    command = f"inlay export --model {base} --torch_dtype bfloat16 --output_dir DENSE"
    return f"decode it first, with `{command}`, and train on that"
