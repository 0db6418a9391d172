"""What to train, as names of the modules of the model at hand.

    all-linear      every linear layer but the head
    attention       those that read other tokens: below a module whose `forward` takes a mask or positions
    mlp             the rest of each block
    all-embedding   the embeddings

A preset is told by what the modules are and how they are nested, not by their names, so it holds for any
architecture; in a model of several modes it reaches only the parts that are not frozen. Any other word is a module, by
its name or the end of it, as PEFT reads `target_modules`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inlay.errors import InputError
from inlay.train.anatomy import ALIGNER, TEXT, VISION, Anatomy
from inlay.train.names import by_suffix, ends_with, shortest, within

PRESETS = ("all-linear", "attention", "mlp", "all-embedding")
NEAR = 5


@dataclass(frozen=True)
class Targets:
    """The modules to train (full names); modules, bare parameters and modules to train as full copies, by what PEFT's
    config calls them."""

    modules: tuple[str, ...]
    listed: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """The words of the command line that choose what to train."""

    modules: tuple[str, ...] = ("all-linear",)
    regex: str | None = None
    parameters: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset({VISION, ALIGNER})


def resolve(model: Any, asked: Asked, kinds: Collection[str] = ("linear", "embedding")) -> Targets:
    """The modules that `asked` reaches in `model`; `kinds` are those that the method can train.

    Raises InputError for a word or pattern that reaches nothing, with near names.
    """
    anatomy = Anatomy(model)
    if asked.regex is not None:
        found = _by_regex(anatomy, asked.regex)
    elif asked.parameters and asked.modules == ("all-linear",):
        found = set()  # bare parameters alone, unless modules are named too
    else:
        found = set().union(*(_reached(anatomy, word, asked.frozen) for word in asked.modules))
    found -= _excluded(anatomy, asked.excluded, found)
    saved = _saved(anatomy, asked)
    found -= within(found, saved)  # what is trained whole needs no adapter
    _check_kinds(anatomy, found, kinds)
    parameters = tuple(_parameter(model, name) for name in asked.parameters)
    if not found and not parameters:
        raise InputError(
            "nothing is left to train: --exclude_modules and --modules_to_save take away all that was targeted"
        )
    modules = tuple(name for name in anatomy.modules if name in found)
    return Targets(
        modules,
        shortest(anatomy.modules, modules),
        parameters,
        shortest(anatomy.modules, sorted(saved), str.endswith),
        _notes(anatomy, asked, modules, parameters),
    )


def _saved(anatomy: Anatomy, asked: Asked) -> set[str]:
    """Modules that are trained as full copies."""
    found: set[str] = set()
    for word in asked.saved:
        if word == "all-embedding":
            names = {*anatomy.embeddings, *([anatomy.head] if anatomy.head else [])}
        elif word == "all-norm":
            names = {name for name, m in anatomy.modules.items() if "norm" in type(m).__name__.lower()}
        else:
            names = by_suffix(anatomy.modules, word)
        if word.startswith("all-"):
            names = {name for name in names if anatomy.part(name) not in asked.frozen}
        if not names:
            raise InputError(f"--modules_to_save {word}: {type(anatomy.model).__name__} has no module of this name")
        found |= names
    return found


def check_read(model: Any, targets: Targets) -> Targets:
    """The targets, with a note on those that rows of text never pass. Raises InputError where there are no others."""
    anatomy = Anatomy(model)
    parts = [anatomy.part(name) for name in targets.modules]
    aside = [part for part in parts if part != TEXT]
    if not aside:
        return targets
    what = f"{len(aside)} targets lie in the {' and '.join(sorted(set(aside)))} part, which rows of text never pass"
    if len(aside) == len(parts) and not targets.parameters:
        raise InputError(f"{what}: nothing could be learned; leave out --freeze_llm, or target layers of the text part")
    return replace(targets, notes=(*targets.notes, f"warning: {what}; they stay as they are"))


def _reached(anatomy: Anatomy, word: str, frozen: frozenset[str]) -> set[str]:
    if word not in PRESETS:
        return _by_name(anatomy, word)
    pool = anatomy.embeddings if word == "all-embedding" else anatomy.linear
    free = [name for name in pool if name != anatomy.head and anatomy.part(name) not in frozen]
    found = {name for name in free if word.startswith("all-") or anatomy.role(name) == word}
    if not found:
        frozen_here = sorted({anatomy.part(name) for name in pool} & frozen)
        where = f" outside of what is frozen ({', '.join(frozen_here)})" if frozen_here else ""
        stacks = _stacks(anatomy, frozen)
        cure = f"; its experts are bare tensors: --target_parameters {' '.join(stacks)}" if stacks else ""
        raise InputError(f"--target_modules {word}: {type(anatomy.model).__name__} has no such layers{where}{cure}")
    return found


def _by_name(anatomy: Anatomy, word: str) -> set[str]:
    found = by_suffix(anatomy.modules, word)
    if found:
        return found
    ends = {name.rpartition(".")[2] for name in (*anatomy.linear, *anatomy.embeddings)}
    near = difflib.get_close_matches(word, [*sorted(ends), *PRESETS], NEAR, 0.4) or sorted(ends)
    raise InputError(
        f"--target_modules {word}: {type(anatomy.model).__name__} has no module of this name; near it are "
        f"{', '.join(near)} (or {', '.join(PRESETS)})"
    )


def _by_regex(anatomy: Anatomy, pattern: str) -> set[str]:
    """As PEFT matches: the whole name. Of modules that hold others, only the layers count."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--target_regex {pattern}: is not a regular expression ({error})") from None
    found = {name for name in (*anatomy.linear, *anatomy.embeddings) if compiled.fullmatch(name)}
    if not found:
        some = ", ".join(anatomy.linear[:3])
        raise InputError(f"--target_regex {pattern}: matches the whole name of no layer; names are as {some}")
    return found


