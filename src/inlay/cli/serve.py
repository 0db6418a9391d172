"""`inlay serve`: an OpenAI-compatible endpoint over base + adapters."""

from __future__ import annotations

import argparse
import os

from inlay.cli import inference
from inlay.errors import InputError
from inlay.infer.backend import CAUSAL, Serving, serve_backend
from inlay.plan.request import parse_size


def run(args: argparse.Namespace) -> int:
    if args.task_type != CAUSAL:
        raise InputError(f"--task_type {args.task_type} is not served; inlay infer --val_dataset writes its vectors")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port must be from 0 to 65535, not {args.port}")
    if args.max_waiting < 1:
        raise InputError(f"--max_waiting must be positive, not {args.max_waiting}")
    source = inference.source(args)
    name = args.served_model_name or (source.adapters[-1].name if source.adapters else source.model.resolve().name)
    serving = Serving(
        host=args.host,
        port=args.port,
        api_key=args.api_key or os.environ.get("INLAY_API_KEY") or None,
        name=name,
        max_body_bytes=parse_size(args.max_body_size),
        max_waiting=args.max_waiting,
        system=args.system,
    )
    return serve_backend(args.infer_backend, source, serving)
