"""A plan: what will be written, from which bytes, by which steps. Data only.

It travels as JSON (`from_json(to_json(p)) == p`), its digest names the merge, and it holds references,
never tensors. Paths and times are kept apart in `Inputs` and are no part of the digest: the same base
and adapters in another place make the same plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from inlay.checkpoints.spans import TensorRef
from inlay.digests import digest_json
from inlay.dtypes import DTYPES, DType

FORMAT = 2
_PLAIN = frozenset({str, int, float, bool, type(None)})


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
class Rows:
    """Rows of a tensor that an adapter replaces: row `i` of `ref` becomes row `rows[i]`."""

    adapter: int
    ref: TensorRef
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of the output.

    It starts from `source` (of the base, or an adapter's full copy), takes `patches` of rows, then
    `steps`, and is rounded once to `dtype`. As a matrix its first `leading` axes are the rows: two for a
    stack of experts. Law: without patches, steps and change of dtype or shape its
    bytes are those of the source.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    source: TensorRef
    patches: tuple[Rows, ...] = ()
    steps: tuple[Step | Dense, ...] = ()
    leading: int = 1

    @property
    def copied(self) -> bool:
        """Whether the bytes are those of the source."""
        return not self.patches and not self.steps and self.dtype is self.source.dtype and not self.grown

    @property
    def grown(self) -> bool:
        """Whether rows are added to those of the source."""
        return self.shape != self.source.shape

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.count)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        if len(self.shape) < 2:
            return 1, self.count
        rows = math.prod(self.shape[: self.leading])
        return rows, self.count // rows if rows else 0

    @property
    def source_matrix(self) -> TensorRef:
        """The source with the shape of the entry's matrix."""
        if self.leading == 1:
            return self.source
        return replace(self.source, shape=self.matrix)

    @property
    def low_rank(self) -> tuple[Step, ...]:
        """The steps, where all of them are low-rank pairs; empty otherwise."""
        steps = tuple(step for step in self.steps if isinstance(step, Step))
        return steps if len(steps) == len(self.steps) else ()

    @property
    def elementwise(self) -> bool:
        """Whether each element depends on its own source only: at most a change of type."""
        return not self.patches and not self.steps and not self.grown

    @property
    def touched(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.steps or self.patches or self.source.root != "base")


@dataclass(frozen=True)
class ShardPlan:
    """One output file. `like` names the base shard whose header it keeps byte for byte, if it does."""

    file: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    like: str | None = None


@dataclass(frozen=True)
class Sidecar:
    """A file that is not a shard: copied from a root, perhaps with edits of JSON values (dotted path -> value)."""

    file: str
    root: str
    source: str
    edits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterUse:
    """An adapter as it takes part: who it is, how strongly, what it reaches."""

    name: str
    digest: str
    tuner: str
    weight: float
    rank: tuple[int, ...]
    scaling: tuple[float, ...]
    modules: int
    parameters: int
    base_model: str | None


@dataclass(frozen=True)
class Settings:
    """What the user chose and what changes the bytes."""

    dtype: str | None = None
    combine: str = "sum"
    max_shard_bytes: int | None = None


@dataclass(frozen=True)
class Expectation:
    """A digest that the adapter recorded of a base tensor it was trained on."""

    adapter: int
    key: str
    digest: str


@dataclass(frozen=True)
class InputFile:
    """A file that the plan reads, as it was when the plan was made; a resumed run compares."""

    root: str
    file: str
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Inputs:
    """Where base and adapters lie on this machine."""

    roots: Mapping[str, str]
    files: tuple[InputFile, ...]


@dataclass(frozen=True)
class Cost:
    """What a run will do, in bytes, and the share of the parameters that an adapter touches."""

    read: int
    computed: int
    copied: int
    written: int
    touched_parameters: int
    parameters: int
    memory: int


