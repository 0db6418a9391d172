"""Several processes on this machine: `NPROC_PER_NODE=8 inlay sft …`, in the words of ms-swift and torchrun.

Each process gets RANK, LOCAL_RANK, WORLD_SIZE and the address of the first, as `torchrun` and `accelerate launch` give
them, which work as well. On several machines NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say which one this is.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from inlay.errors import InputError

POLL_SECONDS = 0.1
GRACE_SECONDS = 30


def processes(environment: Mapping[str, str]) -> int:
    """How many processes to start here; 1 inside one that was started."""
    asked = environment.get("NPROC_PER_NODE", "1")
    if "LOCAL_RANK" in environment:
        return 1
    if not asked.isdecimal() or int(asked) < 1:
        raise InputError(f"NPROC_PER_NODE={asked}: must be a positive number of processes")
    return int(asked)


def launch(argv: Sequence[str], count: int, environment: Mapping[str, str]) -> int:
    """Run `inlay ARGV` in `count` processes. The exit code of the first that fails; the others are then ended."""
    nodes, node = int(environment.get("NNODES", "1")), int(environment.get("NODE_RANK", "0"))
    shared = {
        **environment,
        "WORLD_SIZE": str(nodes * count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_free_port()),
    }
    if nodes > 1 and "MASTER_PORT" not in environment:
        raise InputError("NNODES above 1: give MASTER_ADDR and MASTER_PORT, which all machines must agree on")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "inlay", *argv],
            env={**shared, "LOCAL_RANK": str(i), "RANK": str(node * count + i)},
        )
        for i in range(count)
    ]

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for p in started:
            p.send_signal(number)

    # Ctrl-C reaches every process of the terminal's group, SIGTERM this one alone; it waits for what they make of it.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, pass_on)
    try:
        return _wait(started)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [p.poll() for p in started]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            break
        time.sleep(POLL_SECONDS)
    if not failed:
        return 0
    # A stop that was asked for ends them all, each after its own step; an error leaves the others waiting for ever.
    deadline = time.monotonic() + (GRACE_SECONDS if failed[0] == 130 else 2)
    while time.monotonic() < deadline and any(p.poll() is None for p in started):
        time.sleep(POLL_SECONDS)
    for p in started:
        if p.poll() is None:
            p.kill()
        p.wait()
    code = failed[0]
    return code if code > 0 else 128 - code


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"
