"""`inlay COMMAND …`: the table of commands, and what becomes of errors.

Exit codes: 0 done, 1 a check failed, 2 the request cannot be met, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from inlay import __version__
from inlay.cli import arguments, inference, options, training
from inlay.cli.options import EXAMPLES, Parser, spelled

# Objects made before Python looks for cycles. A plan of many experts is a million objects without any, and with
# the usual 700 a quarter of the time of planning goes into looking.
GARBAGE_AFTER = 10_000
COMMANDS = {
    "sft": "train an adapter, or the whole model, on conversations",
    "export": "merge adapters into a base, as an ordinary checkpoint",
    "plan": "show what export would do, and write nothing",
    "verify": "check whether a directory is base + adapters, whoever made it",
    "inspect": "say what is in a base, an adapter or a merged directory",
    "combine": "make one LoRA adapter of several, by the methods of PEFT",
    "infer": "ask base + adapters: in the terminal, once, or with a dataset",
    "serve": "an OpenAI-compatible endpoint over base + adapters",
    "compare": "check on prompts that merged behaves like base + adapters",
    "cache": "list or clear merged models that were made for engines",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        command, rest = _command(words)
        parser = Parser(prog=f"inlay {command}", description=COMMANDS[command], allow_abbrev=False)
        of_inference = inference.COMMANDS.get(command)
        apart = {"combine": options.add_combining, "sft": training.sft}
        (of_inference or apart.get(command) or getattr(arguments, command))(parser)
        args = parser.parse_args(inference.engine_words(spelled(rest)) if of_inference else spelled(rest))
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else 2
    return _run(command, args)


def _command(words: Sequence[str]) -> tuple[str, list[str]]:
    parser = Parser(
        prog="inlay", description="Merge LoRA adapters into checkpoints: streamed, exactly rounded, verified."
    )
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.epilog = "commands:\n" + "\n".join(f"  {n:<8} {what}" for n, what in COMMANDS.items()) + "\n\n" + EXAMPLES
    parser.add_argument("--version", action="version", version=f"inlay {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    if words and words[0].replace("-", "_") in COMMANDS:
        return words[0].replace("-", "_"), list(words[1:])
    parser.parse_args(words[:1])
    raise AssertionError("argparse accepts commands only")


def _run(command: str, args: Namespace) -> int:
    if not _runs_a_model(command, args):
        # One thread per matrix product: the threads of a merge each have a block of their own.
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    from inlay.errors import CheckFailed, InlayError

    try:
        code: int = import_module(f"inlay.cli.{command}").run(args)
        return code
    except CheckFailed as error:
        print(f"CheckFailed: {error}", file=sys.stderr)
        return 1
    except InlayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; a merge goes on from what is finished when it is started again" if command == "export" else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130


def _runs_a_model(command: str, args: Namespace) -> bool:
    """Whether PyTorch computes, which takes those variables for its own number of threads."""
    of_export = getattr(args, "quant_method", None) is not None  # calibration runs the model
    return command in inference.COMMANDS or command == "sft" or getattr(args, "behaviour", None) is True or of_export


def run() -> None:
    """Entry point of the installed command."""
    gc.set_threshold(GARBAGE_AFTER)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding has not
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away, as in `inlay plan --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # what a shell reports for a program that SIGPIPE ended
    sys.exit(code)
