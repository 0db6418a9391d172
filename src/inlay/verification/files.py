"""Files beside the tensors: index, sidecars, headers, manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.header import layout
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.digests import digest_file
from inlay.output.json_edit import edit_json
from inlay.output.staging import RECORDS
from inlay.plan.layout import stored_key
from inlay.plan.types import Plan, Sidecar
from inlay.records.fingerprint import tensor_digest
from inlay.records.manifest import MANIFEST, is_sealed, read_manifest
from inlay.verification.report import FileVerdict

MERGED = "merged"


def check_index(merged: Checkpoint) -> Iterator[FileVerdict]:
    """The index of any directory: its total size has to be that of the tensors."""
    for name, component in merged.components.items():
        for found in check_index(component):
            yield FileVerdict(f"{name}/{found.file}", found.what)
    if merged.index_file is None:
        return
    total = (merged.index.get("metadata") or {}).get("total_size")
    if total != merged.nbytes:
        yield FileVerdict(merged.index_file, f"total_size is {total}, the tensors have {merged.nbytes} bytes")


def check_sidecars(plan: Plan, folder: Path) -> Iterator[FileVerdict]:
    """Files of the base and the adapters that should be there as they are, or with the planned edits."""
    for sidecar in plan.sidecars:
        path = folder / sidecar.file
        if not path.is_file():
            yield FileVerdict(sidecar.file, "missing")
        elif not _as_wanted(plan, sidecar, path):
            yield FileVerdict(sidecar.file, "differs from what was planned")


def _as_wanted(plan: Plan, sidecar: Sidecar, path: Path) -> bool:
    source = plan.roots[sidecar.root] / sidecar.source
    if sidecar.edits or sidecar.removed:
        wanted = edit_json(source.read_bytes().decode("utf-8"), sidecar.edits, sidecar.removed)
        return path.read_bytes() == wanted.encode()
    return path.stat().st_size == source.stat().st_size and digest_file(path) == digest_file(source)


def check_own(plan: Plan, merged: Checkpoint, full: bool, staged: bool) -> Iterator[FileVerdict]:
    """A directory that inlay wrote is held to its manifest, byte for byte; `staged` while it is being made."""
    folder = merged.path
    if not is_sealed(folder):
        yield FileVerdict(MANIFEST, "was changed after it was written")
        return
    manifest = read_manifest(folder) or {}
    if manifest.get("plan") != plan.digest:
        yield FileVerdict(MANIFEST, f"was made by plan {manifest.get('plan')}, this is {plan.digest}")
    yield from _check_recipe(plan, manifest)
    if full:
        yield from _check_digests(manifest, merged)
    yield from _check_files(manifest, folder, RECORDS if staged else None)
    yield from _check_headers(plan, merged)
    if plan.index is not None and merged.index_file and merged.index != json.loads(json.dumps(plan.index)):
        yield FileVerdict(merged.index_file, "differs from what was planned")


def _check_recipe(plan: Plan, manifest: Mapping[str, Any]) -> Iterator[FileVerdict]:
    """The manifest names the base and the adapters that it was made from."""
    if manifest["base"]["headers"] != plan.base:
        yield FileVerdict(MANIFEST, f"names the base {manifest['base']['headers']}, this is {plan.base}")
    if [(a["digest"], a["weight"]) for a in manifest["adapters"]] != [(a.digest, a.weight) for a in plan.adapters]:
        yield FileVerdict(MANIFEST, "names other adapters or weights")
    computed = {entry.key for entry in plan.entries.values() if not entry.copied}
    if manifest["tensors"].keys() != computed:
        yield FileVerdict(MANIFEST, "lists other tensors than those that were computed")


def _check_digests(manifest: Mapping[str, Any], merged: Checkpoint) -> Iterator[FileVerdict]:
    with SpanReader({MERGED: merged.path}) as reader:
        for key, digest in manifest["tensors"].items():
            if key in merged.tensors:
                shard, info = merged.tensors[key]
                if tensor_digest(reader, TensorRef.of(MERGED, shard.file, info)) != digest:
                    yield FileVerdict(shard.file, f"{key} differs from its digest in the manifest")


def _check_files(manifest: Mapping[str, Any], folder: Path, ignored: str | None) -> Iterator[FileVerdict]:
    listed = manifest["files"]
    for file, wanted in listed.items():
        path = folder / file
        if not path.is_file():
            yield FileVerdict(file, "missing")
        elif path.stat().st_size != wanted["nbytes"]:
            yield FileVerdict(file, f"has {path.stat().st_size} bytes, the manifest says {wanted['nbytes']}")
        elif "digest" in wanted and digest_file(path) != wanted["digest"]:
            yield FileVerdict(file, "differs from the digest in the manifest")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in listed and name != MANIFEST and name.partition("/")[0] != ignored:
            yield FileVerdict(name, "is not in the manifest")


def _check_headers(plan: Plan, merged: Checkpoint) -> Iterator[FileVerdict]:
    headers = {shard.file: shard.header for shard in merged.shards}
    for shard in plan.shards:
        header = headers.get(shard.file)
        if header is None:
            yield FileVerdict(shard.file, "missing")
            continue
        wanted = layout([(stored_key(shard.file, e.key), e.dtype, e.shape) for e in shard.entries], shard.metadata)[0]
        if shard.like is not None:
            with open(plan.roots[BASE] / shard.like, "rb") as file:
                wanted = file.read(len(header.raw))
        if header.raw != wanted:
            yield FileVerdict(shard.file, "its header differs from what was planned")
