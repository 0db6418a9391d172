"""`inlay infer`: ask base + adapters, in the terminal, once, or with a dataset."""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.cli import inference
from inlay.cli.text import plural
from inlay.datasets.row import Row
from inlay.digests import digest_json
from inlay.errors import InputError
from inlay.infer import batch
from inlay.infer.backend import CAUSAL, Backend, Reply, Request, Sampling, Source, open_backend
from inlay.infer.chat import Conversation, pieces, prompt_tokens

SEED = 42  # of --val_dataset_sample, where --seed is not given


def run(args: argparse.Namespace) -> int:
    sampling = inference.sampling(args)
    _check_request(args)
    source = inference.source(args)
    path = _result_path(args)
    rows = batch.read_prompts([Path(f) for f in args.val_dataset], _warn(args)) if args.val_dataset else []
    backend = open_backend(args.infer_backend, source)
    try:
        if not args.quiet:
            for note in backend.notes:
                print(f"note: {note}", file=sys.stderr)
        if rows:
            assert path is not None
            return _dataset(args, backend, source, sampling, rows, path)
        if args.prompt is not None:
            return _once(args, backend, sampling)
        with_template = args.use_chat_template is not False
        Conversation(
            backend, sampling, _Terminal(), system=args.system, use_template=with_template, stream=args.stream
        ).run()
        return 0
    finally:
        backend.close()


def _check_request(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.val_dataset:
        raise InputError("--prompt and --val_dataset: give one of them")
    if args.max_batch_size < 1:
        raise InputError(f"--max_batch_size must be positive, not {args.max_batch_size}")
    if args.val_dataset_sample is not None and args.val_dataset_sample < 1:
        raise InputError(f"--val_dataset_sample must be positive, not {args.val_dataset_sample}")
    if args.task_type != CAUSAL and args.prompt is None and not args.val_dataset:
        raise InputError(f"--task_type {args.task_type} makes no conversation; give --prompt or --val_dataset")
    for name in ("result_path", "val_dataset_sample"):
        if getattr(args, name) is not None and not args.val_dataset:
            raise InputError(f"--{name} belongs to --val_dataset, which is not given")


def _result_path(args: argparse.Namespace) -> Path | None:
    """Where the results of a dataset go. Raises OutputError before anything is loaded."""
    if not args.val_dataset:
        return None
    path = Path(args.result_path or f"{Path(args.val_dataset[0]).stem}-result.jsonl")
    batch.check_result(path)
    return path


def _warn(args: argparse.Namespace) -> batch.Warn | None:
    return None if args.strict else lambda text: print(f"warning: {text}", file=sys.stderr)


def _uses_template(args: argparse.Namespace) -> bool:
    """Text goes through the chat template unless it is said otherwise; what is embedded or classified does not."""
    return args.task_type == CAUSAL if args.use_chat_template is None else bool(args.use_chat_template)


def _once(args: argparse.Namespace, backend: Backend, sampling: Sampling) -> int:
    closed = args.task_type != CAUSAL
    tokens = prompt_tokens(backend.tokenizer, args.prompt, args.system, _uses_template(args), closed=closed)
    if closed:
        print(json.dumps(backend.vectors([tokens])[0]))
        return 0
    replies: list[Reply] = []
    stream = args.stream and sampling.num_beams == 1  # beams decide on the text at its end
    for piece in pieces(backend, Request(tokens, sampling), stream, replies.append):
        if not args.json:
            print(piece, end="", flush=True)
    print(json.dumps(asdict(replies[0]), ensure_ascii=False) if args.json else "")
    return 0


def _dataset(
    args: argparse.Namespace, backend: Backend, source: Source, sampling: Sampling, rows: list[Row], path: Path
) -> int:
    from tqdm import tqdm

    if args.val_dataset_sample is not None and args.val_dataset_sample < len(rows):
        seed = SEED if sampling.seed is None else sampling.seed
        rows = random.Random(seed).sample(rows, args.val_dataset_sample)
    asked = batch.make_requests(
        backend, rows, sampling, identity=_identity(args, source), system=args.system,
        use_template=_uses_template(args), task=args.task_type, warn=_warn(args),
    )  # fmt: skip
    with tqdm(
        total=len(asked), desc="rows", unit="row", file=sys.stderr, disable=args.quiet or not sys.stderr.isatty()
    ) as bar:
        made = batch.run(backend, asked, path, task=args.task_type, batch_size=args.max_batch_size, progress=bar.update)
    facts = {"result_path": str(path), "rows": len(asked), "made": made, "left_out": len(rows) - len(asked)}
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    elif not args.quiet:
        print(f"{plural(made, 'row')} answered, {len(asked) - made} were there already: {path}")
    return 0


def _identity(args: argparse.Namespace, source: Source) -> str:
    """Digest of what answers: another base, other adapters or another way to merge them give other results.

    A base is told by its place, and its files by size and time: reading all of it for each run would cost more.
    """
    settings = [source.merge, source.torch_dtype, source.weights, source.combine_by, args.infer_backend, args.task_type]
    given = [source.options.given(), source.quant.given()]
    files = [p for p in sorted(source.model.resolve().iterdir()) if p.is_file()]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files if _answers(p)]
    base = [str(source.model.resolve()), open_checkpoint(source.model).fingerprint, stats]
    return digest_json([*base, [a.digest for a in source.adapters], settings, given])


def _answers(file: Path) -> bool:
    """Whether answers depend on a file of the base, beside those that make tokens of a prompt, which are told apart."""
    return file.suffix in (".safetensors", ".bin", ".py") or file.name in ("config.json", "generation_config.json")


class _Terminal:
    """Standard input and output."""

    def __init__(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  # edits lines and keeps a history, once it is imported

    def read(self, prompt: str) -> str:
        return input(prompt if sys.stdin.isatty() else "")

    def say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, flush=True)
