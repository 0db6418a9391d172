"""Supervised fine-tuning: a recipe and a base in, a run folder with checkpoints out.

Everything that can be refused is refused before the first step: rows, template, targets, and whether the adapter could
be merged into this base, which is planned once with the untrained adapter.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inlay.adapters.adapter import ARGS, FINGERPRINT
from inlay.checkpoints.json_files import read_json_object
from inlay.datasets.row import Row
from inlay.errors import InlayError, InputError, OutputError
from inlay.extras import needs
from inlay.train import codes, converting, load, records
from inlay.train.data import data_digest, read_data
from inlay.train.examples import Block, Counts, Encoder
from inlay.train.launch import is_first, sharding
from inlay.train.loop import Blocks, Papers, new_trainer
from inlay.train.packing import check_packing, pack
from inlay.train.recipe import FULL, Recipe, check_output
from inlay.train.schedule import Schedule, make_schedule, training_arguments
from inlay.train.stop import Stop
from inlay.train.targets import Targets
from inlay.train.tuners import add_tuner, changed_blocks, find_targets, free_weights

Say = Callable[[str], None]
Fingerprint = Mapping[str, Any]
Resumed = tuple[Path, Mapping[str, Any]]  # a checkpoint and its `args.json`


@dataclass(frozen=True)
class Trained:
    """The end of a run: its folder, the last checkpoint, and the loss that was logged last."""

    run: Path
    checkpoint: Path
    steps: int
    loss: float | None
    interrupted: bool
    args: Mapping[str, Any]


@dataclass(frozen=True)
class _Data:
    train: list[Block]
    evaluate: list[Block]
    counts: Counts
    held_out: Counts
    digest: str


def run_sft(recipe: Recipe, base: Path, say: Say, resumed: Resumed | None = None) -> Trained:
    """Train. `base` is the folder of `recipe.model`; `resumed` a checkpoint to go on from and its `args.json`.

    In a run of several processes every one calls this; the first writes. Raises InputError, and OutputError where a
    file cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries: nothing that a user of a command can act on
        try:
            return _run(recipe, base, say, resumed)
        except OSError as error:  # a full disk, mostly; what cannot be read is told where it is read
            if isinstance(error, InlayError):
                raise
            where = error.filename or f"{recipe.output_dir}, or {tempfile.gettempdir()} for drafts"
            raise OutputError(f"{where}: {error.strerror or error}") from error


def _run(recipe: Recipe, base: Path, say: Say, resumed: Resumed | None) -> Trained:
    with needs("train", "training"):
        import accelerate
        import matplotlib  # noqa: F401
        import peft  # noqa: F401
        import torch
        import transformers
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    first = is_first()
    if resumed is None:
        check_output(recipe.output_dir)
    rows = read_data(recipe)
    config = load.read_config(base, recipe)
    stored = codes.stored_method(base, config)
    codes.check_recipe(stored, recipe, base)
    tokenizer = load.read_tokenizer(base, recipe)
    data = _encode(recipe, tokenizer, load.longest(config, recipe), *rows)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    schedule = make_schedule(recipe, len(data.train), processes)
    dtype = load.dtype_name(config, recipe)
    # DeepSpeed and FSDP have to know their settings before the model is loaded.
    draft = training_arguments(recipe, Path(recipe.output_dir), schedule, dtype, bool(data.evaluate), processes)
    transformers.set_seed(recipe.seed)
    model = load.load_model(base, config, recipe, stored)
    if recipe.packing:
        check_packing(model, data.train)
    model, targets = _prepare(model, recipe, schedule)
    initial = converting.pairs(model) if recipe.shifts_base else None
    record = _base_record(recipe, base, model, resumed, first, initial)
    args = _args(recipe, base, model, targets, schedule, data, processes) | {"dtype": dtype}
    if first:
        for line in (*_summary(args, data, schedule), *targets.notes):
            say(line)
    if resumed is not None:
        _check_same(resumed[1], args, resumed[0])
    run = _run_folder(recipe, resumed, first, accelerate)
    if first:
        records.write_json(run / ARGS, args)
    draft.output_dir = str(run)
    log = records.Log(run, _step(resumed[0]) if resumed else 0) if first else None
    stop = Stop()
    papers = Papers(base, tokenizer.chat_template if recipe.chat_template else None, args, record, initial)
    blocks = Blocks(data.train, data.evaluate, load.pad_id(tokenizer))
    trainer = new_trainer(recipe, draft, model, blocks, papers, log, stop, say)
    torch.manual_seed(recipe.seed)
    with stop.listening():
        trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
    return _finish(trainer, run, log, args, schedule)


