"""`combine_adapters`: several LoRA adapters written as one, an ordinary adapter directory of PEFT.

Module by module: the pairs of one module are read, combined in float64 and rounded once to float32. At
most a few arrays of one weight's size are in memory, and those only for the methods that work on deltas.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay import __version__
from inlay.adapters.adapter import CONFIG, FINGERPRINT, WEIGHTS, Adapter, read_adapter
from inlay.checkpoints.header import layout
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import SpanReader, adapter_root, byte_view
from inlay.digests import digest_json
from inlay.errors import AdapterError, OutputError, PlanError, Problem
from inlay.output.copying import write_at
from inlay.output.destination import check_destination
from inlay.output.staging import Staging, write_durably
from inlay.plan.combination import Combined, Options, combined_adapter, describe, method_problems, weight_problems
from inlay.tuners.combining import METHODS

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
    options = Options(density, majority_sign_method, svd_rank, seed)
    if combine_by in METHODS:
        problems += method_problems(combine_by, options)
    else:
        problems.append(Problem("combine", f"{combine_by} is not one of {', '.join(METHODS)}"))
    problems += weight_problems(combine_by, weights, len(adapters))
    usable = weights if weights is None or len(weights) == len(opened) else None
    combined, misfits = combined_adapter(opened, usable, combine_by, options)
    nbytes = sum(t.nbytes for t in combined.adapter.tensors) if combined else 0
    problems += misfits + _destination_problems(destination, opened, exist_ok, nbytes)
    if problems:
        raise PlanError(problems)
    assert combined is not None, "neither a combination nor a problem"
    recipe = describe(combined.recipe, opened, weights or [1.0] * len(opened))
    _publish(combined, recipe, opened, destination, exist_ok, progress or _ignore)
    return Combination(destination, combined.ranks, nbytes, _warnings(opened))


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


def _destination_problems(output: Path, adapters: Sequence[Adapter], exist_ok: bool, nbytes: int) -> list[Problem]:
    if exist_ok and output.is_dir() and set(os.listdir(output)) <= {*WRITTEN}:
        same = [a.path for a in adapters if os.path.samefile(a.path, output)]
        return [Problem(str(output), f"is the adapter {path} itself; choose another directory") for path in same[:1]]
    if exist_ok and output.is_dir():
        extra = sorted(set(os.listdir(output)) - {*WRITTEN})
        what = f"holds more than an adapter ({', '.join(extra[:3])}), so it is not replaced; choose another directory"
        return [Problem(str(output), what)]
    return check_destination(output, {adapter_root(i): a.path for i, a in enumerate(adapters)}, exist_ok, nbytes)


def _warnings(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    bases = sorted({str(a.base_model) for a in adapters if a.base_model})
    if len(bases) < 2:
        return ()
    return (f"the adapters name different bases: {', '.join(bases)}; the combination names none",)


def _publish(
    combined: Combined, recipe: Mapping[str, Any], adapters: Sequence[Adapter], destination: Path, exist_ok: bool,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    with Staging(destination, digest_json(recipe), {}) as staging:
        try:
            _write_weights(combined.adapter, recipe, adapters, staging.path / WEIGHTS[0], progress)
            _write_json(staging.path / FINGERPRINT, _fingerprint(adapters))
            _write_json(staging.path / CONFIG, combined.adapter.config.raw)
            if problems := _destination_problems(destination, adapters, exist_ok, 0):
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


def _write_weights(
    combined: Adapter, recipe: Mapping[str, Any], adapters: Sequence[Adapter], path: Path,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    metadata = {"format": "pt", "inlay": json.dumps({"version": __version__, **recipe})}
    header, spans = layout([(t.key, t.dtype, t.shape) for t in combined.tensors], metadata)
    places = {span.key: span for span in spans}
    roots = {adapter_root(i): a.path for i, a in enumerate(adapters)}
    with SpanReader(roots) as reader, open(path, "wb") as file:
        write_at(file.fileno(), header, 0)
        for tensor in combined.tensors:
            bits = reader.whole(TensorRef.of(adapter_root(0), combined.weights_file, tensor))
            write_at(file.fileno(), byte_view(bits), places[tensor.key].start)
            progress(bits.nbytes)
        os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    if value:
        write_durably(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _fingerprint(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The record of the base, of all adapters together; they agree, see `different_bases`."""
    records = [a.fingerprint for a in adapters if a.fingerprint]
    if not records:
        return {}
    return {**records[0], "tensors": {k: d for record in records for k, d in record["tensors"].items()}}
