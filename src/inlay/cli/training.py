"""The options of `inlay sft`, as users of ms-swift type them. Light to import.

What is not given is not in the namespace: defaults stand in `inlay.train.recipe`, and a run that is resumed takes the
rest from its own arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from inlay.cli.options import Items, add_printing, boolean

TRAIN_TYPES = ("lora", "adalora", "dora", "loha", "lokr", "ia3", "oft", "vera", "full")
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip


class _Options:
    """A group whose options leave nothing behind when they are not given."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def one(
        self, *names: str, help: str, type: Callable[[str], Any] = str, metavar: str | None = None, **more: Any
    ) -> None:
        if metavar is None and "choices" not in more:
            metavar = "N" if type is int else "X" if type is float else "TEXT"
        self.group.add_argument(*names, type=type, default=argparse.SUPPRESS, help=help, metavar=metavar, **more)

    def many(self, *names: str, help: str, metavar: str) -> None:
        self.group.add_argument(*names, nargs="+", action=_Given, default=argparse.SUPPRESS, help=help, metavar=metavar)

    def flag(self, *names: str, help: str) -> None:
        self.group.add_argument(
            *names, nargs="?", const=True, default=argparse.SUPPRESS, type=boolean, metavar="true|false", help=help
        )


class _Given(Items):
    """A list that is not there until it is given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not hasattr(namespace, self.dest):
            setattr(namespace, self.dest, [])
        super().__call__(parser, namespace, values, option_string)


def sft(parser: argparse.ArgumentParser) -> None:
    _data(parser)
    _method(parser)
    _loop(parser)
    _kept(parser)
    add_printing(parser)


def _data(parser: argparse.ArgumentParser) -> None:
    o = _Options(parser, "base and data")
    o.one("--model", "--model_id_or_path", metavar="BASE", help="directory or Hub id of the base")
    o.many(
        "--dataset", metavar="DATA",
        help="files (.jsonl, .json, .csv, .parquet), folders, Hub ids, or self-cognition; A#500 takes 500 rows of A",
    )  # fmt: skip
    o.many("--val_dataset", metavar="DATA", help="rows to evaluate with")
    o.one("--split_dataset_ratio", type=float, help="or this share of the rows, held out (0)")
    o.one("--max_length", type=int, help="tokens in a row at most (what the base reads, at most 2048)")
    o.one(
        "--truncation_strategy",
        choices=("delete", "right", "left", "raise"),
        help="longer rows: left out (delete) or cut",
    )
    o.flag("--packing", help="several rows side by side in one, kept apart by their positions")
    o.one("--system", help="a system message for conversations without one")
    o.one("--chat_template", metavar="FILE", help="a Jinja template, for a base that has none, or instead of its own")
    o.many("--model_name", metavar="NAME", help="self-cognition: the model's name, or a Chinese and an English one")
    o.many("--model_author", metavar="NAME", help="self-cognition: who developed it, likewise")
    o.one("--revision", "--model_revision", help="revision of a base from the Hub", metavar="REV")
    o.flag("--use_modelscope", help="take the base from ModelScope instead of the Hugging Face Hub")
    o.flag("--trust_remote_code", help="run Python code that comes with the base (false)")


def _method(parser: argparse.ArgumentParser) -> None:
    o = _Options(parser, "what is trained")
    o.one("--train_type", "--tuner_type", "--sft_type", choices=TRAIN_TYPES, help="the method (lora)", metavar="METHOD")
    o.many(
        "--target_modules", metavar="NAME",
        help="all-linear (default), attention, mlp, all-embedding, or names of modules or the ends of them",
    )  # fmt: skip
    o.one("--target_regex", help="a pattern for whole names of modules, instead", metavar="REGEX")
    o.many("--target_parameters", metavar="NAME", help="bare parameters, such as the experts of a layer")
    o.many("--exclude_modules", metavar="NAME", help="of these, not those")
    o.many("--modules_to_save", metavar="NAME", help="trained and saved whole; also all-embedding, all-norm")
    o.one("--lora_rank", type=int, help="rank (8)")
    o.one("--lora_alpha", type=float, help="alpha; scaling is alpha / rank (32)")
    o.one("--lora_dropout", type=float, help="dropout before lora_A (0.05)")
    o.one("--lora_bias", choices=("none", "all"), help="biases that are trained too (none)")
    o.one("--lora_dtype", choices=("float32", "bfloat16", "float16"), help="type of the adapter's weights (float32)")
    o.flag("--use_rslora", help="scaling is alpha / √rank")
    o.flag("--use_dora", help="DoRA: magnitude and direction apart")
    o.one(
        "--init_weights", type=str.lower, metavar="HOW",
        help="true, false, gaussian, orthogonal, olora, pissa, pissa_niter_N (true)",
    )  # fmt: skip
    o.flag("--freeze_llm", help="vision-language models: leave the language part as it is (false)")
    o.flag("--freeze_vit", help="… the vision part (true)")
    o.flag("--freeze_aligner", help="… what stands between (true)")
    o.one("--adalora_init_r", type=int, help="AdaLoRA: rank at the start (12)")
    o.one("--adalora_target_r", type=int, help="AdaLoRA: mean rank at the end (8)")
    o.one("--oft_block_size", type=int, help="OFT: size of a block (32)")
    o.one("--vera_rank", type=int, help="VeRA: rank (256)")
    o.one("--torch_dtype", "--dtype", choices=("float32", "bfloat16", "float16"), help="type to train in (the base's)")
    o.one("--quant_method", metavar="bnb", help="QLoRA: quantise the base while it is loaded")
    o.one("--quant_bits", type=int, help="bits of a code, 4 or 8")
    o.one("--bnb_4bit_quant_type", choices=("nf4", "fp4"), help="codes of 4 bits (nf4)")
    o.flag("--bnb_4bit_use_double_quant", help="quantise the scales too (true)")


def _loop(parser: argparse.ArgumentParser) -> None:
    o = _Options(parser, "the loop")
    o.one("--num_train_epochs", type=float, help="passes over the data (3)")
    o.one("--max_steps", type=int, help="steps, instead of passes")
    o.one("--per_device_train_batch_size", type=int, help="rows at once on a device (1)")
    o.one("--per_device_eval_batch_size", type=int, help="… in evaluation (1)")
    o.one("--gradient_accumulation_steps", type=int, help="batches in a step (as many as make 16 rows)")
    o.one("--learning_rate", type=float, help="peak learning rate (1e-4; full: 1e-5)")
    o.one("--lr_scheduler_type", choices=SCHEDULES, help="how the rate falls (cosine)", metavar="NAME")
    o.one("--warmup_ratio", type=float, help="share of the steps in which the rate rises (0.05)")
    o.one("--weight_decay", type=float, help="weight decay (0.1)")
    o.one("--adam_beta2", type=float, help="second beta of Adam (0.95)")
    o.one("--max_grad_norm", type=float, help="longest gradient (1); 0 for any length")
    o.flag("--gradient_checkpointing", help="compute activations twice instead of keeping them (true)")
    o.one("--seed", type=int, help="decides the start, the order and dropout (42)")
    o.one("--data_seed", type=int, help="decides samples, the split and the order instead (seed)")
    o.one("--dataloader_num_workers", type=int, help="processes that make batches (0)")
    o.one("--deepspeed", metavar="FILE", help="a DeepSpeed config")
    o.group.add_argument(
        "--fsdp", nargs="?", const="true", default=argparse.SUPPRESS, metavar="WORDS",
        help="divide the model among GPUs; also in transformers' former words: full_shard offload …",
    )  # fmt: skip
    o.one("--fsdp_config", metavar="FILE", help="its settings, as JSON")


def _kept(parser: argparse.ArgumentParser) -> None:
    o = _Options(parser, "what is kept")
    o.one("--output_dir", metavar="DIR", help="runs go into folders below it (output)")
    o.flag("--add_version", help="a folder vN-date-time for each run (true)")
    o.one("--save_steps", type=int, help="a checkpoint every so many steps, and one at the end (500)")
    o.one("--save_total_limit", type=int, help="checkpoints to keep, beside the best")
    o.one("--eval_steps", type=int, help="evaluate every so many steps (save_steps)")
    o.one("--logging_steps", type=int, help="log every so many steps (5)")
    o.many("--report_to", metavar="NAME", help="tensorboard, wandb … as well")
    o.one(
        "--resume_from_checkpoint", metavar="DIR",
        help="go on with the run of this checkpoint; what is not given is as it was",
    )  # fmt: skip
