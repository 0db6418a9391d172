"""Other processes, for tests: in an environment without a word about groups of processes."""

from __future__ import annotations

import os
import subprocess
import sys

FREE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """That of the tests without a word about processes."""
    return {**{k: v for k, v in os.environ.items() if k not in FREE}, "OMP_NUM_THREADS": "1", **more}


def run(words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=environment(**more), capture_output=True, text=True, timeout=300
    )
