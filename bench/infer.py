"""Base, live adapter and merged side by side in one run: loading, time to the first token, tokens per second.

    python bench/infer.py                          # 0.5 B, LoRA of rank 16 on all linear layers
    python bench/infer.py --sizes 0.5 1.5 --runs 5 --where /dev/shm
    python bench/infer.py --model BASE --adapter ADAPTER        # a model of your own, such as the demo's

Bases and adapters are those of `bench/merge.py`, bfloat16 and float32. Every candidate is a process of its own, and
they take turns. Its seconds begin when torch, transformers and peft are imported.

load          until the model can be called: planning, merging and PEFT included
first         from there to the first token of a reply to 32 tokens. transformers maps files into memory, so a base
              that was loaded alone is read here
tokens/s      of the tokens after it, greedy
peak          resident memory of the process, MB, mapped files included
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from merge import SHAPES, make_adapter, make_base

PROMPT = 32
CANDIDATES = {
    "base": "loaded alone by transformers",
    "live": "base + adapter through PEFT",
    "merged": "merged while loading",
    "exported": "exported, then loaded by transformers",
}


def child(candidate: str, base: Path, adapter: Path, out: Path, reply: int) -> dict[str, float]:
    """Load one candidate and let it answer; seconds and megabytes."""
    import peft  # noqa: F401
    import torch
    import transformers

    import inlay
    from inlay.adapters.adapter import read_adapter
    from inlay.infer.backend import Source
    from inlay.infer.live import with_adapters
    from inlay.infer.loading import load_model

    started = time.monotonic()
    plain = transformers.AutoModelForCausalLM
    if candidate == "base":
        model: Any = plain.from_pretrained(base)
    elif candidate == "live":
        source = Source(base, (read_adapter(adapter),))
        model = with_adapters(load_model(inlay.make_plan(base, []))[0], source).get_base_model()
    elif candidate == "merged":
        model = load_model(inlay.make_plan(base, [adapter]))[0]
    else:
        inlay.run_plan(inlay.make_plan(base, [adapter]), out)
        model = plain.from_pretrained(out)
    loaded = time.monotonic()
    model.eval()
    marks: list[float] = []

    class Clock:
        def put(self, _: Any) -> None:
            marks.append(time.monotonic())

        def end(self) -> None: ...

    ids = torch.arange(5, 5 + PROMPT)[None]
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=reply, min_new_tokens=reply,
            do_sample=False, pad_token_id=0, streamer=Clock(),
        )  # fmt: skip
    _, first, *rest = marks  # the prompt is put first
    return {
        "load": loaded - started,
        "first": first - loaded,
        "tokens/s": len(rest) / (rest[-1] - first),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def measure(base: Path, adapter: Path, runs: int, reply: int) -> dict[str, list[dict[str, float]]]:
    """Every candidate `runs` times, in turns."""
    out = base.parent / "exported"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    for _ in range(runs):
        for name in CANDIDATES:
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, __file__, "--child", name, str(base), str(adapter), str(out), str(reply)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    shutil.rmtree(out, ignore_errors=True)
    return found


def report(title: str, found: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{title}")
    print(f"{'':<42}{'load s':>9}{'median':>8}{'first s':>9}{'both s':>8}{'tokens/s':>10}{'peak MB':>9}")
    best = {}
    for name, runs in found.items():
        load = min(r["load"] for r in runs)
        both = min(r["load"] + r["first"] for r in runs)
        speed, peak = max(r["tokens/s"] for r in runs), max(r["peak"] for r in runs)
        best[name] = (load, both, speed, peak)
        middle, first = statistics.median(r["load"] for r in runs), min(r["first"] for r in runs)
        label = f"{name}: {CANDIDATES[name]}"
        print(f"{label:<42}{load:>9.2f}{middle:>8.2f}{first:>9.2f}{both:>8.2f}{speed:>10.1f}{peak:>9.0f}")
    load, both, speed, peak = best["merged"]
    print(f"merged while loading against the base alone: load × {load / best['base'][0]:.2f}, "
          f"to the first token × {both / best['base'][1]:.2f}, peak {peak - best['base'][3]:+.0f} MB")  # fmt: skip
    print(f"against export, then load: × {load / best['exported'][0]:.2f}, "
          f"to the first token × {both / best['exported'][1]:.2f}")  # fmt: skip
    print(f"merged against live: tokens/s × {speed / best['live'][2]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["0.5"], choices=SHAPES)
    parser.add_argument("--where", default=tempfile.gettempdir(), help="folder to work in")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a base that is there, with --adapter")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--reply", type=int, default=33, metavar="N", help="tokens of the reply (33)")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, base, adapter, out, reply = args.child
        print(json.dumps(child(name, Path(base), Path(adapter), Path(out), int(reply))))
        return
    with tempfile.TemporaryDirectory(dir=args.where, prefix="inlay-bench-") as folder:
        if args.model:
            base = Path(shutil.copytree(args.model, Path(folder) / "base"))
            report(str(args.model), measure(base, args.adapter, args.runs, args.reply))
            return
        for size in args.sizes:
            work = Path(folder) / size
            base = make_base(work, SHAPES[size])
            adapter = make_adapter(work, SHAPES[size], args.rank, "all")
            report(f"{size} B, LoRA r={args.rank} on all linear layers", measure(base, adapter, args.runs, args.reply))
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