@dataclass(frozen=True)
class Plan:
    """Everything that a run does, decided and checked."""

    base: str
    base_name: str
    adapters: tuple[AdapterUse, ...]
    settings: Settings
    shards: tuple[ShardPlan, ...]
    index: Mapping[str, Any] | None
    sidecars: tuple[Sidecar, ...]
    left_out: Mapping[str, str]
    expectations: tuple[Expectation, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    overlaps: tuple[str, ...]
    order_matters: bool
    cost: Cost
    inputs: Inputs

    @cached_property
    def digest(self) -> str:
        """Identity of the merge: base headers, adapter contents, settings and steps; no names, no paths, no times."""
        value = to_json(self)
        for name in ("inputs", "warnings", "notes", "cost", "base_name"):
            del value[name]
        for adapter in value["adapters"]:
            del adapter["name"], adapter["base_model"]
        return digest_json(value)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Key -> entry."""
        return {e.key: e for shard in self.shards for e in shard.entries}

    @property
    def roots(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self.inputs.roots.items()}


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values. Law: `from_json(to_json(p)) == p`."""
    return {"format": FORMAT, **{name: _encode(value) for name, value in _fields(plan)}}


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(value, name)) for name in value.__dataclass_fields__]


def _encode(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:  # nearly all of a plan; it has millions of values where there are many experts
        return value
    if kind is tuple or kind is list:
        return [_encode(v) for v in value]
    if kind is DType:
        return value.name
    if hasattr(kind, "__dataclass_fields__"):
        return {name: _encode(getattr(value, name)) for name in kind.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {k: _encode(v) for k, v in value.items()}
    raise AssertionError(f"{kind.__name__} in a plan")


def from_json(value: Mapping[str, Any]) -> Plan:
    """A plan from what `to_json` made. Raises ValueError for another format."""
    if value.get("format") != FORMAT:
        raise ValueError(f"plan format {value.get('format')!r}; this version reads {FORMAT}")
    v = {name: part for name, part in value.items() if name not in ("format", "digest", "meeting")}
    v["adapters"] = tuple(
        AdapterUse(**{**a, "rank": tuple(a["rank"]), "scaling": tuple(a["scaling"])}) for a in v["adapters"]
    )
    v["settings"] = Settings(**v["settings"])
    v["shards"] = tuple(_shard(s) for s in v["shards"])
    v["sidecars"] = tuple(Sidecar(**s) for s in v["sidecars"])
    v["expectations"] = tuple(Expectation(**e) for e in v["expectations"])
    for name in ("warnings", "notes", "overlaps"):
        v[name] = tuple(v[name])
    v["cost"] = Cost(**v["cost"])
    files = tuple(InputFile(**f) for f in v["inputs"]["files"])
    v["inputs"] = Inputs(v["inputs"]["roots"], files)
    return Plan(**v)


def _shard(v: Mapping[str, Any]) -> ShardPlan:
    return ShardPlan(v["file"], tuple(_entry(e) for e in v["entries"]), v["metadata"], v["like"])


def _entry(v: Mapping[str, Any]) -> Entry:
    return Entry(
        key=v["key"],
        dtype=DTYPES[v["dtype"]],
        shape=tuple(v["shape"]),
        source=_ref(v["source"]),
        patches=tuple(Rows(p["adapter"], _ref(p["ref"]), tuple(p["rows"])) for p in v["patches"]),
        steps=tuple(_step(s) for s in v["steps"]),
        leading=v["leading"],
    )


def _step(v: Mapping[str, Any]) -> Step | Dense:
    if "parts" in v:
        parts = {name: _ref(ref) for name, ref in v["parts"].items()}
        return Dense(**{**v, "parts": parts, "shape": tuple(v["shape"])})
    return Step(
        adapter=v["adapter"],
        tuner=v["tuner"],
        scaling=v["scaling"],
        right=_part(v["right"]),
        left=_part(v["left"]) if v["left"] else None,
        magnitude=_ref(v["magnitude"]) if v["magnitude"] else None,
        axis=v["axis"],
        rows=tuple(v["rows"]) if v["rows"] else None,
    )


def _part(v: Mapping[str, Any]) -> Part:
    return Part(_ref(v["ref"]), tuple(v["shape"]), v["start"], tuple(v["strides"]))


def _ref(v: Mapping[str, Any]) -> TensorRef:
    return TensorRef(v["root"], v["file"], v["key"], DTYPES[v["dtype"]], tuple(v["shape"]), v["start"])


def dumps(plan: Plan) -> str:
    """The plan as JSON text."""
    return json.dumps(to_json(plan), indent=1, ensure_ascii=False)


def loads(text: str) -> Plan:
    return from_json(json.loads(text))
