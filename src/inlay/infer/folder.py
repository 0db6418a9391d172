"""The merged model without its weights: a folder for engines that take the weights as a stream.

Files that stay as they are are links to those of the base and the adapters; those that change are written, so that
configuration and tokenizer are the merged model's. Of each shard there is the header and no data: an engine can see
names, types and shapes, and a loader that reads such a file fails at once instead of taking the base's weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inlay.checkpoints.header import layout
from inlay.output.json_edit import edit_json
from inlay.plan.layout import index_file
from inlay.plan.types import Plan, Sidecar


@contextmanager
def model_folder(plan: Plan) -> Iterator[Path]:
    """A temporary folder with everything of the merged model but its weights: kilobytes."""
    with tempfile.TemporaryDirectory(prefix="inlay-model-") as name:
        folder = Path(name)
        for sidecar in plan.sidecars:
            _put(plan, sidecar, folder / sidecar.file)
        for shard in plan.shards:
            header, _ = layout([(e.key, e.dtype, e.shape) for e in shard.entries], shard.metadata)
            (folder / shard.file).write_bytes(header)
        if plan.index is not None and (index := index_file(plan.shards)):
            (folder / index).write_text(json.dumps(plan.index))
        yield folder


def _put(plan: Plan, sidecar: Sidecar, target: Path) -> None:
    source = plan.roots[sidecar.root] / sidecar.source
    target.parent.mkdir(parents=True, exist_ok=True)
    if sidecar.edits or sidecar.removed:
        text = source.read_bytes().decode("utf-8")
        target.write_bytes(edit_json(text, sidecar.edits, sidecar.removed).encode())
    else:
        target.symlink_to(os.path.abspath(source))
