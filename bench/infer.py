"""Base, live adapter and merged side by side in one run: loading, time to the first token, tokens per second.

    python bench/infer.py                          # 0.5 B, LoRA of rank 16 on all linear layers; both backends
    python bench/infer.py --sizes 0.5 1.5 --runs 5 --where /dev/shm --backends pt
    python bench/infer.py --cold                   # files out of the page cache before every run
    python bench/infer.py --sizes --model demo/base --adapter build/demo-run/last        # the demo's, after it has run

Bases and adapters are those of `bench/merge.py`, bfloat16 and float32. Every candidate is a process of its own, and
they take turns. Its seconds begin when torch and transformers, or vLLM, are imported. vLLM runs in an environment of
its own, which `make test-vllm` makes; where that is missing, it is left out and said.

load          until the model can be called: planning, merging and PEFT included; the whole start of the engine in vLLM
weights       of it, what vLLM's log says of taking the weights in, merging included; for `exported` reading alone
first         from there to the first token of a reply to 32 tokens. transformers maps files into memory, so a base
              that was loaded alone is read here
tokens/s      of the tokens after it, greedy
peak          resident memory of the process, or of vLLM's worker, MB, mapped files included
"""

from __future__ import annotations

import argparse
import json
import os
import re
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

HERE = Path(__file__).resolve().parent
VLLM_PYTHON = HERE.parent / ".venv-vllm/bin/python"
WEIGHTS = re.compile(r"Loading weights took ([0-9.]+) seconds")
PROMPT = 32
CANDIDATES = {
    "base": "loaded alone",
    "live": "base + adapter beside it",
    "merged": "merged while loading",
    "exported": "exported, then loaded",
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


def command(backend: str, vllm: Path) -> list[str]:
    """What runs a candidate of a backend; its name, paths and the length of the reply follow."""
    if backend == "vllm":
        return [str(vllm), str(HERE / "vllm_child.py")]
    return [sys.executable, __file__, "--child"]


def evict(*folders: Path) -> None:
    """Take the files out of the page cache, so that the next reader waits for the disk."""
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(base: Path, adapter: Path, runs: int, tail: list[str], cold: bool) -> dict[str, list[dict[str, float]]]:
    """Every candidate `runs` times, in turns; `tail` is the command and, last, the length of the reply."""
    *start, reply = tail
    out = base.parent / "exported"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    for _ in range(runs):
        for name in CANDIDATES:
            shutil.rmtree(out, ignore_errors=True)
            if cold:
                evict(base, adapter)
            given = [*start, name, str(base), str(adapter), str(out), reply]
            done = subprocess.run(given, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"load"')))
            if weights := WEIGHTS.findall(done.stdout + done.stderr):
                figures["weights"] = float(weights[-1])
            found[name].append(figures)
    shutil.rmtree(out, ignore_errors=True)
    return found


def report(title: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Figures of a backend; ratios are of minima, since noise only adds."""
    print(f"\n{title}")
    print(f"{'':<42}{'load s':>9}{'median':>8}{'weights':>9}{'first s':>9}{'both s':>8}{'tokens/s':>10}{'peak MB':>9}")
    best = {}
    for name, runs in found.items():
        low = {key: min(r[key] for r in runs) for key in runs[0] if key not in ("tokens/s", "peak")}
        low["both"] = min(r["load"] + r["first"] for r in runs)
        high = {key: max(r[key] for r in runs) for key in ("tokens/s", "peak")}
        best[name] = {**low, **high}
        middle = statistics.median(r["load"] for r in runs)
        weights = f"{low['weights']:.2f}" if "weights" in low else "-"
        print(f"{name + ': ' + CANDIDATES[name]:<42}{low['load']:>9.2f}{middle:>8.2f}{weights:>9}{low['first']:>9.2f}"
              f"{low['both']:>8.2f}{high['tokens/s']:>10.1f}{high['peak']:>9.0f}")  # fmt: skip
    for other, what in (("base", "against the base alone"), ("exported", "against export, then load")):
        ratios = [f"{label} × {best['merged'][key] / best[other][key]:.2f}"
                  for key, label in (("load", "load"), ("weights", "weights"), ("both", "to the first token"))
                  if key in best[other]]  # fmt: skip
        more = best["merged"]["peak"] - best[other]["peak"]
        print(f"merged while loading {what}: {', '.join(ratios)}, peak {more:+.0f} MB")
    print(f"merged against live: tokens/s × {best['merged']['tokens/s'] / best['live']['tokens/s']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["0.5"], choices=SHAPES)
    parser.add_argument("--backends", nargs="+", default=["pt", "vllm"], choices=["pt", "vllm"])
    parser.add_argument("--vllm", type=Path, default=VLLM_PYTHON, help="python of an environment with vLLM and inlay")
    parser.add_argument("--where", default=tempfile.gettempdir(), help="folder to work in")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="files out of the page cache before every run")
    parser.add_argument("--model", type=Path, help="a base that is there, with --adapter")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--reply", type=int, default=33, metavar="N", help="tokens of the reply (33)")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, base, adapter, out, reply = args.child
        print(json.dumps(child(name, Path(base), Path(adapter), Path(out), int(reply))))
        return
    if "vllm" in args.backends and not args.vllm.exists():
        args.backends.remove("vllm")
        print(f"vLLM is left out: there is no {args.vllm}; `make test-vllm` makes it", file=sys.stderr)

    def run(title: str, base: Path, adapter: Path) -> None:
        for backend in args.backends:
            tail = [*command(backend, args.vllm), str(args.reply)]
            state = "files out of the page cache" if args.cold else "files in the page cache"
            report(f"{title}; {backend}, {state}", measure(base, adapter, args.runs, tail, args.cold))

    with tempfile.TemporaryDirectory(dir=args.where, prefix="inlay-bench-") as folder:
        if args.model:
            run(str(args.model), Path(shutil.copytree(args.model, Path(folder) / "base")), args.adapter)
        for size in args.sizes:
            work = Path(folder) / size
            base = make_base(work, SHAPES[size])
            adapter = make_adapter(work, SHAPES[size], args.rank, "all")
            run(f"{size} B, LoRA r={args.rank} on all linear layers", base, adapter)
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
