"""QA-LoRA on a base that keeps its codes: into the zero points, where these can take it.

A row of its delta is constant within a group of columns (`tuners/qalora.py`). Where the groups of the codes lie within
those of the adapter, W = (q − z) · s + Δ is (q − z + Δ / s) · s: codes and scales stay, and the zero point takes the
delta whole, but for its own rounding. That is nothing where zero points are floats (`OFFSET` of a codec names them).
Integers of 2 to 8 bits, as GPTQ, AWQ and compressed-tensors have them, take multiples of s alone, and Δ is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from inlay.checkpoints.decoded import Encoding
from inlay.codecs.table import codec
from inlay.errors import Problem
from inlay.plan.steps import AnyStep, Dense
from inlay.plan.types import Coded, Entry

_ALL_THE_SAME = "; leave --keep_quant out for a result in 16 bits, which is exact, or choose new codes (--scales fresh)"


def has_qalora(entry: Entry) -> bool:
    """Whether QA-LoRA has a part in this weight."""
    return any(_is_qalora(step) for step in entry.steps)


def _is_qalora(step: AnyStep) -> bool:
    return isinstance(step, Dense) and step.tuner == "qalora"


def offset_part(encoding: Encoding) -> str | None:
    """The part of a stored weight that shifts its groups, where it is of floats."""
    return getattr(codec(encoding.codec), "OFFSET", None)


def problems_of(
    entries: Mapping[str, Entry], encodings: Mapping[str, Encoding], keep_16bit: str | None
) -> list[Problem]:
    """Weights with QA-LoRA whose zero points cannot take it, one problem for each reason."""
    by_reason: dict[str, list[str]] = {}
    for key, encoding in encodings.items():
        freed = keep_16bit is not None and re.search(keep_16bit, encoding.stem.removesuffix(".weight"))
        if has_qalora(entries[key]) and not freed and (reason := why_not(entries[key], encoding)):
            by_reason.setdefault(reason, []).append(key)
    more = {reason: f" and {len(keys) - 1} more" if len(keys) > 1 else "" for reason, keys in by_reason.items()}
    return [Problem(keys[0] + more[reason], reason) for reason, keys in by_reason.items()]


def notes_of(entries: Iterable[Entry | Coded]) -> list[str]:
    """How many weights take their adapters into the zero points, if any do."""
    taken = [e for e in entries if isinstance(e, Coded) and has_qalora(e.weight) and _codes_of(e) in e.kept]
    return [f"QALoRA goes into the zero points of {len(taken)} weights, whose codes and scales stay"] if taken else []


def _codes_of(part: Coded) -> str:
    return str(next(iter(codec(part.codec).PARTS)))


def why_not(entry: Entry, encoding: Encoding) -> str | None:
    """Why the zero points of this weight cannot take the deltas of all its steps."""
    if offset_part(encoding) is None:
        return (
            f"QALoRA adds a constant to each group of columns, which the zero points of {encoding.codec} cannot take: "
            f"they are integers, and the constant is no multiple of the scale{_ALL_THE_SAME}"
        )
    if entry.patches or not all(_is_qalora(step) for step in entry.steps):
        return f"QALoRA goes into the zero points, and another adapter changes this weight too{_ALL_THE_SAME}"
    size = codec(encoding.codec).shifted_together(encoding.settings)
    for step in entry.steps:
        assert isinstance(step, Dense), f"{entry.key}: {step}"
        group = step.settings["group"]
        if step.transposed or not size or group % size:
            have = f"of {size} columns" if size else "that do not lie along a row"
            return (
                f"QALoRA's groups of {group} columns are not made of whole groups of the codes, {have}{_ALL_THE_SAME}"
            )
    return None
