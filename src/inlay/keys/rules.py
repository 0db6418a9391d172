"""From the name of a module to the key of its weight, by one rule for a whole adapter.

A checkpoint may be saved with or without the prefix of its headless model: GPT-2's own has `h.0…`, its
model in memory `transformer.h.0…`; an adapter trained on the headless class lacks the prefix that the
checkpoint has. So a rule drops or adds one leading word, at the start of a name and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass

AS_THEY_ARE = "names as they are"


@dataclass(frozen=True)
class Rule:
    """Drop the leading word `drop`, then put `add` in front; each only where it applies."""

    drop: str = ""
    add: str = ""

    def key(self, name: str) -> str:
        """Key for a dotted name."""
        if self.drop and name.startswith(self.drop + "."):
            return name[len(self.drop) + 1 :]
        return f"{self.add}.{name}" if self.add else name

    def __str__(self) -> str:
        if self.drop:
            return f"names without their leading {self.drop!r}"
        return f"names with {self.add!r} in front" if self.add else AS_THEY_ARE


def find_rule(names: Iterable[str], keys: Set[str]) -> Rule:
    """The rule under which most `names` are keys; names as they are win a tie.

    Law: for names that are all keys, the rule is the identity.
    """
    names = list(names)
    best, hits = Rule(), sum(name in keys for name in names)
    if hits == len(names):
        return best
    for rule in _candidates(names, keys):
        found = sum(rule.key(name) in keys for name in names)
        if found > hits:
            best, hits = rule, found
    return best


def _candidates(names: list[str], keys: Set[str]) -> Iterable[Rule]:
    leading = Counter(name.partition(".")[0] for name in names)
    yield from (Rule(drop=word) for word, _ in leading.most_common())
    prefixes = Counter(key.partition(".")[0] for key in keys)
    yield from (Rule(add=word) for word, _ in prefixes.most_common(8))


def near(name: str, keys: Iterable[str]) -> str | None:
    """A key that a reader may have meant: the same layer, or the same ending."""
    tail = name.rsplit(".", 2)
    candidates = [key for key in keys if key.endswith("." + ".".join(tail[-2:]))]
    if not candidates and len(tail) == 3:
        candidates = [key for key in keys if key.startswith(tail[0] + ".")]
    return min(candidates, key=len) if candidates else None
