"""What adapters do to one tensor: low-rank pairs, other methods, mixed deltas, rows that are replaced. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay.checkpoints.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Part:
    """A factor of a step in the orientation of the stored weight: a strided view of a stored tensor.

    Element (i, j) is number `start + i · strides[0] + j · strides[1]` of the tensor, so that a transposed
    factor, a range of its rows and one expert of an interleaved pair are the same kind of thing.
    """

    ref: TensorRef
    shape: tuple[int, int]
    start: int
    strides: tuple[int, int]

    @classmethod
    def of(cls, ref: TensorRef) -> Part:
        """The whole tensor as a matrix."""
        return cls(ref, ref.matrix, 0, (ref.matrix[1], 1))

    @property
    def turned(self) -> Part:
        """The transpose."""
        return Part(self.ref, self.shape[::-1], self.start, self.strides[::-1])

    def rows(self, first: int, last: int) -> Part:
        assert 0 <= first <= last <= self.shape[0], f"{self.ref.key}: rows [{first}, {last}) of {self.shape}"
        return Part(self.ref, (last - first, self.shape[1]), self.start + first * self.strides[0], self.strides)

    def columns(self, first: int, last: int) -> Part:
        return self.turned.rows(first, last).turned


@dataclass(frozen=True)
class Step:
    """What one adapter does to one tensor: a low-rank pair, perhaps with a DoRA magnitude.

    `left` (rows, r) is None for a bias, where it is [[1]]; `right` is (r, cols). `scaling` has the weight
    of the adapter in it. `axis` is the stored axis along which DoRA takes its norm. `rows` are the rows of
    the entry's matrix that it acts on, if not all: a module inside a fused tensor, an expert of many.
    """

    adapter: int
    tuner: str
    scaling: float
    right: Part
    left: Part | None = None
    magnitude: TensorRef | None = None
    axis: int = 1
    rows: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def refs(self) -> frozenset[TensorRef]:
        """The tensors that it reads."""
        return frozenset({self.right.ref, *([self.left.ref] if self.left else []), *filter(None, [self.magnitude])})


@dataclass(frozen=True)
class Dense:
    """What an adapter of another tuner does to one tensor; `tuner` names its file in `tuners/`.

    `shape` is that of the weight as the tuner sees it, (out, in, …); `transposed` says that it is stored
    (in, out). With `bias` the tensor is the layer's bias. `weight` is a factor on the delta, 1 for tuners
    that are no sum.
    """

    adapter: int
    tuner: str
    parts: Mapping[str, TensorRef]
    settings: Mapping[str, Any]
    shape: tuple[int, ...]
    transposed: bool = False
    bias: bool = False
    weight: float = 1.0

    @property
    def refs(self) -> frozenset[TensorRef]:
        return frozenset(self.parts.values())


@dataclass(frozen=True)
class Delta:
    """A delta given element by element, mixed of several adapters' (the first is `adapter`); `tuner` is the method.

    `ref` is a matrix of the rows that it acts on, and of all columns.
    """

    adapter: int
    tuner: str
    ref: TensorRef
    rows: tuple[int, int] | None = None

    @property
    def refs(self) -> frozenset[TensorRef]:
        """The tensors that it reads."""
        assert self.ref.made is not None
        return frozenset(ref for _, ref in self.ref.made.parts)


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor that an adapter replaces: row `i` of `ref` becomes row `rows[i]`."""

    adapter: int
    ref: TensorRef
    rows: tuple[int, ...]


AnyStep = Step | Dense | Delta
