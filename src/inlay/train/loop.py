"""The loop: transformers' Trainer with our data and records.

What is ours stands in classes of its own, which are put before those of transformers when a run begins: importing this
file is light.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.errors import InputError
from inlay.train import adalora, converting, records
from inlay.train.examples import Block, collate, learned
from inlay.train.recipe import ADALORA, FULL, Recipe
from inlay.train.stop import Stop


@dataclass(frozen=True)
class Papers:
    """What goes beside each checkpoint: the tokenizer of the base, the arguments and the record of the base, which the
    first process makes when it is asked; and, for PiSSA and OLoRA, the pairs at the start."""

    folder: Path
    template: str | None
    args: Mapping[str, Any]
    base: Callable[[Path], Mapping[str, Any]] | None
    initial: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Blocks:
    """Blocks to train on and to evaluate with, and the id that fills rows up."""

    train: Sequence[Block]
    evaluate: Sequence[Block]
    pad_id: int


_Base: Any = object  # in a run, the class of transformers


def new_trainer(
    recipe: Recipe,
    arguments: Any,
    model: Any,
    blocks: Blocks,
    papers: Papers,
    log: records.Log | None,
    stop: Stop,
    say: Callable[[str], None],
) -> Any:
    """A Trainer with our saving, logging and stopping. `log` is None in all processes but the first."""
    import transformers
    from transformers.trainer_callback import ExportableState

    class OurTrainer(Trainer, transformers.Trainer):  # type: ignore[misc, unused-ignore]
        pass

    class Callback(Keeper, transformers.TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
        pass

    trainer = OurTrainer(recipe, arguments, model, blocks, papers, Callback(recipe, log, stop, say))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Trainer(_Base):  # type: ignore[misc, unused-ignore]
    """Saves converted pairs and records, goes on from the pairs as they were trained, and counts losses by tokens."""

    def __init__(
        self, recipe: Recipe, arguments: Any, model: Any, blocks: Blocks, papers: Papers, keeper: Keeper
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=list(blocks.train),
            eval_dataset=list(blocks.evaluate) or None,
            data_collator=lambda batch: collate(batch, blocks.pad_id, recipe.packing),
            callbacks=[keeper],
        )
        self.recipe, self.papers, self.keeper = recipe, papers, keeper
        self.tokens_in_row = sum(map(learned, blocks.evaluate)) / max(1, len(blocks.evaluate))
        if recipe.train_type == ADALORA:
            self.orthogonal_weight = self._peft_config.orth_reg_weight
        if recipe.train_type != FULL:
            self.label_names = ["labels"]

    @property
    def _peft_config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).peft_config["default"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In evaluation each token counts the same, however the rows lie in batches: the mean of these losses over
        rows, which the Trainer takes, is the mean over tokens."""
        if not model.training:
            num_items_in_batch = self.tokens_in_row * len(inputs["labels"]) * self.accelerator.num_processes
        if self.recipe.train_type == ADALORA:
            self._weigh_orthogonality(model.training, num_items_in_batch is not None)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _weigh_orthogonality(self, training: bool, summed: bool) -> None:
        """PEFT adds the penalty to the loss of each batch; batches of one step that are summed must not add it more
        than once, and it is no part of the loss on held-out rows."""
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes if summed else 1
        self._peft_config.orth_reg_weight = self.orthogonal_weight / parts if training else 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.keeper.add(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["loss"] = self.keeper.mean_loss(self.accelerator, self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, step = Path(self.args.output_dir), self.state.global_step
        with records.whole_or_gone(run, step, self.args.should_save):
            self.keeper.gather(self.accelerator)  # no process writes before the folder is cleared
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes a part

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers makes the folder of a checkpoint: apart, until it is whole."""
        return str(records.draft_folder(Path(self.args.output_dir)))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.recipe.train_type == ADALORA:
            self._peft_config.orth_reg_weight = self.orthogonal_weight
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        papers, folder = self.papers, Path(str(output_dir or self.args.output_dir))
        if papers.initial is not None:
            converting.convert_checkpoint(folder, papers.initial)
        if self.recipe.train_type == ADALORA:
            adalora.save(self.accelerator.unwrap_model(self.model), folder)
        if self.recipe.train_type == FULL:
            records.restore_cache(papers.folder, folder)
        records.copy_tokenizer(papers.folder, folder, papers.template)
        records.finish_checkpoint(folder, papers.args, papers.base(folder) if papers.base else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.recipe.train_type == ADALORA:
            adalora.load(self.model if model is None else model, folder)
            return
        if self.papers.initial is not None:
            converting.check_start(folder, self.papers.initial)
            if not self.is_fsdp_enabled:  # which has a file of its own with the pairs as they were trained
                folder /= converting.UNCONVERTED
        super()._load_from_checkpoint(str(folder), model)


class Keeper:
    """The callback: logs, links, old checkpoints, and the end that was asked for.

    A loss is logged as the mean over the steps since the last one. What was summed up since then goes into a
    checkpoint, so that a run that goes on from it logs the same.
    """

    def __init__(self, recipe: Recipe, log: records.Log | None, stop: Stop, say: Callable[[str], None]) -> None:
        self.recipe, self.out, self.stop, self.say = recipe, log, stop, say
        self.began = time.monotonic()
        self.summed: Any = 0.0  # losses of this process since `since`, a step
        self.since = 0
        self.kept = 0.0  # `summed` as it was when a checkpoint was asked for, the mean of all processes

    def add(self, loss: Any) -> None:
        self.summed = self.summed + loss.detach().float()

    def gather(self, accelerator: Any) -> None:
        import torch

        summed = torch.as_tensor(self.summed, dtype=torch.float32, device=accelerator.device)
        self.kept = float(accelerator.gather(summed.reshape(1)).mean())

    def mean_loss(self, accelerator: Any, step: int) -> float:
        """The mean loss of a step since the last call."""
        self.gather(accelerator)
        mean = self.kept / (step - self.since)
        self.summed, self.since = 0.0, step
        return mean

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"summed": self.kept, "since": self.since}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        recorded = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.summed, self.since = recorded["summed"], recorded["since"]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise InputError(
                f"step {state.global_step}: the loss is {loss}; nothing is learned from here. Lower "
                "--learning_rate, or train in bfloat16 or float32. Checkpoints before it are kept"
            )
        if self.out is None or not logs or "train_runtime" in logs:
            return
        self.out.append({"step": state.global_step, **logs, "seconds": round(time.monotonic() - self.began, 2)})
        self.say(describe(state.global_step, state.max_steps, logs))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.recipe.train_type == ADALORA:  # before the gradients go, which its scores are made of
            model.base_model.update_and_allocate(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop.anywhere():
            control.should_save = control.should_training_stop = True
        elif control.should_save and args.eval_strategy != "no":
            control.should_evaluate = True  # so that each checkpoint can be the best one

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.out is None:
            return
        run = Path(args.output_dir)
        best = best_step(run, state.log_history)
        records.point(run, records.LAST, state.global_step)
        if best is not None:
            records.point(run, records.BEST, best)
        if self.recipe.save_total_limit is not None:
            records.remove_old(run, self.recipe.save_total_limit, state.global_step, best)


def best_step(run: Path, history: Sequence[Mapping[str, Any]]) -> int | None:
    """Step of the checkpoint with the smallest loss on held-out rows; None before there is one."""
    losses = {
        int(line["step"]): line["eval_loss"]
        for line in history
        if math.isfinite(line.get("eval_loss", math.nan)) and records.checkpoint_path(run, line["step"]).is_dir()
    }
    return min(losses, key=lambda step: (losses[step], step), default=None)


def describe(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """One line of progress."""
    words = {"loss": "loss {:.4f}", "eval_loss": "loss on held-out rows {:.4f}", "learning_rate": "rate {:.2e}"}
    found = [form.format(logs[name]) for name, form in words.items() if name in logs]
    return f"step {step}/{steps}  " + "  ".join(found)
