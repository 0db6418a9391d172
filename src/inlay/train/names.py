"""Dotted names of modules, and the ends of them that PEFT's configs list."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence


def prefixes(name: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    words = name.split(".")
    return (".".join(words[:end]) for end in range(1, len(words) + 1))


def by_suffix(names: Collection[str], suffix: str) -> set[str]:
    """Those of `names` that end with the words of `suffix`."""
    return {name for name in names if ends_with(name, suffix)}


def ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def within(names: Collection[str], outer: Collection[str]) -> set[str]:
    """Those of `names` that are in `outer`, or below a name that is."""
    return {name for name in names if any(above in outer for above in prefixes(name))}


def shortest(
    names: Collection[str], modules: Sequence[str], reaches: Callable[[str, str], bool] | None = None
) -> tuple[str, ...]:
    """The shortest ends of names that reach these modules and no other of `names`; at worst the names themselves.

    `reaches(name, end)` says whether an end reaches a name: whole words do, unless told otherwise (PEFT's
    `modules_to_save` also takes `norm` for the end of `input_layernorm`).
    """
    reaches = reaches or ends_with
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
