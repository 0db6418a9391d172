"""A plan: what will be written, from which bytes, by which steps. Data only.

It travels as JSON (`from_json(to_json(p)) == p`), its digest names the merge, and it holds references,
never tensors. Paths and times are kept apart in `Inputs` and are no part of the digest: the same base
and adapters in another place make the same plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from inlay.checkpoints.refs import Made, TensorRef
from inlay.digests import digest_object
from inlay.dtypes import DTYPES, DType
from inlay.plan.steps import AnyStep, Delta, Dense, Part, Rows, Step

FORMAT = 3
_PLAIN = frozenset({str, int, float, bool, type(None)})


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
    steps: tuple[AnyStep, ...] = ()
    leading: int = 1

    @property
    def copied(self) -> bool:
        """Whether the bytes are those of the source."""
        same = self.dtype is self.source.dtype and self.source.made is None
        return same and not self.patches and not self.steps and not self.grown

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
class Coded:
    """One tensor of the output: a part of a weight that is stored in codes.

    The weight is merged as float32 and then encoded, its `kept` parts (scales, zero points) as they are stored. All
    parts of one weight have the same `weight`, `codec`, `settings`, `kept` and `compensate`: with "adapter" codes are
    those that hold each row's whole delta (`inlay.codecs.compensation`), else the nearest ones.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    part: str
    weight: Entry
    codec: str
    settings: Mapping[str, Any]
    kept: Mapping[str, TensorRef] = field(default_factory=dict)
    compensate: str | None = None

    @property
    def copied(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.count)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def touched(self) -> bool:
        """Whether an adapter has a part in it."""
        return self.weight.touched


@dataclass(frozen=True)
class ShardPlan:
    """One output file. `like` names the base shard whose header it keeps byte for byte, if it does."""

    file: str
    entries: tuple[Entry | Coded, ...]
    metadata: Mapping[str, str]
    like: str | None = None


@dataclass(frozen=True)
class Sidecar:
    """A file that is not a shard: copied from a root, perhaps with edits of JSON values.

    `edits` maps dotted paths to values, `removed` are paths that go.
    """

    file: str
    root: str
    source: str
    edits: Mapping[str, Any] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


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
    """What the user chose and what changes the bytes.

    `options` are those of the way to combine, `quant` those of reading and writing codes.
    """

    dtype: str | None = None
    combine: str = "sum"
    max_shard_bytes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    quant: Mapping[str, Any] = field(default_factory=dict)


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
        apart = ("inputs", "warnings", "notes", "cost", "base_name", "shards")
        value = {"format": FORMAT, **{name: _encode(v) for name, v in _fields(self) if name not in apart}}
        for adapter in value["adapters"]:
            del adapter["name"], adapter["base_model"]
        return digest_object(value, "shards", map(_encode, self.shards))  # many experts as JSON take a lot of memory

    @cached_property
    def entries(self) -> dict[str, Entry | Coded]:
        """Key -> what is stored under it."""
        return {e.key: e for shard in self.shards for e in shard.entries}

    @cached_property
    def weights(self) -> dict[str, Entry]:
        """Key -> tensor before it is encoded, for those that are stored in codes; all others as they are."""
        found = [e.weight if isinstance(e, Coded) else e for shard in self.shards for e in shard.entries]
        return {e.key: e for e in found}

    @property
    def roots(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self.inputs.roots.items()}


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values. Law: `from_json(to_json(p)) == p`."""
    return {"format": FORMAT, **{name: _encode(value) for name, value in _fields(plan)}}


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(value, name)) for name in value.__dataclass_fields__]


@cache
def _members(kind: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """Names of the fields of a dataclass, of which each here has two and more, and what gets all their values."""
    names = tuple(kind.__dataclass_fields__)
    return names, attrgetter(*names)


def _encode(value: Any) -> Any:
    # A plan has millions of values where there are many experts. Nearly all are plain, and cost no call.
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return [v if type(v) in _PLAIN else _encode(v) for v in value]
    if kind is DType:
        return value.name
    if hasattr(kind, "__dataclass_fields__"):
        names, values = _members(kind)
        return {n: v if type(v) in _PLAIN else _encode(v) for n, v in zip(names, values(value), strict=True)}
    if isinstance(value, Mapping):
        return {k: _encode(v) for k, v in value.items()}
    raise AssertionError(f"{kind.__name__} in a plan")


def from_json(value: Mapping[str, Any]) -> Plan:
    """A plan from what `to_json` made. Raises ValueError for another format."""
    if value.get("format") != FORMAT:
        raise ValueError(f"plan format {value.get('format')!r}; this version reads {FORMAT}")
    v = {name: part for name, part in value.items() if name not in ("format", "digest", "meeting", "survival")}
    v["adapters"] = tuple(
        AdapterUse(**{**a, "rank": tuple(a["rank"]), "scaling": tuple(a["scaling"])}) for a in v["adapters"]
    )
    v["settings"] = Settings(**v["settings"])
    v["shards"] = tuple(_shard(s) for s in v["shards"])
    v["sidecars"] = tuple(Sidecar(**{**s, "removed": tuple(s["removed"])}) for s in v["sidecars"])
    v["expectations"] = tuple(Expectation(**e) for e in v["expectations"])
    for name in ("warnings", "notes", "overlaps"):
        v[name] = tuple(v[name])
    v["cost"] = Cost(**v["cost"])
    files = tuple(InputFile(**f) for f in v["inputs"]["files"])
    v["inputs"] = Inputs(v["inputs"]["roots"], files)
    return Plan(**v)


def _shard(v: Mapping[str, Any]) -> ShardPlan:
    return ShardPlan(v["file"], tuple(_either(e) for e in v["entries"]), v["metadata"], v["like"])


def _either(v: Mapping[str, Any]) -> Entry | Coded:
    if "part" not in v:
        return _entry(v)
    kept = {name: _ref(ref) for name, ref in v["kept"].items()}
    more = {"dtype": DTYPES[v["dtype"]], "shape": tuple(v["shape"]), "weight": _entry(v["weight"]), "kept": kept}
    return Coded(**{**v, **more})


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


def _step(v: Mapping[str, Any]) -> AnyStep:
    if "ref" in v:
        return Delta(v["adapter"], v["tuner"], _ref(v["ref"]), tuple(v["rows"]) if v["rows"] else None)
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
    made = v["made"] and _made(v["made"])
    return TensorRef(v["root"], v["file"], v["key"], DTYPES[v["dtype"]], tuple(v["shape"]), v["start"], made)


def _made(v: Mapping[str, Any]) -> Made:
    return Made(v["formula"], tuple((name, _ref(ref)) for name, ref in v["parts"]), v["settings"], v["cols"])


def dumps(plan: Plan) -> str:
    """The plan as JSON text."""
    return json.dumps(to_json(plan), indent=1, ensure_ascii=False)


def loads(text: str) -> Plan:
    return from_json(json.loads(text))
