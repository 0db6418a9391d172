"""`inlay compare`: does what was merged behave like base + adapters?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from inlay.cli import inference
from inlay.cli.text import plural
from inlay.errors import InputError, OutputError
from inlay.infer.behaviour import compare, read_rows
from inlay.infer.distance import Distance
from inlay.infer.verdict import Behaviour, PromptResult

WIDTH = 60  # of a prompt or text in the table


def run(args: argparse.Namespace) -> int:
    found = measure(args, Path(args.merged) if args.merged else None)
    print(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if args.json else describe(found))
    return 0 if found.ok else 1


def measure(args: argparse.Namespace, merged: Path | None) -> Behaviour:
    """The check that the options ask for; its figures go to `--result_path` too."""
    if merged is not None and not merged.is_dir():
        raise InputError(f"{merged}: no such directory")
    if args.result_path and not Path(args.result_path).absolute().parent.is_dir():
        raise OutputError(f"{args.result_path}: cannot be written: there is no such folder")
    found = compare(
        inference.source(args),
        merged=merged,
        prompts=read_rows(Path(args.prompts) if args.prompts else None),
        new_tokens=args.new_tokens,
        draws=args.draws,
        use_template=args.use_chat_template,
        say=(lambda _: None) if args.quiet else lambda text: print(f"running {text}", file=sys.stderr),
    )
    if args.result_path:
        _write(Path(args.result_path), found)
    return found


def _write(path: Path, found: Behaviour) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def describe(found: Behaviour) -> str:
    """The figures for people: a block a prompt, then the verdict."""
    parts = [_prompt(result) for result in found.prompts]
    most = found.tolerance
    header = f"{'':<34}{'largest':>10}{'rms':>10}{'KL (nats)':>12}{'top-1':>9}"
    rows = [
        ("base against base + adapters", found.base),
        (f"{found.what}", found.merged),
        (f"rounded in {plural(len(found.draws), 'other way')}, × 2", most),
    ]
    where = f"over {plural(found.merged.positions, 'position')} of {plural(len(found.prompts), 'prompt')}:"
    parts.append("\n".join([f"logits against base + adapters, {where}", header, *(_row(*row) for row in rows)]))
    parts.append("\n".join([*found.reasons, "passed" if found.ok else "FAILED"]))
    return "\n\n".join(parts)


def _row(name: str, d: Distance) -> str:
    return f"{_short(name, 33):<34}{d.largest:>10.3g}{d.rms:>10.3g}{d.kl:>12.3g}{d.agreement:>9.1%}"


def _prompt(result: PromptResult) -> str:
    same = "the same" if result.text_merged == result.text_adapters else _short(result.text_merged)
    d = result.merged
    return "\n".join([
        f"{result.where}  {_short(result.prompt)}",
        f"  base             {_short(result.text_base)}",
        f"  base + adapters  {_short(result.text_adapters)}",
        f"  merged           {same}  (logits {d.largest:.3g}, KL {d.kl:.3g}, top-1 {d.agreement:.1%})",
    ])  # fmt: skip


def _short(text: str, width: int = WIDTH) -> str:
    shown = json.dumps(text, ensure_ascii=False)[1:-1]
    return shown if len(shown) <= width else shown[: width - 1] + "…"
