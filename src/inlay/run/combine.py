"""`combine_adapters`: several LoRA adapters written as one, an ordinary adapter directory of PEFT.

Module by module: the pairs of one module are read, combined in float64 and rounded once to float32. At
most a few arrays of one weight's size are in memory, and those only for the methods that work on deltas.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inlay import __version__
from inlay.adapters.adapter import CONFIG, FINGERPRINT, WEIGHTS, Adapter, read_adapter
from inlay.adapters.peft_names import PREFIX
from inlay.checkpoints.header import TensorInfo, layout
from inlay.checkpoints.spans import SpanReader, TensorRef, adapter_root
from inlay.digests import digest_json
from inlay.dtypes import F32, Array, DType, F64Array, decode, is_finite, round_nearest
from inlay.errors import AdapterError, InputError, OutputError, PlanError, Problem
from inlay.output.copying import write_at
from inlay.output.destination import check_destination
from inlay.output.staging import Staging, write_durably
from inlay.run.combinable import Factors, Module, check_adapter, find_modules, is_lora
from inlay.tuners.combining import MAJORITY_SIGNS, METHODS, Pair, Recipe, combine

WRITTEN = (CONFIG, WEIGHTS[0], FINGERPRINT)


@dataclass(frozen=True)
class Combination:
    """The adapter that was written: `ranks` by module, `nbytes` of its tensors, and what to know about it."""

    output_dir: Path
    ranks: Mapping[str, int]
    nbytes: int
    warnings: tuple[str, ...]


def combine_adapters(
    adapters: Sequence[str | os.PathLike[str] | Adapter],
    output_dir: str | os.PathLike[str],
    *,
    combine_by: str = "cat",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    majority_sign_method: str | None = None,
    svd_rank: int | None = None,
    seed: int | None = None,
    exist_ok: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Combination:
    """Write the combination of LoRA `adapters` as one adapter in `output_dir`, float32, with a scaling of 1.

    `combine_by` is one of PEFT's methods: cat (the exact sum), linear, svd, ties, dare_linear, dare_ties,
    magnitude_prune, and the last four with _svd (see `inlay.tuners.combining` for the formulas). `weights`
    are 1.0 each if not given. `density`, in (0, 1], is needed by all that prune; `majority_sign_method`
    (total or frequency) is for ties; `svd_rank` is the largest rank of the adapters if not given. `seed` (0)
    alone decides the random masks of dare. A module that only some adapters have is combined from those.

    What PEFT has otherwise: the scaling of rsLoRA adapters enters once; equal ranks are needed in each module
    only; an adapter alone is combined as asked, too (so that svd lowers its rank), where PEFT takes linear.

    Raises PlanError (an InputError) with everything that speaks against it, before anything is written, and
    OutputError when the destination cannot be written; then nothing is left behind.
    """
    destination = Path(output_dir)
    opened, problems = _open(adapters)
    problems += _settings_problems(combine_by, density, majority_sign_method, svd_rank, seed)
    problems += _weight_problems(weights, len(adapters))
    problems += [problem for adapter in opened for problem in check_adapter(adapter)]
    problems += _different_bases(opened)
    recipe = Recipe(
        combine_by if combine_by in METHODS else "cat",
        1.0 if density is None else density,
        majority_sign_method or MAJORITY_SIGNS[0],
        svd_rank or max((_largest_rank(a) for a in opened), default=1),
        seed or 0,
    )
    modules, misfits = find_modules([a for a in opened if is_lora(a)], recipe)
    nbytes = sum(F32.nbytes(m.rank(recipe) * (m.inputs + m.outputs)) for m in modules)
    problems += misfits + _destination_problems(destination, opened, exist_ok, nbytes)
    if problems:
        raise PlanError(problems)
    job = _Job(opened, recipe, tuple(weights or [1.0] * len(opened)), modules)
    _publish(job, destination, exist_ok, progress or _ignore)
    return Combination(destination, {m.name: m.rank(recipe) for m in modules}, nbytes, _warnings(opened))


def _ignore(_: int) -> None:
    """Progress that nobody watches."""


# What speaks against it.


def _open(adapters: Iterable[str | os.PathLike[str] | Adapter]) -> tuple[list[Adapter], list[Problem]]:
    opened, problems = [], []
    for adapter in adapters:
        try:
            opened.append(adapter if isinstance(adapter, Adapter) else read_adapter(adapter))
        except AdapterError as error:
            problems.append(Problem(str(adapter), str(error).removeprefix(f"{adapter}: ")))
    if not opened and not problems:
        problems.append(Problem("adapters", "none given"))
    return opened, problems


def _settings_problems(
    combine_by: str, density: float | None, majority_sign: str | None, svd_rank: int | None, seed: int | None
) -> list[Problem]:
    """Settings that are missing, out of range, or of no effect on the method."""
    if combine_by not in METHODS:
        return [Problem("combine", f"{combine_by} is not one of {', '.join(METHODS)}")]
    method, problems = METHODS[combine_by], []
    used = {
        "density": (density, bool(method.prunes)),
        "majority_sign_method": (majority_sign, method.elects_sign),
        "svd_rank": (svd_rank, method.on_deltas),
        "seed": (seed, method.prunes == "random"),
    }
    for name, (value, is_used) in used.items():
        if value is not None and not is_used:
            problems.append(Problem(name, f"has no effect on {combine_by}; leave it out"))
    if method.prunes and density is None:
        problems.append(Problem("density", f"{combine_by} needs it: the share of elements to keep, in (0, 1]"))
    if density is not None and not 0 < density <= 1:
        problems.append(Problem("density", f"must be in (0, 1], not {density}"))
    if majority_sign is not None and majority_sign not in MAJORITY_SIGNS:
        problems.append(Problem("majority_sign_method", f"must be {' or '.join(MAJORITY_SIGNS)}, not {majority_sign}"))
    if svd_rank is not None and svd_rank < 1:
        problems.append(Problem("svd_rank", f"must be positive, not {svd_rank}"))
    return problems


def _weight_problems(weights: Sequence[float] | None, count: int) -> list[Problem]:
    if weights is None:
        return []
    problems = []
    if len(weights) != count:
        problems.append(Problem("weights", f"{len(weights)} for {count} adapters"))
    if not all(np.isfinite(w) for w in weights):
        problems.append(Problem("weights", "must be finite numbers"))
    return problems


def _different_bases(adapters: Sequence[Adapter]) -> list[Problem]:
    """Adapters whose records show that they were trained on different weights."""
    headers: dict[str, Path] = {}
    tensors: dict[str, dict[str, Path]] = defaultdict(dict)
    for adapter in adapters:
        if adapter.fingerprint:
            headers.setdefault(adapter.fingerprint["headers"], adapter.path)
        for key, digest in adapter.fingerprint.get("tensors", {}).items():
            tensors[key].setdefault(digest, adapter.path)
    if len(headers) > 1:
        return [Problem(str(path), f"was trained on another base than the others: {h}") for h, path in headers.items()]
    return [
        Problem(key, f"is another tensor in the bases of {' and '.join(map(str, found.values()))}")
        for key, found in tensors.items()
        if len(found) > 1
    ]


def _destination_problems(output: Path, adapters: Sequence[Adapter], exist_ok: bool, nbytes: int) -> list[Problem]:
    if exist_ok and output.is_dir() and set(os.listdir(output)) <= {*WRITTEN}:
        same = [a.path for a in adapters if os.path.samefile(a.path, output)]
        return [Problem(str(output), f"is the adapter {path} itself; choose another directory") for path in same[:1]]
    if exist_ok and output.is_dir():
        extra = sorted(set(os.listdir(output)) - {*WRITTEN})
        what = f"holds more than an adapter ({', '.join(extra[:3])}), so it is not replaced; choose another directory"
        return [Problem(str(output), what)]
    return check_destination(output, {adapter_root(i): a.path for i, a in enumerate(adapters)}, exist_ok, nbytes)


def _largest_rank(adapter: Adapter) -> int:
    return max(adapter.config.r, *adapter.config.rank_pattern.values(), 1)


def _warnings(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    bases = sorted({str(a.base_model) for a in adapters if a.base_model})
    if len(bases) < 2:
        return ()
    return (f"the adapters name different bases: {', '.join(bases)}; the combination names none",)


# The work, and what is written.


@dataclass(frozen=True)
class _Job:
    """A combination that can be made."""

    adapters: Sequence[Adapter]
    recipe: Recipe
    weights: tuple[float, ...]
    modules: Sequence[Module]

    def description(self) -> dict[str, Any]:
        """What decides the result; it goes into the header of the file."""
        recipe, method = self.recipe, self.recipe.method
        return {
            "method": recipe.name,
            "adapters": [a.digest for a in self.adapters],
            "weights": list(self.weights),
            **({"density": recipe.density} if method.prunes else {}),
            **({"majority_sign_method": recipe.majority_sign} if method.elects_sign else {}),
            **({"svd_rank": recipe.svd_rank} if method.on_deltas else {}),
            **({"seed": recipe.seed} if method.prunes == "random" else {}),
        }

    def tensors(self, module: Module, reader: SpanReader) -> tuple[Array, Array]:
        """Stored float32 bits of A and B of the result."""
        pairs = [self._pair(f, reader) for f in module.factors]
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (round_nearest(x, F32) for x in combine(self.recipe, module.name, pairs))
        if not (is_finite(a, F32).all() and is_finite(b, F32).all()):
            raise InputError(f"{module.name}: the combination is too large for float32; nothing was written")
        return a, b

    def _pair(self, f: Factors, reader: SpanReader) -> Pair:
        return Pair(f.position, self.weights[f.position], f.scaling, *(self._read(f, t, reader) for t in (f.a, f.b)))

    def _read(self, f: Factors, tensor: TensorInfo, reader: SpanReader) -> F64Array:
        ref = TensorRef.of(adapter_root(f.position), self.adapters[f.position].weights_file, tensor)
        return decode(reader.whole(ref), tensor.dtype).reshape(tensor.shape[0], -1)


def _publish(job: _Job, destination: Path, exist_ok: bool, progress: Callable[[int], None]) -> None:
    with Staging(destination, digest_json(job.description()), {}) as staging:
        try:
            _write_weights(job, staging.path / WEIGHTS[0], progress)
            _write_json(staging.path / FINGERPRINT, _fingerprint(job.adapters))
            _write_json(staging.path / CONFIG, _config(job))
            if problems := _destination_problems(destination, job.adapters, exist_ok, 0):
                raise PlanError(problems)  # something came to the destination meanwhile
            staging.publish()
        except OSError as error:
            staging.discard()
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{destination}: {error.strerror or error}; nothing was written") from error
        except BaseException:
            staging.discard()
            raise


def _write_weights(job: _Job, path: Path, progress: Callable[[int], None]) -> None:
    entries: list[tuple[str, DType, tuple[int, ...]]] = []
    for module in job.modules:
        shapes = module.shapes(module.rank(job.recipe))
        entries += [(_key(module, part), F32, shape) for part, shape in zip(module.kind, shapes, strict=True)]
    metadata = {"format": "pt", "inlay": json.dumps({"version": __version__, **job.description()})}
    header, spans = layout(entries, metadata)
    places = {span.key: span for span in spans}
    roots = {adapter_root(i): a.path for i, a in enumerate(job.adapters)}
    with SpanReader(roots) as reader, open(path, "wb") as file:
        write_at(file.fileno(), header, 0)
        for module in job.modules:
            for part, bits in zip(module.kind, job.tensors(module, reader), strict=True):
                place = places[_key(module, part)]
                assert bits.nbytes == place.nbytes, f"{place.key}: {bits.shape} for {place.shape}"
                write_at(file.fileno(), bits.tobytes(), place.start)
                progress(bits.nbytes)
        os.fsync(file.fileno())


def _key(module: Module, part: str) -> str:
    """Name of a tensor as PEFT saves it: a parameter of an embedding has no `.weight`."""
    return f"{PREFIX}{module.name}.{part}" + (".weight" if part in ("lora_A", "lora_B") else "")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    if value:
        write_durably(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _config(job: _Job) -> dict[str, Any]:
    """`adapter_config.json`: alpha is r everywhere, so that the scaling is 1."""
    r, pattern = rank_table({m.name: m.rank(job.recipe) for m in job.modules})
    raw = [a.config.raw for a in job.adapters]
    return {
        "auto_mapping": _common(c.get("auto_mapping") for c in raw),
        "base_model_name_or_path": _common(a.base_model for a in job.adapters),
        "bias": "none",
        "fan_in_fan_out": any(a.config.fan_in_fan_out for a in job.adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": pattern,
        "revision": _common(c.get("revision") for c in raw),
        # A module inside a wrapped one, attn.base_layer.out_proj, is reached through its wrapper.
        "target_modules": list(dict.fromkeys(m.name.partition(".base_layer.")[0] for m in job.modules)),
        "task_type": _common(c.get("task_type") for c in raw),
        "use_dora": False,
        "use_rslora": False,
    }


def _common(values: Iterable[Any]) -> Any:
    """The value that all agree on, of those that have one."""
    found = [v for v in values if v is not None]
    return found[0] if found and all(v == found[0] for v in found) else None


def rank_table(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """`r` and `rank_pattern` that give each module its rank.

    r is the largest rank, for readers that set aside room by it and know no patterns. The others are named
    by their last word where all modules of that word have this rank, else in full and anchored.
    """
    r, by_word = max(ranks.values()), defaultdict(set)
    for name, rank in ranks.items():
        by_word[name.rpartition(".")[2]].add(rank)
    table = {}
    for name, rank in ranks.items():
        word = name.rpartition(".")[2]
        if rank != r:
            table[re.escape(word) if len(by_word[word]) == 1 else f"^{re.escape(name)}"] = rank
    return r, table


def _fingerprint(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The record of the base, of all adapters together; they agree, see `_different_bases`."""
    records = [a.fingerprint for a in adapters if a.fingerprint]
    if not records:
        return {}
    return {**records[0], "tensors": {k: d for record in records for k, d in record["tensors"].items()}}
