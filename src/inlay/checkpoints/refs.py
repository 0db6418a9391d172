"""Tensors by reference: where their bytes lie, or what they are made of. Data only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `[start, end)` of its file. One that is `made` begins at 0 and lies in no file."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int
    made: Made | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor by reference: `start` is its first byte in `file`, which lies under a named root.

    For a tensor that is `made`, `start` counts in the bytes of its values.
    """

    root: str
    file: str
    key: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    made: Made | None = None

    def __hash__(self) -> int:  # of what tells most of them apart: references are looked up for every block
        return hash((self.file, self.key, self.start))

    @classmethod
    def of(cls, root: str, file: str, info: TensorInfo) -> TensorRef:
        return cls(root, file, info.key, info.dtype, info.shape, info.start, info.made)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.count)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape as rows and columns: the first axis, and the rest flattened; a vector is one row."""
        if len(self.shape) < 2:
            return 1, self.count
        return self.shape[0], self.count // self.shape[0] if self.shape[0] else 0


@dataclass(frozen=True, slots=True)
class Made:
    """How a tensor is made: `formula` is a word of the list above, `settings` JSON text (so that it can be a key)."""

    formula: str
    parts: tuple[tuple[str, TensorRef], ...]
    settings: str
    cols: int  # values in a row, the unit in which they are made

    def __hash__(self) -> int:
        return hash((self.formula, self.settings, self.parts[:1]))

    @classmethod
    def of(cls, formula: str, parts: Mapping[str, TensorRef], settings: Mapping[str, Any], cols: int) -> Made:
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return cls(formula, tuple(sorted(parts.items())), text, cols)
