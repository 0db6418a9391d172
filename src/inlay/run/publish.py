"""Everything beside the shards, the manifest last: index, sidecars, model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay import __version__
from inlay.checkpoints.spans import BASE
from inlay.digests import digest_bytes, digest_file
from inlay.output.copying import copy_span
from inlay.output.json_edit import edit_json
from inlay.output.staging import write_durably
from inlay.plan.layout import index_file
from inlay.plan.sidecars import CARD
from inlay.plan.types import Plan, Sidecar
from inlay.records.manifest import FORMAT, MANIFEST, read_manifest, seal
from inlay.run.card import model_card
from inlay.run.local import ShardResult
from inlay.run.survival import Survived


def write_sidecars(plan: Plan, folder: Path) -> dict[str, str]:
    """Write all files that are not shards, except the manifest; their digests by name."""
    digests = {}
    for sidecar in plan.sidecars:
        _write_sidecar(plan, sidecar, folder / sidecar.file)
        digests[sidecar.file] = digest_file(folder / sidecar.file)
    if plan.index is not None:
        name = index_file(plan.shards)
        assert name is not None
        text = json.dumps(plan.index, indent=2) + "\n"
        write_durably(folder / name, text.encode())
        digests[name] = digest_bytes(text.encode())
    card = model_card(plan).encode()
    write_durably(folder / CARD, card)
    digests[CARD] = digest_bytes(card)
    return digests


def _write_sidecar(plan: Plan, sidecar: Sidecar, target: Path) -> None:
    source = plan.roots[sidecar.root] / sidecar.source
    if sidecar.edits or sidecar.removed:
        text = source.read_bytes().decode("utf-8")
        write_durably(target, edit_json(text, sidecar.edits, sidecar.removed).encode())
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as read, open(target, "wb") as write:
        copy_span(read.fileno(), 0, write.fileno(), 0, source.stat().st_size)
        os.fsync(write.fileno())
    target.chmod(source.stat().st_mode & 0o777 | 0o200)


def write_manifest(
    plan: Plan,
    folder: Path,
    shards: Mapping[str, ShardResult],
    sidecars: Mapping[str, str],
    survived: Survived | None,
) -> None:
    """Write the manifest: the last file of a whole result."""
    write_durably(folder / MANIFEST, seal(make_manifest(plan, shards, sidecars, folder, survived)).encode())


def make_manifest(
    plan: Plan,
    shards: Mapping[str, ShardResult],
    sidecars: Mapping[str, str],
    folder: Path,
    survived: Survived | None,
) -> dict[str, Any]:
    """Content of the manifest."""
    files: dict[str, Any] = {
        file: {"nbytes": (folder / file).stat().st_size, "digest": digest} for file, digest in sidecars.items()
    }
    files |= {file: {"nbytes": result.nbytes} for file, result in shards.items()}
    base: dict[str, Any] = {"name": Path(plan.base_name).name, "headers": plan.base}
    if (recipe := read_manifest(plan.roots[BASE])) is not None:
        base["recipe"] = {k: recipe[k] for k in ("plan", "base", "adapters", "settings") if k in recipe}
    return {
        "format": FORMAT,
        "inlay": __version__,
        "plan": plan.digest,
        "base": base,
        "adapters": [
            {
                "name": a.name, "digest": a.digest, "tuner": a.tuner, "weight": a.weight, "rank": list(a.rank),
                "scaling": list(a.scaling), "modules": a.modules, "parameters": a.parameters,
            }
            for a in plan.adapters
        ],
        "settings": {
            "dtype": plan.settings.dtype, "combine": plan.settings.combine,
            "max_shard_bytes": plan.settings.max_shard_bytes, "options": dict(plan.settings.options),
            "quant": dict(plan.settings.quant),
        },
        "order_matters": plan.order_matters,
        **({"survival": survived.to_json()} if survived else {}),
        "tensors": {key: digest for result in shards.values() for key, digest in sorted(result.digests.items())},
        "files": {file: files[file] for file in sorted(files)},
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }  # fmt: skip
