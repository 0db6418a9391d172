"""The loop: transformers' Trainer with our data, our records, and a way to stop that loses nothing."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from inlay.errors import InputError
from inlay.train import converting, records
from inlay.train.examples import Example, collate
from inlay.train.recipe import ADALORA, FULL, TOTAL_BATCH, Recipe

Block = list[Example]


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
    evaluation: dict[str, Any] = (
        {"eval_strategy": "steps", "eval_steps": every, "metric_for_best_model": "loss"} if evaluates else {}
    )
    try:
        return transformers.TrainingArguments(
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
            save_total_limit=recipe.save_total_limit,
            report_to=list(recipe.report_to) or "none",
            deepspeed=recipe.deepspeed,
            fsdp=recipe.fsdp,
            fsdp_config=recipe.fsdp_config,
            **evaluation,
            **_checkpointing(transformers.TrainingArguments) if recipe.gradient_checkpointing else {},
        )
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        raise InputError(f"transformers does not take these arguments: {str(error).splitlines()[0]:.400}") from error


def _checkpointing(arguments: Any) -> dict[str, Any]:
    """Gradient checkpointing, under the name that this version of transformers has for it."""
    name = "activation_checkpointing"
    name = name if name in arguments.__dataclass_fields__ else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class Stop:
    """Whether somebody asked to stop. The first Ctrl-C, or SIGTERM, ends the run after the step under way, with a
    checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(
            f"{signal.Signals(number).name}: stopping after this step, with a checkpoint", file=sys.stderr, flush=True
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, signals are heard; only the main thread may ask for that."""
        try:
            before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def anywhere(self) -> bool:
        """The same answer in every process."""
        import torch
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return self.asked
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        asked = torch.tensor(int(self.asked), device=device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked.item())


@dataclass(frozen=True)
class Papers:
    """What goes beside each checkpoint: the tokenizer of the base, the arguments and the record of the base, which the
    first process makes when it is asked; and, for PiSSA and OLoRA, the pairs at the start."""

    folder: Path
    template: str | None
    args: Mapping[str, Any]
    base: Callable[[Path], Mapping[str, Any]] | None
    initial: Mapping[str, Any] | None = None


def new_trainer(
    recipe: Recipe,
    arguments: Any,
    model: Any,
    pad_id: int,
    train: Sequence[Block],
    evaluate: Sequence[Block],
    papers: Papers,
    log: records.Log | None,
    stop: Stop,
    say: Callable[[str], None],
) -> Any:
    """A Trainer with our saving, logging and stopping. `log` is None in all processes but the first."""
    import transformers

    class OurTrainer(transformers.Trainer):  # type: ignore[misc, unused-ignore]
        """Saves converted pairs and records, and goes on from the pairs as they were trained."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            if not self.args.should_save:
                return
            folder = Path(str(output_dir or self.args.output_dir))
            if papers.initial is not None:
                converting.convert_checkpoint(folder, papers.initial)
            if recipe.train_type == FULL:
                records.restore_cache(papers.folder, folder)
            records.copy_tokenizer(papers.folder, folder, papers.template)
            records.finish_checkpoint(folder, papers.args, papers.base(folder) if papers.base else None)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            folder = Path(resume_from_checkpoint)
            if papers.initial is not None:
                converting.check_start(folder, papers.initial)
                folder /= converting.UNCONVERTED
            super()._load_from_checkpoint(str(folder), model)

    class Keeper(transformers.TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Logs, links, and the end that was asked for."""

        began = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(loss):
                raise InputError(
                    f"step {state.global_step}: the loss is {loss}; nothing is learned from here. Lower "
                    "--learning_rate, or train in bfloat16 or float32. Checkpoints before it are kept"
                )
            if log is None or not logs or "train_runtime" in logs:
                return
            log.append({"step": state.global_step, **logs, "seconds": round(time.monotonic() - self.began, 2)})
            say(describe(state.global_step, state.max_steps, logs))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if recipe.train_type == ADALORA:  # before the gradients go, which its scores are made of
                model.base_model.update_and_allocate(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.anywhere():
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if log is None:
                return
            run = Path(args.output_dir)
            records.point(run, records.LAST, run / f"checkpoint-{state.global_step}")
            if state.best_model_checkpoint:
                records.point(run, records.BEST, Path(state.best_model_checkpoint))

    positions = recipe.packing
    trainer = OurTrainer(
        model=model,
        args=arguments,
        train_dataset=list(train),
        eval_dataset=list(evaluate) or None,
        data_collator=lambda batch: collate(batch, pad_id, positions),
        callbacks=[Keeper()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if recipe.train_type != FULL:
        trainer.label_names = ["labels"]
    return trainer


def describe(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """One line of progress."""
    words = {"loss": "loss {:.4f}", "eval_loss": "loss on held-out rows {:.4f}", "learning_rate": "rate {:.2e}"}
    found = [form.format(logs[name]) for name, form in words.items() if name in logs]
    return f"step {step}/{steps}  " + "  ".join(found)
