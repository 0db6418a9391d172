"""What speaks against a plan beyond single tensors: the adapters as they are, the base as it is, the vocabulary."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from inlay.adapters.adapter import Adapter
from inlay.adapters.values import scan_values
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.spans import BASE
from inlay.errors import Problem
from inlay.keys import families
from inlay.keys.rules import AS_THEY_ARE
from inlay.plan import experts, sidecars
from inlay.plan.placer import Contribution
from inlay.plan.types import Entry, Settings
from inlay.records.fingerprint import tokenizer_digest
from inlay.tuners import dense

SHIFTED = {
    "pissa": "its largest singular components",
    "olora": "the first columns of its QR factorisation",
    "kasa": "its smallest singular components",
}


@dataclass
class Findings:
    """Problems stop a plan, with hints on them; warnings and notes go along with it."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def check_adapters(base: Checkpoint, contributions: Sequence[Contribution], findings: Findings) -> None:
    """The problems of each adapter, and what is remarkable about it."""
    for found in contributions:
        findings.problems += found.problems
        findings.problems += _copied_experts(base, found)
        _check_values(found, findings)
        findings.warnings += _missing_targets(found) + _missing_parameters(found)
        if head := found.adapter.value_head:
            findings.warnings.append(
                f"{found.adapter.name}: {head}, the value head of a reward model, is not merged: the base has no such "
                "layer; load it beside the merged model"
            )
        if not found.keys and not found.problems:
            findings.problems.append(Problem(found.adapter.name, _nothing(found)))
        findings.hints += _hints(base, found) if found.problems else []
        findings.notes += _notes(found)


def _copied_experts(base: Checkpoint, found: Contribution) -> list[Problem]:
    """Full copies of experts that are one tensor in memory, and on disk a tensor each: no model would read them."""
    return [
        Problem(
            key,
            "a full copy of experts (modules_to_save) as they are in memory, and the base has them in other tensors; "
            "this is not supported. Train them as target_parameters",
        )
        for key in sorted(found.copies)
        if ".experts." in key and key not in base.tensors
    ]


def _nothing(found: Contribution) -> str:
    """Why an adapter without parts of any module cannot be merged."""
    config = found.adapter.config
    if not found.adapter.shared or config.peft_type not in dense.FILES:
        return "has no tensors"
    why = getattr(dense.tuner(config.tuner), "MISSING", "")
    return f"has no parts of any module; {why}" if why else "has no parts of any module"


def _hints(base: Checkpoint, found: Contribution) -> list[str]:
    hints = []
    named = found.adapter.base_model
    if named and os.path.realpath(named) != os.path.realpath(base.path):
        hints.append(f"{found.adapter.name} names {named} as its base; this is {base.path}.")
    elif found.adapter.fingerprint:
        hints.append(f"{found.adapter.name} was trained on {base.path}; {since_training(base, found.adapter)}.")
    if found.hint:
        hints.append(f"Other names than those of the files were not looked for: {found.hint}.")
    return hints


def since_training(base: Checkpoint, adapter: Adapter) -> str:
    """What the adapter's record tells of how this base differs from the one that it was trained on: its headers."""
    if adapter.fingerprint["headers"] == base.fingerprint:
        return "names, types and shapes of its tensors are as they were then"
    touched = adapter.fingerprint["tensors"]
    gone = sorted(key for key in touched if key not in base.on_disk.tensors)
    if not gone:
        return "names, types or shapes of its tensors are others now, though it still has all that the adapter changes"
    return f"{len(gone)} of the {len(touched)} tensors that the adapter changes are not there now, such as {gone[0]}"


def _notes(found: Contribution) -> list[str]:
    name, notes = found.adapter.name, []
    if found.adapter.unused:
        notes.append(f"{name}: not used, being repeated: {', '.join(found.adapter.unused[:4])}")
    if found.adapter.config.variant in SHIFTED:
        notes.append(
            f"{name}: trained on the base without {SHIFTED[found.adapter.config.variant]}; it is computed again"
        )
    if said := _remark(found):
        notes.append(f"{name}: {said}")
    if found.rule != AS_THEY_ARE:
        notes.append(f"{name}: {found.rule}")
    return notes


def _remark(found: Contribution) -> str | None:
    """What the file of the tuner has to say of such a config."""
    config = found.adapter.config
    file = dense.tuner(config.tuner) if config.peft_type in dense.FILES else None
    return str(said) if hasattr(file, "remark") and (said := file.remark(config.raw)) else None  # type: ignore[union-attr]


def _check_values(found: Contribution, findings: Findings) -> None:
    values = scan_values(found.adapter)
    findings.problems += [Problem(key, f"NaN or Inf in adapter {found.adapter.name}") for key in values.nonfinite]
    if found.adapter.config.peft_type != "LORA":
        return
    parts = [(name, t) for module in found.adapter.parts.values() for name, t in module.items()]
    acting = [t.key for name, t in parts if name not in ("lora_A", "lora_embedding_A")]
    if acting and set(acting) <= set(values.zero) and not found.adapter.full:  # a full copy of zeros does something
        findings.warnings.append(f"{found.adapter.name} is zero everywhere: the merged weights equal the base")


