"""`inlay cache list|clear`: merged models that were made for engines, and the space that they take."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from inlay.cli.text import plural, size
from inlay.infer.cache import CacheEntry, cache_folder, clear_cache, list_cache


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        _print_list(list_cache(args.cache_dir), args)
        return 0
    removed, used = clear_cache(args.cache_dir, args.keys)
    if args.json:
        print(json.dumps({"removed": _facts(removed), "in_use": _facts(used)}, indent=1, ensure_ascii=False))
    elif not args.quiet:
        print(f"removed {plural(len(removed), 'merged model')}, {size(sum(e.nbytes for e in removed))}")
        for entry in used:
            print(f"{entry.key[:12]} is in use, and was left")
    return 1 if used else 0


def _print_list(entries: Sequence[CacheEntry], args: argparse.Namespace) -> None:
    if args.json:
        facts = {"cache_dir": str(cache_folder(args.cache_dir)), "entries": _facts(entries)}
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for e in entries:
        what = f"{e.base} + {', '.join(e.adapters)}" if e.complete else "not complete, and not used"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used))
        print(f"{e.key[:12]}  {used}  {size(e.nbytes):>9}  {what}")
    total = size(sum(e.nbytes for e in entries))
    print(f"{plural(len(entries), 'merged model')}, {total}: {cache_folder(args.cache_dir)}")


def _facts(entries: Sequence[CacheEntry]) -> list[dict[str, object]]:
    return [
        {
            "key": e.key, "path": str(e.path), "nbytes": e.nbytes, "used": e.used, "base": e.base,
            "adapters": list(e.adapters), "complete": e.complete,
        }
        for e in entries
    ]  # fmt: skip
