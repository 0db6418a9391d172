"""How long a run is, and the recipe in the words of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.errors import InputError, first_line
from inlay.train.launch import check_settings, check_sharding
from inlay.train.recipe import TOTAL_BATCH, Recipe


@dataclass(frozen=True)
class Schedule:
    """How many steps, of how many blocks."""

    steps: int
    accumulation: int
    warmup: int


def make_schedule(recipe: Recipe, blocks: int, processes: int) -> Schedule:
    """Steps as the Trainer counts them: the last, smaller one of an epoch is a step too."""
    batch = recipe.per_device_train_batch_size * processes
    accumulation = recipe.gradient_accumulation_steps or max(1, math.ceil(TOTAL_BATCH / batch))
    an_epoch = math.ceil(math.ceil(blocks / batch) / accumulation)
    steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * an_epoch)
    return Schedule(steps, accumulation, math.ceil(steps * recipe.warmup_ratio))


def training_arguments(
    recipe: Recipe, run: Path, schedule: Schedule, dtype: str, evaluates: bool, processes: int
) -> Any:
    """The recipe in the words of transformers. Raises InputError for what it does not know."""
    import torch
    import transformers

    on_cpu = not torch.cuda.is_available()
    every = recipe.eval_steps or recipe.save_steps
    evaluation: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": every} if evaluates else {}
    fsdp: Any = True if recipe.fsdp == "true" else recipe.fsdp
    check_sharding(recipe, processes, on_cpu)
    try:
        _check_reports(recipe)
        arguments = transformers.TrainingArguments(
            output_dir=str(run),
            max_steps=schedule.steps,
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            per_device_eval_batch_size=recipe.per_device_eval_batch_size,
            gradient_accumulation_steps=schedule.accumulation,
            learning_rate=recipe.rate,
            lr_scheduler_type=recipe.lr_scheduler_type,
            warmup_steps=schedule.warmup,
            weight_decay=recipe.weight_decay,
            adam_beta2=recipe.adam_beta2,
            max_grad_norm=recipe.max_grad_norm,
            bf16=dtype == "bfloat16",
            fp16=dtype == "float16",
            use_cpu=on_cpu,
            ddp_backend="gloo" if on_cpu and processes > 1 else None,
            ddp_find_unused_parameters=False,
            seed=recipe.seed,
            data_seed=recipe.sampling_seed,
            dataloader_num_workers=recipe.dataloader_num_workers,
            dataloader_pin_memory=not on_cpu,
            remove_unused_columns=False,
            prediction_loss_only=True,
            logging_steps=recipe.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            save_steps=recipe.save_steps,
            report_to=list(recipe.report_to) or "none",
            deepspeed=recipe.deepspeed,
            fsdp=fsdp,
            fsdp_config=recipe.fsdp_config,
            **evaluation,
            **_checkpointing(transformers.TrainingArguments) if recipe.gradient_checkpointing else {},
        )
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        raise InputError(f"transformers does not take these arguments: {first_line(error)}") from error
    check_settings(arguments, recipe)
    return arguments


def _check_reports(recipe: Recipe) -> None:
    """Raises ValueError or RuntimeError for a reporter that transformers does not know, or that is not installed."""
    from transformers import integrations

    known: Any = integrations
    for reporter in known.get_reporting_integration_callbacks(
        [n for n in recipe.report_to if n not in ("all", "none")]
    ):
        reporter()


def _checkpointing(arguments: Any) -> dict[str, Any]:
    """Gradient checkpointing, under the name that this version of transformers has for it."""
    name = "activation_checkpointing"
    name = name if name in arguments.__dataclass_fields__ else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
