"""Where a name of the model in memory lies on disk: by name alone, else through transformers' own tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol

from inlay.errors import InputError
from inlay.keys.memory import MemoryLayout, Slice, memory_layout
from inlay.keys.rules import find_rule, near
from inlay.keys.stacks import names_stack, stacked_experts


class KeyRule(Protocol):
    """From a name to a key, without looking further; its text says how."""

    def key(self, name: str) -> str: ...


class Names:
    """Finds tensors of one checkpoint for one adapter.

    `names` are those that the adapter has for sure; they decide the rule. The tables of transformers are
    looked at only when a name is not found without them, since importing it takes seconds.
    """

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> None:
        self.config = config
        self.shapes = shapes
        self.rule: KeyRule = find_rule(names, shapes.keys())
        self.used_layout = False
        self.unavailable = ""  # why the tables of transformers could not help

    @cached_property
    def layout(self) -> MemoryLayout | None:
        """The class in memory; None where transformers is missing or does not know it."""
        try:
            found = memory_layout(self.config, self.shapes)
        except InputError as error:
            self.unavailable = str(error)
            return None
        if found is None:
            self.unavailable = f"transformers does not know the class {self.config.get('architectures')}"
        return found

    @cached_property
    def _stacks(self) -> MemoryLayout | None:
        return stacked_experts(self.config, self.shapes)

    def layout_of(self, targets: Iterable[str]) -> MemoryLayout | None:
        """A layout with all bare parameters that `targets` can name: the declared one, if that has them."""
        declared = self._stacks
        if declared is not None and all(names_stack(target) for target in targets):
            return declared
        return self.layout

    def key(self, name: str) -> str:
        """Key of a tensor: the base's where one tensor is meant, else the name under the rule (a new key)."""
        key = self.rule.key(name)
        if key in self.shapes:
            return key
        found = self.slices(name)
        return found[0].key if len(found) == 1 and self.is_same(name, found[0]) else key

    def slices(self, name: str) -> tuple[Slice, ...]:
        """The tensors that hold a parameter in memory; empty where it is not known."""
        if self.layout is None:
            return ()
        found = self.layout.slices.get(name, ())
        self.used_layout = self.used_layout or bool(found)
        return found

    def is_same(self, name: str, part: Slice) -> bool:
        """Whether the tensor on disk is the parameter in memory, as it is."""
        assert self.layout is not None
        return (
            part.expert is None
            and not part.transposed
            and self.shapes[part.key] == self.layout.shapes[name]
            and part.disk_rows == (0, self.shapes[part.key][0] if self.shapes[part.key] else 1)
        )

    def why_not(self, name: str) -> str:
        """Why a name reaches nothing, and what to do."""
        key = self.rule.key(name)
        if self.layout is not None and name in self.layout.refused:
            return f"is not one range of rows on disk: {self.layout.refused[name]}"
        close = near(key, self.shapes)
        return f"reaches nothing: the base has no {key}" + (f"; near: {close}" if close else "")
