"""`inlay inspect PATH …`: what is in a base, an adapter, a merged directory; how several adapters meet."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.adapters.adapter import Adapter, is_adapter, read_adapter
from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.refs import TensorInfo
from inlay.cli.plan import describe_meeting
from inlay.cli.sources import resolve
from inlay.cli.text import count, plural, rows, size
from inlay.errors import InputError
from inlay.plan.build import make_plan
from inlay.plan.meeting import meet
from inlay.records.manifest import is_sealed, read_manifest


def run(args: argparse.Namespace) -> int:
    paths = [resolve(path, None, args.use_modelscope) for path in args.paths]
    base = open_checkpoint(resolve(args.model, None, args.use_modelscope)) if args.model else None
    if len(paths) > 1:
        return _inspect_several(paths, base, args.json)
    facts = inspect_path(paths[0], base)
    if args.json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        print(
            rows(
                [
                    (name.replace("_", " "), _value(name, value))
                    for name, value in facts.items()
                    if value not in (None, [], {}, "")
                ]
            )
        )
    return 0


def _inspect_several(paths: Sequence[Path], base: Checkpoint | None, as_json: bool) -> int:
    """Several adapters on one base: the size of each, and how they meet."""
    if base is None:
        raise InputError("several adapters meet on a base: name it with --model")
    plan = make_plan(base, [read_adapter(path) for path in paths])
    meetings = meet(plan, base=True)
    if as_json:
        names = [a.name for a in plan.adapters]
        facts = {"adapters": names, "order_matters": plan.order_matters, "overlaps": list(plan.overlaps)}
        print(json.dumps({**facts, "meeting": [m.to_json(names) for m in meetings]}, indent=1, ensure_ascii=False))
        return 0
    order = "matters" if plan.order_matters else "does not matter"
    print(f"{plural(len(plan.overlaps), 'tensor')} in common; the order of the adapters {order}")
    print(describe_meeting(plan, meetings))
    return 0


def inspect_path(path: Path, base: Checkpoint | None = None) -> dict[str, Any]:
    """Facts on a directory: `kind` is adapter, merged or model."""
    if is_adapter(path):
        return _adapter_facts(read_adapter(path), base)
    checkpoint = open_checkpoint(path)
    try:
        manifest = read_manifest(path) if is_sealed(path) else None
    except InputError:
        manifest = None
    return {**_checkpoint_facts(checkpoint, "merged" if manifest else "model"), **_recipe(manifest)}


def _adapter_facts(adapter: Adapter, base: Checkpoint | None) -> dict[str, Any]:
    config = adapter.config
    targets = Counter(module.rpartition(".")[2] for module in adapter.parts)
    is_lora = config.peft_type == "LORA"
    facts: dict[str, Any] = {
        "kind": "adapter",
        "path": str(adapter.path),
        "format": adapter.format,
        "tuner": config.tuner,
        "rank": sorted({config.rank(m) for m in adapter.parts if config.has_rank}),
        "alpha": sorted({config.alpha(m) for m in adapter.parts if is_lora or config.has_alpha}),
        "scaling": sorted({config.scaling(m) for m in adapter.parts if is_lora}),
        "rslora": config.use_rslora,
        "targets": dict(sorted(targets.items())),
        "full_copies": sorted(adapter.full),
        "dtypes": _dtypes(adapter.tensors),
        "trainable_parameters": adapter.parameters,
        "base_model": adapter.base_model,
        "task": config.task_type,
        "peft_version": config.peft_version,
        "digest": adapter.digest,
    }
    if base is not None:
        total = sum(_elements(t) for _, t in base.tensors.values()) + adapter.parameters
        facts["all_parameters"] = total
        facts["trainable_share"] = f"{adapter.parameters / total:.4%}"
    return facts


def _checkpoint_facts(checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    tensors = [t for _, t in checkpoint.tensors.values()]
    quantised = checkpoint.config.get("quantization_config")
    return {
        "kind": kind,
        "path": str(checkpoint.path),
        "architecture": (checkpoint.config.get("architectures") or [None])[0],
        "model_type": checkpoint.config.get("model_type"),
        "components": {name: _component(part) for name, part in checkpoint.components.items()},
        "quantised": quantised.get("quant_method") if isinstance(quantised, dict) else None,
        "shards": len(checkpoint.shards),
        "tensors": len(tensors),
        "elements": sum(_elements(t) for t in tensors),
        "dtypes": _dtypes(tensors),
        "bytes": checkpoint.nbytes,
        "headers": checkpoint.fingerprint,
    }


def _component(checkpoint: Checkpoint) -> str:
    """One model of a pipeline in a few words."""
    dtypes = _dtypes(t for _, t in checkpoint.tensors.values())
    return f"{plural(len(checkpoint.tensors), 'tensor')}, {size(checkpoint.nbytes)}, {', '.join(dtypes)}"


def _recipe(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    return {
        "merged_by": f"inlay {manifest['inlay']}",
        "base": manifest["base"]["name"],
        "adapters": [f"{a['name']} (weight {a['weight']:g}, {a['digest']})" for a in manifest["adapters"]],
        "settings": manifest["settings"],
        "changed_tensors": len(manifest["tensors"]),
        "plan": manifest["plan"],
    }


def _elements(t: TensorInfo) -> int:
    return t.nbytes * 8 // t.dtype.bits


def _dtypes(tensors: Any) -> dict[str, int]:
    """Elements by stored type."""
    found: Counter[str] = Counter()
    for t in tensors:
        found[t.dtype.name] += _elements(t)
    return dict(found.most_common())


def _value(name: str, value: Any) -> str:
    if name == "bytes":
        return size(value)
    if name in ("trainable_parameters", "all_parameters", "elements"):
        return f"{value:,} ({count(value)})"
    if name == "full_copies" and len(value) > 6:
        return f"{', '.join(value[:6])} … ({plural(len(value), 'tensor')})"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{k} × {v:,}" if isinstance(v, int) else f"{k} = {v}" for k, v in value.items() if v is not None
        )
    if isinstance(value, list):
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)
