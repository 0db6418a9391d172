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
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from inlay.errors import InputError
from inlay.plan.memory import threads
from inlay.train.recipe import ADALORA, FULL, Recipe

FSDP, DEEPSPEED = "fsdp", "deepspeed"
POLL_SECONDS = 0.1
GRACE_SECONDS = 30  # for all to save, once a stop was asked for
WAIT_SECONDS = 20  # for whoever started this process to end it, because another one failed and says why

# What MPI tells its processes, by the names that torch takes: Open MPI, Intel MPI and MPICH, MVAPICH.
_FROM_MPI = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
}


@dataclass(frozen=True)
class Group:
    """The processes to start: how many on this machine, and which of the machines it is."""

    count: int
    nodes: int = 1
    node: int = 0


def adopt(environment: MutableMapping[str, str]) -> None:
    """Complete the rank of a process that was started otherwise than by torchrun: by mpirun, or one on each machine."""
    if "LOCAL_RANK" in environment or "NPROC_PER_NODE" in environment or "NNODES" in environment:
        return
    given = {n: next((environment[s] for s in (n, *names) if s in environment), None) for n, names in _FROM_MPI.items()}
    if given["RANK"] is None or given["WORLD_SIZE"] in (None, "1"):
        return
    environment.update({name: value for name, value in given.items() if value is not None})
    environment.setdefault("LOCAL_RANK", "0")
    environment.setdefault("MASTER_PORT", "29500")


def group(environment: Mapping[str, str]) -> Group | None:
    """The processes to start; None where there is nothing to start, or this is one that was started.

    Raises InputError for numbers that are none or contradict each other.
    """
    if "LOCAL_RANK" in environment:
        return None
    count, nodes = _number(environment, "NPROC_PER_NODE", 1), _number(environment, "NNODES", 1)
    if count * nodes == 1:
        _check_accelerate(environment)
        return None
    if nodes == 1:
        return Group(count)
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise InputError(f"NNODES={nodes}: give {', '.join(missing)} too, which tell the machines apart and together")
    node = _number(environment, "NODE_RANK", 0)
    if node >= nodes:
        raise InputError(f"NODE_RANK={node}: must be below NNODES={nodes}; the first machine is 0")
    return Group(count, nodes, node)


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    asked = environment.get(name) or "1"
    if not asked.isdecimal() or int(asked) < least:
        raise InputError(f"{name}={asked}: must be a whole number, at least {least}")
    return int(asked)


def _check_accelerate(environment: Mapping[str, str]) -> None:
    """Where there is no GPU `accelerate launch` starts one process, however many are asked for, and gives it an address
    to meet the others at. Raises InputError, since one would train other steps than several."""
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise InputError(
            "accelerate launch: several processes were asked for and it started one, as it does on the processor; give "
            "--multi_gpu instead of --cpu, which starts them there too, or NPROC_PER_NODE=2 inlay sft …"
        )


def launch(argv: Sequence[str], wanted: Group, environment: Mapping[str, str]) -> int:
    """Run `inlay ARGV` in the processes of a group. The exit code of the first that fails, which ends the others."""
    shared = {
        **environment,
        "WORLD_SIZE": str(wanted.nodes * wanted.count),
        "LOCAL_WORLD_SIZE": str(wanted.count),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or "127.0.0.1",
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_free_port()),
    }
    # Each would take all cores, and they would wait for each other.
    shared.setdefault("OMP_NUM_THREADS", str(max(1, threads() // wanted.count)))
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for p in started:
            p.send_signal(number)

    def leave(_number: int, _frame: FrameType | None) -> None:
        """Ctrl-C reaches every process of the terminal's group; this one waits for what they make of it."""

    before = {s: signal.signal(s, handler) for s, handler in ((signal.SIGINT, leave), (signal.SIGTERM, pass_on))}
    try:
        for i in range(wanted.count):
            rank = {"LOCAL_RANK": str(i), "RANK": str(wanted.node * wanted.count + i)}
            started.append(subprocess.Popen([sys.executable, "-m", "inlay", *argv], env={**shared, **rank}))
        return _wait(started)
    finally:
        for p in started:
            if p.poll() is None:
                p.kill()
            p.wait()
        for number, former in before.items():
            signal.signal(number, former)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of all: 0, or that of the first that is seen to fail. Others may be left running."""
    while True:
        codes = [p.poll() for p in started]
        failed = [i for i, code in enumerate(codes) if code]
        if failed or None not in codes:
            break
        time.sleep(POLL_SECONDS)
    if not failed:
        return 0
    code = codes[failed[0]]
    assert code is not None
    if code == 130:  # a stop that was asked for ends them all, each after its own step; an error leaves them waiting
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(p.poll() is None for p in started):
            time.sleep(POLL_SECONDS)
    if code < 0:  # it had no time to say so itself; SIGKILL is what a machine without memory left sends
        print(f"process {failed[0]} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    return code


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_the_end(told: bool) -> None:
    """After an error: let the process speak that the error began in, and be ended by whoever started this one.

    What all find wrong the first one says. When one alone fails, the connection to it breaks in the others, which is
    nothing to tell; so `told`, whether the error is one that a user can read, makes the first go ahead.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (told and is_first()):
        time.sleep(WAIT_SECONDS * (1 if told else 2))


def sharding(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> str | None:
    """FSDP or DEEPSPEED where one of them divides the work, by options or by a config of `accelerate launch`."""
    for name, given in ((DEEPSPEED, recipe.deepspeed), (FSDP, recipe.fsdp)):
        if given or environment.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true"):
            return name
    return None


def check_sharding(recipe: Recipe, processes: int, on_cpu: bool) -> None:
    """Raises InputError for what would train otherwise than asked, or not at all."""
    kind = sharding(recipe)
    if kind == FSDP and processes == 1:
        raise InputError("--fsdp: divides the model among several processes, and here is one; see NPROC_PER_NODE")
    if kind == FSDP and on_cpu:
        raise InputError(
            "--fsdp: accelerate divides a model among GPUs only; on the processor each process would hold the whole "
            "model; leave it out"
        )
    if kind and recipe.train_type == ADALORA:
        raise InputError(f"--train_type adalora: ranks its weights by whole gradients, which --{kind} does not leave")


def check_gathering(arguments: Any, recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """Raises InputError for settings that leave a checkpoint in parts, or without weights. `arguments` are
    transformers' own, which have read the files of settings."""
    kind = sharding(recipe, environment)
    if kind == FSDP:
        states = (arguments.fsdp_plugin_args or {}).get("state_dict_type") or environment.get("FSDP_STATE_DICT_TYPE")
        if "FULL_STATE_DICT" not in str(states):
            raise InputError(
                f"--fsdp: state_dict_type {states} would leave checkpoints in parts, which nothing merges; give "
                "FULL_STATE_DICT"
            )
    if kind == DEEPSPEED:
        zero = arguments.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {})
        if zero.get("stage") == 3:
            _check_stage_3(zero, recipe)


def _check_stage_3(zero: Mapping[str, Any], recipe: Recipe) -> None:
    if recipe.shifts_base:
        raise InputError(
            f"--init_weights {recipe.init_weights}: cannot be taken from weights that DeepSpeed divides; use stage 2"
        )
    if recipe.train_type == FULL and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise InputError(
            "--deepspeed: in stage 3 the weights of --train_type full are saved only with "
            '"stage3_gather_16bit_weights_on_model_save": true in "zero_optimization"'
        )
