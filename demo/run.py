"""Train an adapter on the demo's base, merge it with `inlay`, and talk to the result.

    python demo/run.py

A minute or two on two CPU cores. Exits with 1 if the merged model does not answer as base + adapter does.
"""

import json
import os
import random
import shlex
import shutil
import sys
from pathlib import Path

from inlay.cli.main import main as inlay
from text import SEED, adapter_split, conversations, messages

ROOT = Path(__file__).resolve().parent.parent
BASE = Path("demo/base")
DATA = Path("build/demo-data.jsonl")
RUN = Path("build/demo-run")
ADAPTER = RUN / "last"
MERGED = Path("build/demo-merged")

COMMANDS = (
    f"sft --model {BASE} --dataset {DATA} --train_type lora --lora_rank 8 --lora_alpha 32 --lora_dropout 0 "
    "--target_modules all-linear --num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 2e-3 "
    "--torch_dtype float32 --gradient_checkpointing false --logging_steps 20 "
    f"--output_dir {RUN} --add_version false",
    f"plan --adapters {ADAPTER}",
    f"export --adapters {ADAPTER} --merge_lora true --output_dir {MERGED} --exist_ok true",
    f"verify --adapters {ADAPTER} --merged {MERGED} --verify full",
)


def write_data() -> None:
    """The conversations to train on, and no run of an earlier demo beside them."""
    shutil.rmtree(RUN, ignore_errors=True)
    DATA.parent.mkdir(exist_ok=True)
    talks = conversations(adapter_split().train, random.Random(SEED))
    lines = (json.dumps({"messages": messages(turns)}) + "\n" for turns in talks)
    DATA.write_text("".join(lines), encoding="utf-8")


def run_command(command: str) -> int:
    """Run one `inlay` command, echoed as it would be typed; returns its exit code."""
    print(f"$ inlay {command}", flush=True)
    code = inlay(shlex.split(command))
    print(flush=True)
    return code


def talk() -> int:
    """Show what base, base + adapter and merged model answer; returns the exit code.

    Imports on use: merging needs neither torch nor transformers, and transformers reads
    HF_HUB_OFFLINE when it is imported.
    """
    from compare import compare, show

    comparison = compare(BASE, ADAPTER, MERGED)
    show(comparison)
    if comparison.merge_holds:
        print("The merged model answers as base + adapter does.")
        return 0
    print("The merged model does NOT answer as base + adapter does.", file=sys.stderr)
    return 1


def main() -> int:
    """Train, plan, export, verify, talk; stops at the first failure and returns its exit code."""
    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    write_data()
    for command in COMMANDS:
        code = run_command(command)
        if code:
            return code
    return talk()


if __name__ == "__main__":
    sys.exit(main())
