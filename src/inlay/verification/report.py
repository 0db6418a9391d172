"""What a verification found, tensor by tensor and file by file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Verdicts on a tensor, from best to worst.
BASE = "base"  # untouched, and the base's bytes (or its values in another type)
EXACT = "exact"  # base + adapters, every element correctly rounded
ENCODED = "encoded"  # base + adapters, in the nearest codes
ROUNDED = "rounded"  # base + adapters, off by roundings
UNMERGED = "unmerged"  # should be base + adapters, is the base
CHANGED = "changed"  # should be the base, is not
WRONG = "wrong"  # should be base + adapters, is something else
MISSING = "missing"  # not there
EXTRA = "extra"  # there, and neither in the base nor in an adapter
GOOD = (BASE, EXACT, ENCODED)


@dataclass(frozen=True)
class TensorVerdict:
    """One tensor: what it is, how many of the elements looked at are off, by how many units in the last place."""

    key: str
    verdict: str
    checked: int = 0
    off: int = 0
    max_ulps: int = 0
    cause: str = ""


@dataclass(frozen=True)
class FileVerdict:
    """A file that is not as it should be."""

    file: str
    what: str


@dataclass(frozen=True)
class Report:
    """The whole verification. `sampled`: only some rows of each tensor were looked at."""

    tensors: tuple[TensorVerdict, ...]
    files: tuple[FileVerdict, ...]
    sampled: bool
    own: bool  # the directory has a manifest of inlay, and is held to it

    @property
    def exact(self) -> bool:
        """Every tensor is the base's or the correctly rounded merge, and every file is as it should be."""
        return not self.files and all(t.verdict in GOOD for t in self.tensors)

    @property
    def ok(self) -> bool:
        """Base + adapters up to roundings. A directory that inlay wrote has to be exact."""
        if self.own:
            return self.exact
        return all(t.verdict in (*GOOD, ROUNDED) for t in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(t.verdict for t in self.tensors))

    def to_json(self) -> Mapping[str, Any]:
        """JSON values; tensors that are as they should be are counted, not listed."""
        return {
            "ok": self.ok,
            "exact": self.exact,
            "sampled": self.sampled,
            "counts": self.counts,
            "elements_checked": sum(t.checked for t in self.tensors),
            "tensors": [asdict(t) for t in self.tensors if t.verdict not in GOOD],
            "files": [asdict(f) for f in self.files],
        }
