"""Several processes on this machine: `NPROC_PER_NODE=8 inlay sft …`, in the words of ms-swift and torchrun.

Each process gets RANK, LOCAL_RANK, WORLD_SIZE and the address of the first, as `torchrun` and `accelerate launch` give
them, which work as well. On several machines NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say which one this is.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import FrameType
from typing import Any

from inlay.errors import InputError
from inlay.plan.memory import threads
from inlay.train.recipe import ADALORA, FULL, Recipe

FSDP, DEEPSPEED = "fsdp", "deepspeed"
POLL_SECONDS = 0.1
GRACE_SECONDS = 30  # for all to save, once a stop was asked for
SAME_SECONDS = 1  # in which a signal that comes again is the same: `timeout` sends it to a process and to its group
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
    relay = _Relay(wanted.count)
    before = {number: signal.signal(number, handler) for number, handler in relay.handlers().items()}
    try:
        for i in range(wanted.count):
            rank = {"LOCAL_RANK": str(i), "RANK": str(wanted.node * wanted.count + i)}
            words = [sys.executable, "-m", "inlay", *argv]
            relay.started.append(subprocess.Popen(words, env={**shared, **rank}, start_new_session=True))
        return _wait(relay.started)
    finally:
        for p in relay.started:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)  # with those that read data for it
            p.wait()
        for number, former in before.items():
            signal.signal(number, former)


class _Relay:
    """Passes on to all processes what this one is told, each signal once: a second one ends them without a checkpoint.

    They are in sessions of their own, as under torchrun. Else Ctrl-C and `timeout`, which tell the whole group of this
    process, would tell them twice.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.started: list[subprocess.Popen[bytes]] = []
        self.heard: dict[int, float] = {}  # when each signal came last, in seconds

    def handlers(self) -> dict[signal.Signals, Callable[[int, FrameType | None], None]]:
        """Those to install. What nohup and shells without job control have switched off stays so."""
        also = {signal.SIGHUP: self.pass_on, signal.SIGQUIT: self.pass_on, signal.SIGTSTP: self.pause}
        wanted = {n: handler for n, handler in also.items() if signal.getsignal(n) == signal.SIG_DFL}
        return {signal.SIGINT: self.pass_on, signal.SIGTERM: self.pass_on, **wanted}

    def pass_on(self, number: int, _frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt while some are not started yet, who would not hear of it."""
        now = time.monotonic()
        if now - self.heard.get(number, -math.inf) < SAME_SECONDS:
            return
        self.heard[number] = now
        if len(self.started) < self.count:
            raise KeyboardInterrupt
        self._send(number)

    def pause(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: all rest until this one goes on."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for p in self.started:
            p.send_signal(number)


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


def check_settings(arguments: Any, recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """Raises InputError for settings that leave a checkpoint in parts, or without weights, and for those that
    contradict the recipe. `arguments` are transformers' own, which have read the files of settings."""
    _check_precision(arguments, environment)
    kind = sharding(recipe, environment)
    if kind == FSDP:
        states = (arguments.fsdp_plugin_args or {}).get("state_dict_type") or environment.get("FSDP_STATE_DICT_TYPE")
        if "FULL_STATE_DICT" not in str(states):
            raise InputError(
                f"--fsdp: state_dict_type {states} would leave checkpoints in parts, which nothing merges; give "
                "FULL_STATE_DICT"
            )
    if kind == DEEPSPEED:
        differ = _differing(arguments)
        if differ:
            raise InputError(f'--deepspeed: settings contradict the recipe; give "auto" there: {", ".join(differ)}')
        zero = arguments.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {})
        if zero.get("stage") == 3:
            _check_stage_3(zero, recipe)


def _check_precision(arguments: Any, environment: Mapping[str, str]) -> None:
    """Raises InputError where `accelerate launch` names another type than the recipe: what is recorded would not be
    what trains. Its "no" is also what it says when nothing was chosen."""
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    ours = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    if asked in ("no", ours):
        return
    names = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
    same = f"--torch_dtype {names[asked]}, or " if asked in names else ""
    raise InputError(
        f"mixed_precision {asked} of accelerate launch: this run trains in {names[ours]}; give {same}mixed_precision no"
    )


def _differing(arguments: Any) -> list[str]:
    """Settings of DeepSpeed that are another number than the recipe's, in the words of transformers, which tells them
    once the model is loaded."""
    config = arguments.deepspeed_plugin.hf_ds_config
    if not hasattr(config, "mismatches"):  # from accelerate's config, which transformers compares later
        from transformers import integrations

        deepspeed: Any = integrations.deepspeed
        former, config = config, deepspeed.HfTrainerDeepSpeedConfig(deepcopy(config.config))
        config.trainer_config_process(arguments)
        deepspeed.set_hf_deepspeed_config(former)  # what is compared took its place
    return [line.removeprefix("- ds ") for line in config.mismatches]


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
