"""A quantised checkpoint as it is without its quantisation: the same names, shapes and order, in floats.

Each group of codes, scales and zero points is one weight again, made when it is read (`Made`); everything else is
where it was. Planning, merging and verifying then know nothing of codes. Headers are read, and of a few modules the
small tensors that say how they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from inlay.checkpoints.checkpoint import Checkpoint, Shard
from inlay.checkpoints.json_files import read_json_object
from inlay.checkpoints.refs import Made, TensorInfo, TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.codecs.table import CODECS, codec
from inlay.dtypes import F32, Array
from inlay.errors import CheckpointError, Problem

# Where the description of the codes stands if not in config.json, and what it lacks there.
OWN_FILES: dict[str, dict[str, Any]] = {
    "quantize_config.json": {"quant_method": "gptq"},
    "quant_config.json": {"quant_method": "awq"},
    "hf_quant_config.json": {"quant_method": "modelopt"},
}
SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True)
class Encoding:
    """How a weight is stored: the codec's name, its settings, and the stored parts. `stem` begins all their keys."""

    codec: str
    stem: str
    settings: Mapping[str, Any]
    parts: Mapping[str, TensorRef]

    @property
    def made(self) -> Made:
        shape = self.settings["shape"]
        cols = shape[-1] if len(shape) == 3 else math.prod(shape[1:])
        return Made.of("codec", self.parts, {**self.settings, "codec": self.codec}, cols)


@dataclass(frozen=True)
class Decoded:
    """The checkpoint in floats, what its weights are made of (by key), and what could not be understood.

    `dropped` are tensors that serve the codes alone (scales of activations and of the cache).
    """

    checkpoint: Checkpoint
    encodings: Mapping[str, Encoding]
    dropped: tuple[str, ...]
    problems: tuple[Problem, ...]


def quantisation(base: Checkpoint) -> Mapping[str, Any] | None:
    """`quantization_config`, wherever the checkpoint has it; empty where only the types of its tensors tell.

    None for a checkpoint in floats.
    """
    for section in (base.config, *(base.config.get(name) or {} for name in SECTIONS)):
        for name in ("quantization_config", "compression_config", "quantization"):
            found = section.get(name)
            if isinstance(found, dict) and found:
                return {"quant_method": "mlx", **found} if "quant_method" not in found and _is_mlx(found) else found
    for file, rest in OWN_FILES.items():
        if (base.path / file).is_file():
            own = read_json_object(base.path / file, CheckpointError)
            return {**rest, **own}
    codes = any(t.dtype.kind == "code" for _, t in base.tensors.values())
    return {} if codes else None


def _is_mlx(config: Mapping[str, Any]) -> bool:
    return "bits" in config and "group_size" in config


def decode_checkpoint(base: Checkpoint) -> Decoded:
    """The checkpoint without its quantisation. Problems are returned together, none is raised."""
    config = quantisation(base)
    assert config is not None, f"{base.path} is not quantised"
    method = config.get("quant_method")
    forms = {
        name: form for name in CODECS if method in (form := codec(name)).METHODS or (method is None and not config)
    }
    if not forms:
        known = ", ".join(sorted({m for name in CODECS for m in codec(name).METHODS}))
        what = f"{method!r} is no quantisation that is known here ({known})"
        return Decoded(base, {}, (), (Problem(str(base.path), what),))
    with SpanReader({BASE: base.path}) as reader:
        search = _Search(base, config, forms, reader)
        search.run()
    claimed = {ref.key for e in search.encodings.values() for ref in e.parts.values()}
    used = [forms[name] for name in {e.codec for e in search.encodings.values()}]
    dropped = tuple(k for k in base.tensors if k not in claimed and _serves_codes(k, used))
    problems = search.problems + _leftovers(base, claimed | set(dropped), forms.values(), search.refused)
    if not search.encodings and not problems:
        what = f"says it is quantised ({method}) and holds no codes; take quantization_config out of its config.json"
        problems.append(Problem(str(base.path), what))
    return Decoded(
        _in_floats(base, search.encodings, claimed | set(dropped)), search.encodings, dropped, tuple(problems)
    )


