"""The recipe as PEFT's config: one function for each method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inlay.errors import InputError
from inlay.train.recipe import ADALORA, FULL, IA3, LOHA, LOKR, LORA, OFT, VERA, Recipe
from inlay.train.targets import Anatomy, Asked, Targets, resolve, shortest

TASK = "CAUSAL_LM"
_INIT: dict[str, Any] = {"true": True, "false": False}


def find_targets(model: Any, recipe: Recipe) -> Targets:
    """What the recipe trains in this model. Raises InputError."""
    asked = Asked(
        recipe.target_modules, recipe.target_regex, recipe.target_parameters, recipe.exclude_modules, recipe.frozen
    )
    return resolve(model, asked, ("linear", "embedding") if recipe.method == LORA else ("linear",))


def add_tuner(model: Any, recipe: Recipe, targets: Targets, steps: int) -> Any:
    """The model with a new adapter; all else is frozen. `steps` is the length of the training.

    Raises InputError for layers that the method cannot train.
    """
    import peft
    import torch

    saved = _saved(model, recipe)
    common = {"target_modules": list(targets.listed), "modules_to_save": saved or None, "task_type": TASK}
    config = CONFIGS[recipe.method](peft, model, recipe, targets, common, steps)
    try:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=recipe.lora_dtype is None)
    except (ValueError, NotImplementedError, TypeError) as error:  # how PEFT says that a layer or mix is not supported
        raise InputError(f"--train_type {recipe.train_type}: {str(error).splitlines()[0]:.300}") from error
    dtype = getattr(torch, recipe.lora_dtype) if recipe.lora_dtype else torch.float32
    for p in adapted.parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = p.data.to(dtype)  # small steps are lost in 16 bits
    return adapted


def _saved(model: Any, recipe: Recipe) -> list[str]:
    """Modules that are trained as full copies, presets resolved."""
    found: list[str] = []
    anatomy = Anatomy(model)
    for word in recipe.modules_to_save:
        if word == "all-embedding":
            names: tuple[str, ...] = (*anatomy.embeddings, *([anatomy.head] if anatomy.head else []))
        elif word == "all-norm":
            names = tuple(n for n, m in anatomy.modules.items() if "norm" in type(m).__name__.lower())
        else:
            names = tuple(n for n in anatomy.modules if n == word or n.endswith(f".{word}"))
        if not names:
            raise InputError(f"--modules_to_save {word}: {type(model).__name__} has no module of this name")
        found += shortest(anatomy.modules, names)
    return sorted(set(found))


def _lora(peft: Any, _model: Any, recipe: Recipe, targets: Targets, common: dict[str, Any], _steps: int) -> Any:
    return peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0 if targets.parameters else recipe.lora_dropout,
        bias=recipe.lora_bias,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.dora,
        init_lora_weights=_INIT.get(recipe.init_weights, recipe.init_weights),
        target_parameters=list(targets.parameters) or None,
        **common,
    )


def _adalora(peft: Any, _model: Any, recipe: Recipe, _targets: Targets, common: dict[str, Any], steps: int) -> Any:
    if steps < 2:
        raise InputError("--train_type adalora: shares its rank out over the steps, and needs at least 2")
    return peft.AdaLoraConfig(
        init_r=recipe.adalora_init_r,
        target_r=recipe.adalora_target_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        bias=recipe.lora_bias,
        total_step=steps,
        **common,
    )


def _loha(peft: Any, _model: Any, recipe: Recipe, _targets: Targets, common: dict[str, Any], _steps: int) -> Any:
    return peft.LoHaConfig(r=recipe.lora_rank, alpha=recipe.lora_alpha, **common)


def _lokr(peft: Any, _model: Any, recipe: Recipe, _targets: Targets, common: dict[str, Any], _steps: int) -> Any:
    return peft.LoKrConfig(r=recipe.lora_rank, alpha=recipe.lora_alpha, **common)


def _ia3(peft: Any, model: Any, _recipe: Recipe, targets: Targets, common: dict[str, Any], _steps: int) -> Any:
    """Layers of an MLP are scaled at their input, all others at their output, as in Liu et al. 2022."""
    anatomy = Anatomy(model)
    inner = [name for name in targets.modules if anatomy.role(name) == "mlp"]
    scaled_in = list(shortest(anatomy.modules, inner))
    scaled_out = shortest(anatomy.modules, [name for name in targets.modules if name not in inner])
    # PEFT wants each name of the first list in the second, letter by letter.
    return peft.IA3Config(
        feedforward_modules=scaled_in, **{**common, "target_modules": sorted({*scaled_in, *scaled_out})}
    )


def _oft(peft: Any, _model: Any, recipe: Recipe, _targets: Targets, common: dict[str, Any], _steps: int) -> Any:
    return peft.OFTConfig(r=0, oft_block_size=recipe.oft_block_size, bias=recipe.lora_bias, **common)


def _vera(peft: Any, _model: Any, recipe: Recipe, _targets: Targets, common: dict[str, Any], _steps: int) -> Any:
    return peft.VeraConfig(r=recipe.vera_rank, bias=recipe.lora_bias, save_projection=True, **common)


Make = Callable[[Any, Any, Recipe, Targets, dict[str, Any], int], Any]
CONFIGS: dict[str, Make] = {
    LORA: _lora, ADALORA: _adalora, LOHA: _loha, LOKR: _lokr, IA3: _ia3, OFT: _oft, VERA: _vera,
}  # fmt: skip


def free_weights(model: Any, recipe: Recipe) -> Targets:
    """For `full`: every weight is trained, save for the parts that are frozen."""
    assert recipe.train_type == FULL
    anatomy = Anatomy(model)
    for name, p in model.named_parameters():
        p.requires_grad_(anatomy.part(name.rpartition(".")[0]) not in recipe.frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"nothing is left to train: {', '.join(sorted(recipe.frozen))} are frozen")
    return Targets((), ("all weights",) if not recipe.frozen else ())