def _missing_targets(found: Contribution) -> list[str]:
    """Modules that the config lists and the file has nothing for: the training saved less than it should have."""
    listed = found.adapter.config.raw.get("target_modules")
    excluded = found.adapter.config.raw.get("exclude_modules") or []
    modules = [*found.adapter.parts, *(name.rpartition(".")[0] for name in found.adapter.full)]
    return [
        f"{found.adapter.name}: target_modules lists {name!r}, the file has nothing for it"
        for name in (listed if isinstance(listed, list) else [])
        if isinstance(name, str) and not _names_any(name, modules) and not _is_excluded(name, excluded)
    ]


def _names_any(name: str, modules: Iterable[str]) -> bool:
    return any(m == name or m.endswith("." + name) for m in modules)


def _is_excluded(module: str, excluded: str | Sequence[str]) -> bool:
    """Whether `exclude_modules` takes this module out, by PEFT's rule: a pattern for the whole name, or last words."""
    if isinstance(excluded, str):
        return re.fullmatch(excluded, module) is not None
    return any(_names_any(name, [module]) for name in excluded)


def _missing_parameters(found: Contribution) -> list[str]:
    """Bare parameters that the config lists and the file has no pair for; PEFT (0.21) loads it without a word."""
    return [
        f"{found.adapter.name}: target_parameters lists {target!r}, the file has nothing for it"
        for target in found.adapter.config.target_parameters
        if not any(experts.names(target, parameter) for parameter in found.parameters)
    ]


def check_base(base: Checkpoint, adapters: Sequence[Adapter], findings: Findings) -> None:
    """Whether this is the base that the adapters were trained on."""
    for i, adapter in enumerate(adapters):
        recorded = adapter.fingerprint.get("headers")
        if recorded and recorded != base.fingerprint:
            what = (
                f"was trained on another base: recorded {recorded}, this one is {base.fingerprint}; "
                f"{since_training(base, adapter)}"
            )
            findings.problems.append(Problem(adapter.name, what))
        if (tokens := adapter.fingerprint.get("tokenizer")) and tokens != tokenizer_digest(base.path):
            findings.warnings.append(
                f"{adapter.name} was trained with another tokenizer than the one of this base; where its tokens "
                "differ, the result will not say what was learned"
            )
        if adapters[:i] and adapter.digest in {a.digest for a in adapters[:i]}:
            findings.warnings.append(f"{adapter.name} is given twice: it counts twice")


def check_pipeline(base: Checkpoint, settings: Settings, findings: Findings) -> Settings:
    """What cannot be done with a diffusers pipeline; the settings without it, to plan on for further problems."""
    where = str(base.path)
    if settings.max_shard_bytes is not None:
        what = "is a diffusers pipeline, whose components keep their files; leave max_shard_size out"
        findings.problems.append(Problem(where, what))
    if settings.quant:
        asked = ", ".join(f"{name} = {value}" for name, value in settings.quant.items())
        findings.problems.append(
            Problem(where, f"is a diffusers pipeline, which is not quantised ({asked}); leave it out")
        )
    coded = [name for name, part in base.components.items() if part.config.get("quantization_config")]
    if settings.dtype and coded:
        what = f"{', '.join(coded)} holds codes, whose scales keep their type; leave torch_dtype out"
        findings.problems.append(Problem(where, what))
    return replace(settings, max_shard_bytes=None, quant={}, dtype=None if coded else settings.dtype)


def vocabulary(base: Checkpoint, entries: Mapping[str, Entry], problems: list[Problem]) -> int | None:
    """The new number of rows of embedding and head, if an adapter changes it; both must agree."""
    sizes = {}
    for key, entry in entries.items():
        if entry.shape and (key in families.HEADS or families.is_embedding(key.removesuffix(".weight"))):
            before = base.tensors[key][1].shape if key in base.tensors else entry.source.shape
            sizes[key] = (before[0], entry.shape[0])
    vocab_size = families.text_config(base.config)[1].get("vocab_size")
    changed = {key: after for key, (before, after) in sizes.items() if before != after}
    if not changed:
        return None
    rows = max(changed.values())
    for key, (rows_before, rows_after) in sizes.items():
        if rows_after != rows and (rows_before == vocab_size or key in changed):
            what = f"has {rows_after} rows and would not fit {max(changed)}, which has {rows}"
            cure = "the adapter must bring both (PEFT: save_embedding_layers=True)"
            problems.append(Problem(key, f"{what}; {cure}"))
    return rows if rows != vocab_size else None


def new_head(base: Checkpoint, adapters: Sequence[Adapter], entries: Mapping[str, Entry]) -> tuple[str, int] | None:
    """Task and number of labels of a head that an adapter brings to a base without one."""
    tasks = [a.config.task_type for a in adapters if a.config.task_type in sidecars.HEAD_CLASSES]
    heads = [e for k, e in entries.items() if k not in base.tensors and len(e.shape) == 2 and e.source.root != BASE]
    return (tasks[-1], min(e.shape[0] for e in heads)) if tasks and heads else None
