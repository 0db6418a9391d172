"""Errors that a user can cause, and can do something about.

InlayError
├── InputError (ValueError)        what was given cannot be used; exit code 2
│   ├── CheckpointError            a base or merged directory
│   ├── AdapterError               an adapter directory
│   ├── PlanError                  parts that do not fit together: all problems at once
│   └── OutputError (OSError)      the place to write to
└── CheckFailed                    a verification that found a difference; exit code 1

Every message says what happened, where, and what to do. Anything else that is raised is a bug and
keeps its traceback. All of them can be pickled, because workers raise them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class InlayError(Exception):
    """Base of everything a command reports in one message instead of a traceback."""


class InputError(InlayError, ValueError):
    """A request that cannot be met."""


class CheckpointError(InputError):
    """A base or merged checkpoint that cannot be read."""


class AdapterError(InputError):
    """An adapter that cannot be read or understood."""


class OutputError(InputError, OSError):
    """A destination that cannot be written."""

    def __str__(self) -> str:
        return str(self.args[0])


class CheckFailed(InlayError):
    """A check that found a difference."""


@dataclass(frozen=True)
class Problem:
    """One reason why a plan cannot be made: where it is, what is wrong."""

    where: str
    what: str


SHOWN_PROBLEMS = 10


class PlanError(InputError):
    """Everything that is wrong with a request, gathered before a byte is written."""

    def __init__(self, problems: Sequence[Problem], hints: Sequence[str] = ()) -> None:
        super().__init__(tuple(problems), tuple(hints))
        self.problems = tuple(problems)
        self.hints = tuple(hints)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"cannot merge ({count} problem{'s' if count != 1 else ''}, nothing was written)"]
        shown = self.problems[:SHOWN_PROBLEMS]
        width = min(48, max((len(p.where) for p in shown), default=0))
        lines += [f"  {p.where:<{width}}  {p.what}" for p in shown]
        if count > len(shown):
            lines.append(f"  … and {count - len(shown)} more")
        lines += [f"  {hint}" for hint in self.hints]
        return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """What another library's error says, shortened to a line; its name where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]:.300}"