def _excluded(anatomy: Anatomy, words: Sequence[str], found: set[str]) -> set[str]:
    """Those of `found` that a word takes away: a preset, a name, the end of one, or a pattern for the whole name."""
    gone: set[str] = set()
    for word in words:
        if word in PRESETS:
            out = {name for name in found if name in _reached(anatomy, word, frozenset())}
        else:
            out = {name for name in found if ends_with(name, word) or _fits(word, name)}
        if not out:
            raise InputError(f"--exclude_modules {word}: takes away nothing of what is targeted")
        gone |= out
    return gone


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _check_kinds(anatomy: Anatomy, found: set[str], kinds: Collection[str]) -> None:
    """Each target is a layer that the method can train."""
    able = {"linear": anatomy.linear, "embedding": anatomy.embeddings}
    layers = {name for kind in kinds for name in able[kind]}
    for name in sorted(found - layers):
        inner = [layer for layer in anatomy.linear if layer.startswith(f"{name}.")][:NEAR]
        what = f"a {type(anatomy.modules[name]).__name__}, which this method cannot train"
        cure = f"; name layers of it: {', '.join(inner)}" if inner else ""
        raise InputError(f"--target_modules: {name} is {what}{cure}")


def _parameter(model: Any, word: str) -> str:
    """`word`, where it is the end of the name of a parameter."""
    names = [name for name, _ in model.named_parameters()]
    if not by_suffix(names, word):
        ends = sorted({".".join(name.split(".")[-3:]) for name in names})
        near = difflib.get_close_matches(word, ends, NEAR, 0.3)
        raise InputError(f"--target_parameters {word}: the model has no such parameter; near it are {', '.join(near)}")
    return word


def _stacks(anatomy: Anatomy, frozen: frozenset[str]) -> list[str]:
    """What `--target_parameters` calls the experts."""
    free = [name for name in anatomy.stacks if anatomy.part(name) not in frozen]
    return sorted({".".join(name.split(".")[-3:]) for name in free})


def _notes(anatomy: Anatomy, asked: Asked, modules: Sequence[str], parameters: Sequence[str]) -> tuple[str, ...]:
    if parameters or asked.regex or not {"all-linear", "mlp"} & set(asked.modules):
        return ()
    stacks = _stacks(anatomy, asked.frozen)
    if not stacks or not modules:
        return ()
    return (
        f"{len(anatomy.stacks)} tensors of experts are no linear layers and stay as they are; to train them too: "
        f"--target_parameters {' '.join(stacks)}",
    )