def _encode(recipe: Recipe, tokenizer: Any, max_length: int, train: Sequence[Row], held_out: Sequence[Row]) -> _Data:
    encoder = Encoder(tokenizer, max_length, recipe.truncation_strategy, recipe.system)
    examples, counts = encoder.encode(train)
    evaluate, held_out_counts = encoder.encode(held_out, "held-out rows") if held_out else ([], Counts())
    blocks = pack(examples, max_length) if recipe.packing else [[e] for e in examples]
    return _Data(blocks, [[e] for e in evaluate], counts, held_out_counts, data_digest(examples))


def _prepare(model: Any, recipe: Recipe, schedule: Schedule) -> tuple[Any, Targets]:
    """The model with what is to be trained, and what that is."""
    if recipe.train_type == FULL:
        targets = free_weights(model, recipe)
    else:
        targets = find_targets(model, recipe)
        model = add_tuner(model, recipe, targets, schedule.steps)
        targets = replace(targets, notes=(*targets.notes, *changed_blocks(model, recipe)))
        if recipe.gradient_checkpointing:
            model.enable_input_require_grads()  # else no gradient reaches the layers of a frozen base
    return model, targets


def _base_record(
    recipe: Recipe,
    base: Path,
    model: Any,
    resumed: Resumed | None,
    first: bool,
    initial: Mapping[str, Any] | None,
) -> Callable[[Path], Fingerprint] | None:
    """How to get the record of the base. It is taken before training, from a plan for the untrained adapter."""
    if recipe.train_type == FULL:
        return None
    model.peft_config["default"].base_model_name_or_path = recipe.model
    if not first:
        return lambda _: {}
    if _is_sharded(model):  # parts of tensors have no shapes to plan with; a checkpoint has
        return lambda checkpoint: records.fingerprint(base, checkpoint)
    with tempfile.TemporaryDirectory(prefix="inlay-") as folder:
        model.save_pretrained(folder)
        if initial is not None:
            converting.convert_checkpoint(Path(folder), initial)
        record = records.fingerprint(base, Path(folder))
    if resumed is not None:
        _check_base(resumed[0], record)
    return lambda _: record


def _is_sharded(model: Any) -> bool:
    return any(hasattr(p, "ds_id") for p in model.parameters())


def _check_base(checkpoint: Path, record: Fingerprint) -> None:
    """Raises InputError for a base that is not the one the run began with."""
    recorded = read_json_object(checkpoint / FINGERPRINT, InputError)
    if recorded.get("headers") != record["headers"] or recorded.get("tensors") != record["tensors"]:
        raise InputError(
            f"{checkpoint}: was trained on another base than the one that is given; give its own with --model"
        )


def _args(
    recipe: Recipe, base: Path, model: Any, targets: Targets, schedule: Schedule, data: _Data, processes: int
) -> dict[str, Any]:
    """What `args.json` holds."""
    trainable = sum(_size(p) for p in model.parameters() if p.requires_grad)
    total = sum(_size(p) for p in model.parameters())
    return {
        **recipe.to_json(),
        "gradient_accumulation_steps": schedule.accumulation,
        "learning_rate": recipe.rate,
        "base_path": str(base),
        "processes": processes,
        "sharding": sharding(recipe),
        "resolved_targets": list(targets.listed),
        "resolved_modules": list(targets.modules),
        "resolved_parameters": list(targets.parameters),
        "resolved_modules_to_save": list(targets.saved),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total,
        "steps": schedule.steps,
        "rows": data.counts.rows,
        "tokens": data.counts.tokens,
        "learned_tokens": data.counts.learned,
        "data": data.digest,
        "versions": records.versions(),
    }


