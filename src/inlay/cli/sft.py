"""`inlay sft`: train an adapter."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from inlay.cli.sources import resolve
from inlay.errors import InlayError
from inlay.train.launch import adopt, group, is_first, launch, wait_for_the_end
from inlay.train.recipe import NAMES, Recipe, make_recipe
from inlay.train.records import read_checkpoint

INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    adopt(os.environ)
    wanted = group(os.environ)
    given = {name: value for name, value in vars(args).items() if name in NAMES}
    resumed = None
    try:
        if args_path := given.get("resume_from_checkpoint"):
            resumed = read_checkpoint(args_path)
        recipe = make_recipe(given, resumed[1] if resumed else None)
        if wanted is not None:
            return launch(["sft", *_as_words(vars(args))], wanted, os.environ)
        return _train(recipe, resumed, args)
    except Exception as error:
        wait_for_the_end(isinstance(error, InlayError))
        raise
    except KeyboardInterrupt:  # the second one
        if is_first():
            _say("interrupted at once; to go on: --resume_from_checkpoint with the last checkpoint of the run")
        return INTERRUPTED


def _train(recipe: Recipe, resumed: Any, args: argparse.Namespace) -> int:
    from dataclasses import replace

    from inlay.train.sft import run_sft

    assert recipe.model is not None
    base = resolve(recipe.model, recipe.revision, recipe.use_modelscope)
    if Path(recipe.model).exists():
        recipe = replace(recipe, model=str(Path(recipe.model).resolve()))  # found from any folder
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints what it compiles
        trained = run_sft(recipe, base, _silent if args.quiet or not is_first() else _say, resumed)
    if is_first():
        facts = {
            "run": str(trained.run),
            "checkpoint": str(trained.checkpoint),
            "steps": trained.steps,
            "loss": trained.loss,
            "interrupted": trained.interrupted,
        }
        if args.json:
            print(json.dumps(facts, indent=1, ensure_ascii=False))
        elif not args.quiet:
            print(trained.checkpoint)
            if trained.interrupted:
                _say(f"interrupted; to go on: inlay sft --resume_from_checkpoint {trained.checkpoint}")
    return INTERRUPTED if trained.interrupted else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    """With --quiet, and in all processes but the first."""


def _as_words(given: dict[str, Any]) -> list[str]:
    """The options as they would be typed."""
    words: list[str] = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
