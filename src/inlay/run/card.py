"""The model card of a merged directory: what it is, how it was made, how to check it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from inlay.checkpoints.spans import BASE
from inlay.plan.types import Plan

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
# Lines of the base's metadata that stay true of a model merged from it.
_KEPT = re.compile(
    r"^(?:license|license_name|license_link|language|pipeline_tag|library_name):.*(?:\n(?:- |[ \t]).*)*", re.MULTILINE
)


def model_card(plan: Plan) -> str:
    """Markdown with the metadata that model hubs read."""
    named = plan.adapters[0].base_model if plan.adapters else None
    local = named is None or Path(named).is_absolute() or named.startswith((".", "~"))
    base = Path(named or plan.base_name).name if local else named
    title = " + ".join([Path(plan.base_name).name, *(a.name for a in plan.adapters)])
    rows = "\n".join(
        f"| {a.name} | {a.tuner} | {', '.join(map(str, a.rank))} | {', '.join(f'{s:g}' for s in a.scaling)} "
        f"| {a.weight:g} | {a.modules} | `{a.digest}` |"
        for a in plan.adapters
    )
    share = plan.cost.touched_parameters / max(1, plan.cost.parameters)
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
base_model_relation: finetune
tags:
- inlay
- merged-lora
{_kept_metadata(plan)}---

# {title}

An ordinary checkpoint: the base with its adapters merged in. {share:.1%} of the parameters differ from the base.

| adapter | method | rank | scaling | weight | modules | digest |
|---|---|---|---|---|---|---|
{rows}

{_how(plan)}; every
other tensor is the base's, byte for byte. `inlay.json` holds the recipe and the digests. To check:

```
inlay verify --model BASE --adapters ADAPTER … --merged THIS_DIRECTORY
```
"""


def _how(plan: Plan) -> str:
    """What a merged weight is."""
    if all(a.tuner == "lora" for a in plan.adapters):
        return "Every merged weight is `base + Σ scaling · weight · B A` in exact arithmetic, rounded once to its type"
    return "Every merged weight is what its adapters' methods make of the base, in float64 or better, rounded once"


def _kept_metadata(plan: Plan) -> str:
    """License and language lines from the base's own card."""
    path = plan.roots[BASE] / "README.md"
    if not path.is_file():
        return ""
    found = _FRONT_MATTER.match(path.read_text("utf-8", errors="replace"))
    return "".join(f"{m.group(0)}\n" for m in _KEPT.finditer(found.group(1))) if found else ""