def _size(p: Any) -> int:
    """Elements of a parameter, whole where it is sharded, unpacked where it is in codes of 4 bits."""
    count = int(getattr(p, "ds_numel", None) or p.numel())
    return count * 2 if type(p).__name__ == "Params4bit" else count


def _summary(args: Mapping[str, Any], data: _Data, schedule: Schedule) -> list[str]:
    counts = data.counts
    lines = [
        f"{counts.rows} rows, {counts.tokens} tokens, of which {counts.learned} are learned; the longest has "
        f"{counts.longest}",
        f"training {args['trainable_parameters']:,} of {args['total_parameters']:,} parameters "
        f"({args['trainable_share']:.2%}) in {schedule.steps} steps",
    ]
    lines += [*_left_out(counts, "rows"), *_left_out(data.held_out, "held-out rows")]
    if args["init_weights"].startswith(("pissa", "olora")) and args["dtype"] != "float32":
        what = "the base without the pairs is rounded while it is trained, and the merge goes onto the one that is not"
        lines.append(f"warning: {args['init_weights']} in {args['dtype']}: {what}; --torch_dtype float32 is exact")
    targets, modules = args["resolved_targets"], args["resolved_modules"]
    if targets or args["resolved_parameters"]:
        what = f"{len(modules)} modules: " if modules else ""
        lines.append(f"targets: {what}{', '.join([*targets, *args['resolved_parameters']])}")
    if args["resolved_modules_to_save"]:
        lines.append(f"trained whole: {', '.join(args['resolved_modules_to_save'])}")
    return lines


def _left_out(counts: Counts, what: str) -> list[str]:
    """What is said of rows that are not learned, or not as they are."""
    found = (
        (counts.too_long, f"{what} are longer than --max_length and are left out"),
        (counts.cut, f"{what} are longer than --max_length and are cut"),
        (counts.unanswered, f"{what} have no answer that the chat template shows, or none is left, and are left out"),
        (
            counts.unlearned_turns,
            f"answers in {what} are read and not learned: the chat template does not begin them as it asks for them, "
            "or nothing stands before them",
        ),
    )
    lines = [f"warning: {count} {words}" for count, words in found if count]
    if counts.split:
        lines.append(
            f"{counts.split} answers in {what} are rows of their own, with what stands before them: the chat template "
            "writes them otherwise once more turns follow"
        )
    return lines


# Of what was resolved and counted, all that decides the steps to come.
_SAME = (
    "steps",
    "rows",
    "tokens",
    "data",
    "processes",
    "sharding",
    "resolved_modules",
    "resolved_parameters",
    "resolved_modules_to_save",
)


def _check_same(recorded: Mapping[str, Any], args: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises InputError for a checkpoint of a run that this one does not go on with."""
    changed = [name for name in _SAME if recorded.get(name) != args[name]]
    if changed:
        short = ", ".join(f"{n} ({recorded.get(n)!s:.40} then, {args[n]!s:.40} now)" for n in changed)
        raise InputError(f"{checkpoint}: belongs to another run: {short}; give the same data, or start a new run")


def _run_folder(recipe: Recipe, resumed: Resumed | None, first: bool, accelerate: Any) -> Path:
    """The folder of the run, made by the first process and known to all."""
    if resumed is not None:
        return resumed[0].parent
    made = [str(records.new_run_folder(recipe.output_dir, recipe.add_version).resolve())] if first else [""]
    return Path(accelerate.utils.broadcast_object_list(made)[0])


def _step(checkpoint: Path) -> int:
    return int(read_json_object(checkpoint / records.STATE, InputError)["global_step"])


def _finish(trainer: Any, run: Path, log: records.Log | None, args: Mapping[str, Any], schedule: Schedule) -> Trained:
    state = trainer.state
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    if log is not None:
        with needs("train", "the curves of a run"):
            records.draw_curves(run, log.lines())
    checkpoint = run / f"checkpoint-{state.global_step}"
    interrupted = state.global_step < schedule.steps
    return Trained(run, checkpoint, state.global_step, losses[-1] if losses else None, interrupted, args)
