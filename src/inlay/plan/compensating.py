"""`--compensate adapter` in a plan: which weights have their codes chosen so, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable

from inlay.codecs.compensation import bits_of
from inlay.errors import Problem
from inlay.plan.types import Coded, Entry

WAYS = ("adapter",)


def applies(weight: Entry) -> bool:
    """Whether a weight has a delta to the base's own codes."""
    made = weight.source.made
    return bool(weight.steps) and not weight.patches and made is not None and made.formula == "codec"


def request_problem(compensate: str | None, keep: bool, scales: str | None) -> Problem | None:
    """What cannot be meant, whatever the tensors are."""
    if compensate is None:
        return None
    if compensate not in WAYS:
        return Problem("compensate", f"{compensate!r} is not {' or '.join(WAYS)}")
    if not keep:
        return Problem("compensate", "chooses codes on the base's own scales; it is for --keep_quant true")
    if scales == "fresh":
        return Problem("compensate", "chooses codes on the stored scales; leave --scales fresh out")
    return None


def problems_of(entries: Iterable[Entry | Coded]) -> list[Problem]:
    """One problem for each form whose codes cannot be chosen so."""
    by_form: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, Coded) and entry.compensate and bits_of(entry.codec, entry.settings) is None:
            by_form.setdefault(entry.codec, []).append(entry.key)
    what = (
        "is stored in a form of {} whose codes are not chosen by --compensate adapter: it is for codes of 2 and 4 bits "
        "of GPTQ, AWQ, compressed-tensors (pack-quantized), nf4, fp4, HQQ and MLX; leave it out, or keep this module "
        "in 16 bits (--keep_16bit)"
    )
    more = {form: f" and {len(keys) - 1} more" if len(keys) > 1 else "" for form, keys in by_form.items()}
    return [Problem(keys[0] + more[form], what.format(form)) for form, keys in by_form.items()]


def notes_of(entries: Iterable[Entry | Coded]) -> list[str]:
    """How many weights have their codes chosen so."""
    keys = {e.weight.key for e in entries if isinstance(e, Coded) and e.compensate}
    if not keys:
        return []
    return [f"compensate adapter: codes of {len(keys)} weights are chosen to hold each row's whole delta"]