def parts_of(form: ModuleType) -> dict[str, str]:
    """Part -> suffix of its key, those that may be absent at the end."""
    return {**form.PARTS, **form.OPTIONAL}


def _serves_codes(key: str, forms: Iterable[ModuleType]) -> bool:
    return any(key.endswith(suffix) for form in forms for suffix in form.EXTRAS)


class _Search:
    """Finds the modules of a checkpoint that are stored in one of some forms."""

    def __init__(
        self, base: Checkpoint, config: Mapping[str, Any], forms: Mapping[str, ModuleType], reader: SpanReader
    ) -> None:
        self.base = base
        self.config = config
        self.forms = forms
        self.reader = reader
        self.encodings: dict[str, Encoding] = {}
        self.problems: list[Problem] = []
        self.refused: set[str] = set()

    def run(self) -> None:
        for key, (_, t) in self.base.tensors.items():
            reasons: list[str] = []
            for name, form in self.forms.items():
                parts = parts_of(form)
                suffix = next(iter(parts.values()))
                if t.dtype.name not in form.CODES or not key.endswith(suffix):
                    continue
                stem = key.removesuffix(suffix)
                found = {part: stem + end for part, end in parts.items() if stem + end in self.base.tensors}
                if set(form.PARTS) - set(found):
                    continue
                try:
                    self.encodings[stem + form.NAME_SUFFIX] = self._encoding(name, stem, found)
                    reasons = []
                    break
                except ValueError as error:
                    reasons.append(str(error))
            if reasons:
                self.refused.add(key)
                self.problems.append(Problem(key, reasons[-1]))

    def _encoding(self, name: str, stem: str, found: Mapping[str, str]) -> Encoding:
        infos = {part: self.base.tensors[key][1] for part, key in found.items()}
        refs = {part: self._ref(key) for part, key in found.items()}

        def read(part: str) -> Array:
            return self.reader.whole(refs[part])

        shapes = {part: (t.dtype.name, t.shape) for part, t in infos.items()}
        settings = self.forms[name].settings(self.config, stem, shapes, read)
        return Encoding(name, stem, settings, {part: refs[part] for part in self.forms[name].layout(settings)})

    def _ref(self, key: str) -> TensorRef:
        shard, info = self.base.tensors[key]
        return TensorRef.of(BASE, shard.file, info)


def _leftovers(base: Checkpoint, known: set[str], forms: Iterable[ModuleType], refused: set[str]) -> list[Problem]:
    """Tensors that hold codes and belong to no weight that was understood."""
    suffixes = {suffix for form in forms for suffix in parts_of(form).values() if suffix not in ("", ".weight")}
    problems = []
    for key, (_, t) in base.tensors.items():
        if key in known or key in refused:
            continue
        partner = next((s for s in suffixes if key.endswith(s)), None)
        if partner and any(key.removesuffix(partner) + s in refused for s in {*suffixes, ".weight", ""}):
            continue  # a part of what is refused already
        if t.dtype.kind == "code" or (t.dtype.kind == "int" and (partner or len(t.shape) > 1)):
            problems.append(
                Problem(key, f"holds codes ({t.dtype.name}), and the tensors that scale them are not there")
            )
    return problems


def _in_floats(base: Checkpoint, encodings: Mapping[str, Encoding], gone: set[str]) -> Checkpoint:
    """Each weight in the place of its codes."""
    by_codes = {next(iter(e.parts.values())).key: (key, e) for key, e in encodings.items()}
    shards = []
    for shard in base.shards:
        tensors: list[TensorInfo] = []
        for t in shard.tensors:
            if t.key in by_codes:
                key, encoding = by_codes[t.key]
                shape = tuple(encoding.settings["shape"])
                tensors.append(TensorInfo(key, F32, shape, 0, F32.nbytes(math.prod(shape)), encoding.made))
            elif t.key not in gone:
                tensors.append(t)
        if tensors:
            shards.append(Shard(shard.file, shard.nbytes, tuple(tensors), shard.header))
    config = {
        k: v for k, v in base.config.items() if k not in ("quantization_config", "compression_config", "quantization")
    }
    return replace(base, shards=tuple(shards), config=config, stored=base)
