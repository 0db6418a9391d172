"""The recipe as PEFT's config: one function for each method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from inlay.errors import InputError, first_line
from inlay.train.anatomy import Anatomy
from inlay.train.names import shortest
from inlay.train.recipe import ADALORA, FULL, IA3, LOHA, LOKR, LORA, OFT, VERA, Recipe
from inlay.train.targets import Asked, Targets, check_read, resolve

TASK = "CAUSAL_LM"
_EXPERT_WORDS = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
LOST = 0.1  # share of weights that learn nothing, from which on it is said
SAMPLED = 1 << 16
_INIT: dict[str, Any] = {"true": True, "false": False}


def find_targets(model: Any, recipe: Recipe) -> Targets:
    """What the recipe trains in this model. Raises InputError."""
    asked = Asked(
        recipe.target_modules,
        recipe.target_regex,
        recipe.target_parameters,
        recipe.exclude_modules,
        recipe.modules_to_save,
        recipe.frozen,
    )
    kinds = ("linear", "embedding") if recipe.method == LORA else ("linear",)
    return check_read(model, resolve(model, asked, kinds))


def add_tuner(model: Any, recipe: Recipe, targets: Targets, steps: int) -> Any:
    """The model with a new adapter; all else is frozen. `steps` is the length of the training.

    Raises InputError for layers that the method cannot train.
    """
    import peft
    import torch

    if recipe.shifts_base:
        _check_rank(model, recipe, targets)
    anatomy = Anatomy(model)  # before PEFT puts layers of its own between
    frozen = {name for name in anatomy.modules if anatomy.part(name) in recipe.frozen}
    saved = list(targets.saved)
    common = {"target_modules": list(targets.listed), "modules_to_save": saved or None, "task_type": TASK}
    config = CONFIGS[recipe.method](peft, model, recipe, targets, common, steps)
    try:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=recipe.lora_dtype is None)
    except (ValueError, NotImplementedError, TypeError) as error:  # how PEFT says that a layer or mix is not supported
        if "ParamWrapper" in str(error) and not targets.parameters:
            raise _renamed(targets) from error
        raise InputError(f"--train_type {recipe.train_type}: {first_line(error)}") from error
    tuner: Any = adapted.base_model
    if set(tuner.targeted_module_names) != set(targets.modules):
        raise _renamed(targets)
    if recipe.lora_bias != "none":
        _freeze_biases(adapted, frozen)
    dtype = getattr(torch, recipe.lora_dtype) if recipe.lora_dtype else torch.float32
    for p in adapted.parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = p.data.to(dtype)  # small steps are lost in 16 bits
    return adapted


def _renamed(targets: Targets) -> InputError:
    """PEFT takes these words for experts of older versions of the architecture, whatever layers they name here."""
    words = " ".join(w for w in targets.listed if w.rpartition(".")[2] in _EXPERT_WORDS)
    return InputError(
        f"on this architecture PEFT reads {words or ' '.join(targets.listed)} as names of the experts, and would train "
        f"these instead of the layers that are meant; leave them out (--exclude_modules {words}), or name the experts "
        "with --target_parameters"
    )


def _check_rank(model: Any, recipe: Recipe, targets: Targets) -> None:
    """PiSSA and OLoRA take their pairs out of the weights, which have no more directions than their smaller side.

    Raises InputError.
    """
    for name in targets.modules:
        module = model.get_submodule(name)
        if recipe.lora_rank > (most := min(module.weight.shape)):
            raise InputError(
                f"--lora_rank {recipe.lora_rank}: --init_weights {recipe.init_weights} can take at most {most} "
                f"directions out of {name}; lower it, or leave the module out with --exclude_modules"
            )


def _freeze_biases(adapted: Any, frozen: Collection[str]) -> None:
    """PEFT frees every bias of a model; those of modules in `frozen` stay as they are."""
    for name, p in adapted.get_base_model().named_parameters():
        module, _, last = name.replace(".base_layer", "").rpartition(".")
        if last == "bias" and module in frozen:
            p.requires_grad_(False)


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


def changed_blocks(adapted: Any, recipe: Recipe) -> tuple[str, ...]:
    """What is said where PEFT takes another block size for OFT than the one asked for, which has to divide a layer's
    inputs."""
    if recipe.method != OFT:
        return ()
    sizes = Counter(
        layer.oft_block_size["default"]
        for layer in adapted.modules()
        if "default" in (getattr(layer, "oft_block_size", None) or ())
    )
    others = [f"{size} in {count} modules" for size, count in sorted(sizes.items()) if size != recipe.oft_block_size]
    if not others:
        return ()
    what = f"--oft_block_size {recipe.oft_block_size}: does not divide the inputs everywhere"
    return (f"warning: {what}; PEFT takes {', '.join(others)}",)


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
    if recipe.freeze_llm:
        raise InputError("--freeze_llm: rows of text pass no other part, so nothing is left to train")
    lost = _lost_share(model, recipe.rate)
    note = (
        f"warning: --train_type full in bfloat16: {lost:.0%} of the weights are too large for a step of "
        f"{recipe.rate:.0e} (--learning_rate), which rounding takes back; --torch_dtype float32 keeps all steps"
    )
    return Targets((), ("all weights",) if not recipe.frozen else (), notes=(note,) if lost > LOST else ())


def _lost_share(model: Any, rate: float) -> float:
    """Share of the trained weights in bfloat16 that stay as they are when `rate`, the size of a step of Adam, is added.

    Half the distance to the next number is more than |w| / 512 there. Of each tensor a part is looked at.
    """
    import torch

    lost = seen = 0
    for p in model.parameters():
        if p.requires_grad and p.numel():
            part = p.detach().flatten()[:SAMPLED]
            lost += int((part.abs() > 512 * rate).sum()) if p.dtype == torch.bfloat16 else 0
            seen += part.numel()
    return lost / max(1, seen)
