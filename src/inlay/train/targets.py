"""What to train, as names of the modules of the model at hand.

    all-linear      every linear layer but the head
    attention       those that read other tokens: below a module whose `forward` takes a mask or positions
    mlp             the rest of each block
    all-embedding   the embeddings

A preset is told by what the modules are and how they are nested, not by their names, so it holds for any
architecture. In a model of several modes it reaches only the parts that are not frozen:

    text      the sub-model that the text config describes, and a model without sub-models
    vision    blocks of the other sub-models (images, video, sound)
    aligner   what stands between: projectors, mergers

Any other word is a module, by its name or the end of it, as PEFT reads `target_modules`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from inlay.errors import InputError

TEXT, VISION, ALIGNER = "text", "vision", "aligner"
PRESETS = ("all-linear", "attention", "mlp", "all-embedding")
# Arguments by which a module shows that it reads other tokens than its own.
SEES_OTHERS = frozenset(
    {
        "attention_mask", "position_embeddings", "position_ids", "past_key_values", "past_key_value", "layer_past",
        "cu_seqlens", "cache_params", "alibi", "rotary_pos_emb",
    }
)  # fmt: skip
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


class Anatomy:
    """The modules of a model: which are linear, where they belong, what they do."""

    def __init__(self, model: Any) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        self.model = model
        self.modules: dict[str, Any] = {name: m for name, m in model.named_modules() if name}
        self._linear = (torch.nn.Linear, Conv1D)
        self._embedding = torch.nn.Embedding
        self._fused_attention = torch.nn.MultiheadAttention
        self._lists = (torch.nn.ModuleList, torch.nn.Sequential)

    @cached_property
    def linear(self) -> tuple[str, ...]:
        """Linear layers, but those that a MultiheadAttention holds: it reads their weights and never calls them."""
        hidden = tuple(f"{name}." for name, m in self.modules.items() if isinstance(m, self._fused_attention))
        return tuple(n for n, m in self.modules.items() if isinstance(m, self._linear) and not n.startswith(hidden))

    @cached_property
    def embeddings(self) -> tuple[str, ...]:
        return tuple(name for name, m in self.modules.items() if isinstance(m, self._embedding))

    @cached_property
    def head(self) -> str | None:
        """Name of the layer that makes words, or labels, of the last state."""
        head = self.model.get_output_embeddings()
        if head is None:
            return next((name for name in ("score", "classifier") if name in self.modules), None)
        return next(name for name, m in self.modules.items() if m is head)

    @cached_property
    def _parts(self) -> dict[str, str]:
        """Name of a sub-model -> the part it is; empty where the model is one of text alone."""
        from transformers import PreTrainedModel

        config = self.model.config
        text = config.get_text_config(decoder=True)
        if text is config:
            return {}
        others = [c for key in config.sub_configs if (c := getattr(config, key, None)) not in (None, text)]
        found: dict[str, str] = {}
        for name, module in self.modules.items():
            if not isinstance(module, PreTrainedModel) or any(name.startswith(f"{outer}.") for outer in found):
                continue
            if type(module.config) is type(text):
                found[name] = TEXT
            elif any(type(module.config) is type(other) for other in others):
                found[name] = VISION
        return found

    def part(self, name: str) -> str:
        """TEXT, VISION or ALIGNER."""
        if not self._parts or name == self.head:
            return TEXT
        outer = next((outer for outer in self._parts if name == outer or name.startswith(f"{outer}.")), None)
        if outer is None:
            return ALIGNER
        if self._parts[outer] == TEXT:
            return TEXT
        block = self.block(name)
        around = block or ".".join(name.split(".")[: outer.count(".") + 2])  # or the sub-model's own child
        if any(self._mixes(n) for n in self.modules if n == around or n.startswith(f"{around}.")):
            return VISION
        return VISION if block is None and "embed" in name.removeprefix(outer) else ALIGNER

    def block(self, name: str) -> str | None:
        """The outermost element of a list that holds the module: a layer of the network."""
        for above in _above(name):
            if isinstance(self.modules.get(above.rpartition(".")[0]), self._lists):
                return above
        return None

    def role(self, name: str) -> str | None:
        """`attention` or `mlp` for a layer inside a block, None elsewhere."""
        block = self.block(name)
        if block is None:
            return None
        inner = [above for above in _above(name) if len(block) < len(above) < len(name)]
        return "attention" if any(map(self._mixes, inner)) else "mlp"

    def _mixes(self, name: str) -> bool:
        """Whether the module lets tokens see each other."""
        module = self.modules[name]
        if isinstance(module, (*self._linear, self._embedding, *self._lists)):
            return False
        seen = SEES_OTHERS & inspect.signature(module.forward).parameters.keys()
        return bool(seen) or "attention" in type(module).__name__.lower()

    @cached_property
    def stacks(self) -> tuple[str, ...]:
        """Parameters that hold the matrices of many experts, which no linear layer stands for."""
        return tuple(
            name for name, p in self.model.named_parameters()
            if p.dim() == 3 and ".experts." in f".{name}"
        )  # fmt: skip


def _above(name: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    words = name.split(".")
    return (".".join(words[:end]) for end in range(1, len(words) + 1))


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
    found -= _within(found, saved)  # what is trained whole needs no adapter
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
            names = _by_suffix(anatomy.modules, word)
        if word.startswith("all-"):
            names = {name for name in names if anatomy.part(name) not in asked.frozen}
        if not names:
            raise InputError(f"--modules_to_save {word}: {type(anatomy.model).__name__} has no module of this name")
        found |= names
    return found


def _within(names: Collection[str], outer: Collection[str]) -> set[str]:
    return {name for name in names if any(above in outer for above in _above(name))}


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
    found = _by_suffix(anatomy.modules, word)
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
            out = {name for name in found if _ends_with(name, word) or _fits(word, name)}
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
    if not _by_suffix(names, word):
        ends = sorted({".".join(name.split(".")[-3:]) for name in names})
        near = difflib.get_close_matches(word, ends, NEAR, 0.3)
        raise InputError(f"--target_parameters {word}: the model has no such parameter; near it are {', '.join(near)}")
    return word


def shortest(
    names: Collection[str], modules: Sequence[str], reaches: Callable[[str, str], bool] | None = None
) -> tuple[str, ...]:
    """The shortest ends of names that reach these modules and no other of `names`; at worst the names themselves.

    `reaches(name, end)` says whether an end reaches a name: whole words do, unless told otherwise (PEFT's
    `modules_to_save` also takes `norm` for the end of `input_layernorm`).
    """
    reaches = reaches or _ends_with
    wanted, suffixes = set(modules), set()
    for name in modules:
        words = name.split(".")
        for start in range(len(words) - 1, -1, -1):
            suffix = ".".join(words[start:])
            if _is_number(words[start]):
                continue  # "3.q_proj" alone would say less than it seems to
            if wanted.issuperset(n for n in names if reaches(n, suffix)):
                break
        suffixes.add(suffix)
    return tuple(sorted(suffixes))


def _is_number(word: str) -> bool:
    return word.isdecimal()


def _by_suffix(names: Collection[str], suffix: str) -> set[str]:
    return {name for name in names if _ends_with(name, suffix)}


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


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
