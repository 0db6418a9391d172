"""`run_plan`: from a plan to a published directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inlay.errors import InlayError, InputError, OutputError, PlanError
from inlay.output.destination import check_destination
from inlay.output.staging import Staging, sync_folder
from inlay.plan.memory import DEFAULT_MAX_MEMORY
from inlay.plan.request import parse_size
from inlay.plan.types import Plan
from inlay.run.local import LocalExecutor
from inlay.run.publish import write_manifest, write_sidecars
from inlay.run.shard import Progress
from inlay.run.survival import Survived, require_survival, survival
from inlay.tuners.device import find_device


@dataclass(frozen=True)
class RunResult:
    """Where the merged model is, and what was written."""

    output_dir: Path
    nbytes: int
    shards: int


def run_plan(
    plan: Plan,
    output_dir: str | os.PathLike[str],
    *,
    exist_ok: bool = False,
    max_memory: int | str = DEFAULT_MAX_MEMORY,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
    survived: Survived | None = None,
    accept_loss: bool = False,
) -> RunResult:
    """Carry out `plan` and publish the result as `output_dir`.

    The same plan gives the same bytes for any `workers`, `max_memory`, `device` (cpu, auto,
    cuda:N) and number of interruptions.
    `progress` is called with bytes as they are done, from any thread. `check` sees the finished folder
    before it is published; what it raises stops the publication. `survived` is what `survival` found, if it has
    been asked; a result whose codes hold less than half of the adapters is refused unless `accept_loss`.

    Raises InputError when inputs changed since the plan was made, when a result would not be finite, and
    OutputError when the destination cannot be written. Then nothing is left behind; after an
    interruption the staging folder stays, for a rerun to go on from.
    """
    destination = Path(output_dir)
    problems = check_destination(destination, plan.roots, exist_ok, 0)
    if problems:
        raise PlanError(problems)
    _check_inputs(plan)
    inputs = {"files": [dataclasses.asdict(f) for f in plan.inputs.files]}
    with Staging(destination, plan.digest, inputs) as staging:
        try:
            survived = survived or survival(plan)
            if not accept_loss:
                require_survival(survived)
            executor = LocalExecutor(plan, parse_size(max_memory), workers, find_device(device))
            results = executor.run(staging, progress or _ignore)
            digests = write_sidecars(plan, staging.path)
            write_manifest(plan, staging.path, results, digests, survived)
            sync_folder(staging.path)
            if check is not None:
                check(staging.path)
        except InlayError:
            staging.discard()
            raise
        except OSError as error:
            staging.discard()
            where = f" ({error.filename})" if error.filename else ""
            raise OutputError(f"{destination}: {error.strerror or error}{where}; nothing was written") from error
        _publish(staging, plan, exist_ok)
    return RunResult(destination, plan.cost.written, len(plan.shards))


def _publish(staging: Staging, plan: Plan, exist_ok: bool) -> None:
    """Publish, unless something has come to the destination meanwhile; the work is kept for a rerun then."""
    problems = check_destination(staging.destination, plan.roots, exist_ok, 0)
    if problems:
        raise PlanError(problems, ["The merged model is kept beside it; the same command with another answer goes on."])
    try:
        staging.publish()
    except OSError as error:
        staging.discard()
        raise OutputError(f"{staging.destination}: cannot be put in place: {error.strerror or error}") from error


def _ignore(_: int) -> None:
    """Progress that nobody watches."""


def _check_inputs(plan: Plan) -> None:
    """A file that changed since it was planned would be merged by a plan that was made for another."""
    for file in plan.inputs.files:
        path = plan.roots[file.root] / file.file
        try:
            stat = path.stat()
        except OSError:
            raise InputError(f"{path}: was there when the plan was made, and is gone") from None
        if (stat.st_size, stat.st_mtime_ns) != (file.nbytes, file.mtime_ns):
            raise InputError(f"{path}: has changed since the plan was made; make the plan again")
