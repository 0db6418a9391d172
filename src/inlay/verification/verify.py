"""`verify`: is this directory base + adapters?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from inlay.adapters.adapter import Adapter, read_adapter
from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.spans import BASE
from inlay.errors import InputError
from inlay.plan.build import make_plan
from inlay.plan.combination import NO_OPTIONS, Options
from inlay.plan.quant import NO_QUANT, Quant
from inlay.plan.types import Plan
from inlay.records.fingerprint import check_recorded
from inlay.records.manifest import MANIFEST, is_sealed, read_manifest
from inlay.verification.files import check_index, check_own, check_sidecars
from inlay.verification.report import Report
from inlay.verification.tensors import check_tensors

StrPath = str | os.PathLike[str]
MODES = ("full", "sample", "none")


def verify(
    model: StrPath | Checkpoint,
    adapters: Sequence[StrPath | Adapter],
    merged: StrPath,
    *,
    weights: Sequence[float] | None = None,
    torch_dtype: str | None = None,
    combine_by: str | None = None,
    options: Options = NO_OPTIONS,
    quant: Quant = NO_QUANT,
    max_shard_size: int | str | None = None,
    full: bool = True,
) -> Report:
    """Compare a merged directory, made by any tool, with base + adapters, tensor by tensor.

    Settings that are not given are taken from the directory's manifest where it has one. With `full` every
    element is looked at, otherwise a few rows of each tensor and all files.

    Raises PlanError when the adapters do not fit the base at all, and, with `full`, InputError when they recorded
    another base.
    """
    folder = Path(merged)
    manifest = read_manifest(folder) if folder.is_dir() and is_sealed(folder) else None
    read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
    recorded = manifest["settings"] if manifest else {}
    if weights is None and manifest and [a["digest"] for a in manifest["adapters"]] == [a.digest for a in read]:
        weights = [a["weight"] for a in manifest["adapters"]]
    plan = make_plan(
        model,
        read,
        weights=weights,
        torch_dtype=torch_dtype or _torch_name(recorded.get("dtype")),
        combine_by=combine_by or recorded.get("combine", "sum"),
        options=options if combine_by or options.given() else Options(**recorded.get("options", {})),
        quant=quant if quant.given() else Quant(**recorded.get("quant", {})),
        max_shard_size=max_shard_size or recorded.get("max_shard_bytes"),
    )
    if full:
        _check_base(plan)
    return verify_plan(plan, folder, full=full)


def _check_base(plan: Plan) -> None:
    """Raises InputError for a base that is not the one an adapter recorded."""
    for position, adapter in enumerate(plan.adapters):
        recorded = {e.key: e.digest for e in plan.expectations if e.adapter == position}
        if recorded:
            check_recorded(open_checkpoint(plan.roots[BASE]), recorded, adapter.name)


def verify_plan(plan: Plan, merged: StrPath, *, full: bool = True, staged: bool = False) -> Report:
    """Compare a directory with what `plan` says should be in it; `staged` while the records of a run are in it."""
    checkpoint = open_checkpoint(merged)
    if not checkpoint.tensors:
        raise InputError(f"{merged}: holds no tensors")
    own = (checkpoint.path / MANIFEST).exists()
    files = [*check_index(checkpoint), *check_sidecars(plan, checkpoint.path)]
    if own:
        files += [f for f in check_own(plan, checkpoint, full, staged) if f.file not in {x.file for x in files}]
    return Report(tuple(check_tensors(plan, checkpoint, full)), tuple(files), sampled=not full, own=own)


def _torch_name(dtype: str | None) -> str | None:
    from inlay.dtypes import DTYPES

    return DTYPES[dtype].torch if dtype else None
