"""Merge the demo's adapter into its base with `inlay`, and talk to the result.

    python demo/run.py

Exits with 1 if the merged model does not answer as base + adapter does.
"""

import os
import shlex
import sys
from pathlib import Path

from inlay.cli.main import main as inlay

ROOT = Path(__file__).resolve().parent.parent
BASE = Path("demo/base")
ADAPTER = Path("demo/adapter")
MERGED = Path("build/demo-merged")

INPUTS = f"--model {BASE} --adapters {ADAPTER}"
COMMANDS = (
    f"plan {INPUTS}",
    f"export {INPUTS} --merge_lora true --output_dir {MERGED} --exist_ok true",
    f"verify {INPUTS} --merged {MERGED} --verify full",
)


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
    """Plan, export, verify, talk; stops at the first failure and returns its exit code."""
    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for command in COMMANDS:
        code = run_command(command)
        if code:
            return code
    return talk()


if __name__ == "__main__":
    sys.exit(main())
