"""The recipe of a training: every argument with its default, checked before anything is loaded.

Names and defaults are those of ms-swift's `swift sft`. A recipe is plain data: `args.json` holds it, and a run that is
resumed takes what is not given again from there.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.errors import InputError

LORA, DORA, ADALORA, LOHA, LOKR, IA3, OFT, VERA, FULL = (
    "lora", "dora", "adalora", "loha", "lokr", "ia3", "oft", "vera", "full",
)  # fmt: skip
TRAIN_TYPES = (LORA, ADALORA, DORA, LOHA, LOKR, IA3, OFT, VERA, FULL)
ON_CODES = (LORA, DORA, ADALORA, IA3, OFT, VERA)  # methods that have layers for a quantised base
INIT_WEIGHTS = ("true", "false", "gaussian", "pissa", "olora", "orthogonal")
PISSA_NITER = "pissa_niter_"  # and a number of iterations
TRUNCATION = ("delete", "right", "left", "raise")
DTYPES = ("float32", "bfloat16", "float16")
ALL_LINEAR = ("all-linear",)
TOTAL_BATCH = 16  # rows in a step, if --gradient_accumulation_steps is not given

# What has a meaning for some methods only.
_ONLY: dict[str, tuple[str, ...]] = {
    "lora_rank": (LORA, DORA, LOHA, LOKR),
    "lora_alpha": (LORA, DORA, ADALORA, LOHA, LOKR),
    "lora_dropout": (LORA, DORA, ADALORA),
    "lora_bias": (LORA, DORA, ADALORA, OFT, VERA),
    "use_rslora": (LORA, DORA),
    "use_dora": (LORA, DORA),
    "init_weights": (LORA, DORA),
    "target_parameters": (LORA,),
    "adalora_init_r": (ADALORA,),
    "adalora_target_r": (ADALORA,),
    "oft_block_size": (OFT,),
    "vera_rank": (VERA,),
}
_NOT_FULL = ("target_modules", "target_regex", "exclude_modules", "modules_to_save", "lora_dtype", "quant_method")
_POSITIVE = (
    "lora_rank", "lora_alpha", "adalora_init_r", "adalora_target_r", "oft_block_size", "vera_rank",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate",
    "num_train_epochs", "max_length", "save_steps", "eval_steps", "save_total_limit", "logging_steps",
)  # fmt: skip
_SHARES = ("lora_dropout", "warmup_ratio", "split_dataset_ratio", "adam_beta2")
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "dataloader_num_workers")
_SEEDS = ("seed", "data_seed")  # of 32 bits, as numpy takes them
_PATHS = ("dataset", "val_dataset", "chat_template", "deepspeed", "fsdp_config")
# What may be another one when a run goes on: nothing of it changes the steps that are still to come; of data and base,
# what they lead to is compared with what the run began with.
FREE_ON_RESUME = frozenset(
    {
        "resume_from_checkpoint", "save_steps", "save_total_limit", "eval_steps", "logging_steps", "report_to",
        "per_device_eval_batch_size", "dataset", "val_dataset", "chat_template", "gradient_checkpointing", "deepspeed",
        "fsdp", "fsdp_config", "model", "revision", "use_modelscope", "dataloader_num_workers", "trust_remote_code",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All that decides a training. None leaves a choice to the model or to the rest of the recipe."""

    model: str | None = None
    dataset: tuple[str, ...] = ()
    val_dataset: tuple[str, ...] = ()
    revision: str | None = None
    use_modelscope: bool = False
    trust_remote_code: bool = False
    # what is trained
    train_type: str = LORA
    lora_rank: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    lora_dtype: str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_weights: str = "true"
    target_modules: tuple[str, ...] = ALL_LINEAR
    target_regex: str | None = None
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    freeze_llm: bool = False
    freeze_vit: bool = True
    freeze_aligner: bool = True
    adalora_init_r: int = 12
    adalora_target_r: int = 8
    oft_block_size: int = 32
    vera_rank: int = 256
    # how the base is loaded
    torch_dtype: str | None = None
    quant_method: str | None = None
    quant_bits: int | None = None
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    # data
    max_length: int | None = None
    truncation_strategy: str = "delete"
    packing: bool = False
    split_dataset_ratio: float = 0.0
    chat_template: str | None = None
    system: str | None = None
    model_name: tuple[str, ...] = ()
    model_author: tuple[str, ...] = ()
    # the loop
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    gradient_accumulation_steps: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    seed: int = 42
    data_seed: int | None = None
    dataloader_num_workers: int = 0
    # what is kept
    output_dir: str = "output"
    add_version: bool = True
    save_steps: int = 500
    eval_steps: int | None = None
    save_total_limit: int | None = None
    logging_steps: int = 5
    report_to: tuple[str, ...] = ()
    resume_from_checkpoint: str | None = None
    # several devices, as transformers takes them
    deepspeed: str | None = None
    fsdp: str | None = None
    fsdp_config: str | None = None

    @property
    def method(self) -> str:
        """The method of PEFT; DoRA is an option of LoRA."""
        return LORA if self.train_type == DORA else self.train_type

    @property
    def dora(self) -> bool:
        return self.use_dora or self.train_type == DORA

    @property
    def shifts_base(self) -> bool:
        """Whether the start takes a part of the base away, which the pair holds instead."""
        return self.method == LORA and self.init_weights.startswith(("pissa", "olora"))

    @property
    def rate(self) -> float:
        return self.learning_rate or (1e-5 if self.train_type == FULL else 1e-4)

    @property
    def sampling_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def frozen(self) -> frozenset[str]:
        """Parts of a model of several modes that are not trained."""
        parts = {"text": self.freeze_llm, "vision": self.freeze_vit, "aligner": self.freeze_aligner}
        return frozenset(part for part, frozen in parts.items() if frozen)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


NAMES = tuple(field.name for field in dataclasses.fields(Recipe))


def make_recipe(given: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of what is given; for a run that goes on, over what its `args.json` records.

    Raises InputError that names all problems at once.
    """
    values = {**_known(recorded or {}), **given}
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    fields |= {name: _absolute(fields[name]) for name in _PATHS if fields.get(name)}
    recipe = Recipe(**fields)
    problems = [*_contradictions(given, recorded), *_check(recipe, given)]
    if problems:
        raise InputError(
            "\n".join([f"cannot train ({len(problems)} problem{'s' if len(problems) > 1 else ''})", *problems])
        )
    return recipe


def _absolute(value: Any) -> Any:
    """A path, or a tuple of datasets, that is found from any folder; names that are no path here stay."""
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    here = os.path.exists(value) or os.path.exists(value.rpartition("#")[0])  # data.jsonl#500
    return os.path.abspath(value) if here else value


def _known(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {name: recorded[name] for name in NAMES if name in recorded}


def _contradictions(given: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> list[str]:
    """What is given and would make another run of the recorded one."""
    if recorded is None:
        return []
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    changed = [n for n, v in plain.items() if n not in FREE_ON_RESUME and n in recorded and recorded[n] != v]
    return [
        f"  --{name} {plain[name]}: the run that is resumed has {recorded[name]}; leave it out, or start a new run"
        for name in changed
    ]


def _check(recipe: Recipe, given: Mapping[str, Any]) -> list[str]:
    values = recipe.to_json()
    problems = [
        f"  --{n} {values[n]}: must be positive" for n in _POSITIVE if values[n] is not None and not values[n] > 0
    ]
    problems += [f"  --{n} {values[n]}: must be at least 0 and below 1" for n in _SHARES if not 0 <= values[n] < 1]
    problems += [f"  --{n} {values[n]}: must not be negative" for n in _NOT_NEGATIVE if not values[n] >= 0]
    problems += [f"  --{n} {v}: must be a number" for n, v in values.items() if v in (math.inf, -math.inf)]
    problems += [
        f"  --{n} {values[n]}: must be at least 0 and below 2^32"
        for n in _SEEDS
        if values[n] is not None and not 0 <= values[n] < 1 << 32
    ]
    problems += _check_method(recipe, given)
    problems += _check_dataset(recipe)
    if recipe.max_steps == 0 or recipe.max_steps < -1:
        problems.append(f"  --max_steps {recipe.max_steps}: must be positive, or -1 for whole epochs")
    for name in ("chat_template", "deepspeed", "fsdp_config"):
        if values[name] is not None and not Path(values[name]).is_file():
            problems.append(f"  --{name} {values[name]}: no such file")
    return problems


def _check_method(recipe: Recipe, given: Mapping[str, Any]) -> list[str]:
    kind, problems = recipe.train_type, []
    # What a run that is resumed records was checked when it began.
    problems += [
        f"  --{name}: has no meaning for {kind} (it belongs to {', '.join(methods)})"
        for name, methods in _ONLY.items()
        if name in given and kind not in methods and given[name] != getattr(Recipe(), name)
    ]
    if kind == FULL:
        problems += [f"  --{n}: has no meaning for full, which trains every weight" for n in _NOT_FULL if given.get(n)]
    if recipe.target_regex is not None and "target_modules" in given:
        problems.append("  --target_regex: stands instead of --target_modules; give one of them")
    init = recipe.init_weights
    if init not in INIT_WEIGHTS and not (init.startswith(PISSA_NITER) and init.removeprefix(PISSA_NITER).isdecimal()):
        problems.append(f"  --init_weights {init}: is none of {', '.join(INIT_WEIGHTS)}, {PISSA_NITER}N")
    if recipe.shifts_base and (recipe.dora or recipe.quant_method or recipe.lora_bias != "none"):
        problems.append(
            f"  --init_weights {init}: cannot be taken with DoRA, a quantised base or trained biases, whose result "
            "could not be converted for the original base"
        )
    if recipe.target_parameters and "lora_dropout" in given and recipe.lora_dropout:
        problems.append("  --lora_dropout: bare parameters take no dropout; leave it out with --target_parameters")
    if recipe.target_parameters and recipe.dora:
        problems.append("  --use_dora: bare parameters have no DoRA; leave it out with --target_parameters")
    if kind == ADALORA and recipe.adalora_target_r > recipe.adalora_init_r:
        problems.append(f"  --adalora_target_r {recipe.adalora_target_r}: is above --adalora_init_r")
    return problems + _check_quant(recipe)


def _check_quant(recipe: Recipe) -> list[str]:
    if recipe.quant_method is None:
        return ["  --quant_bits: give --quant_method bnb with it"] if recipe.quant_bits else []
    if recipe.quant_method != "bnb":
        what = "training quantises with bnb; a base that is stored in codes is loaded as it is"
        return [f"  --quant_method {recipe.quant_method}: {what}"]
    if recipe.quant_bits not in (4, 8):
        return [f"  --quant_bits {recipe.quant_bits}: bnb has 4 and 8"]
    if recipe.train_type not in ON_CODES:
        return [f"  --quant_method: {recipe.train_type} cannot be trained on a quantised base"]
    return []


def _check_dataset(recipe: Recipe) -> list[str]:
    problems = [] if recipe.dataset else ["  --dataset: give the data to train on"]
    if not recipe.model:
        problems.append("  --model: give the base to train on")
    if recipe.val_dataset and recipe.split_dataset_ratio:
        problems.append("  --split_dataset_ratio: there is a --val_dataset already; give one of them")
    return problems


def check_output(output_dir: str) -> None:
    """Raises InputError where no folder can be made. Nothing is written."""
    path = Path(output_dir).absolute()
    found = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not found.is_dir():
        raise InputError(f"--output_dir {output_dir}: {found} is not a folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {output_dir}: {found} cannot be written to")
