"""One call: a checkpoint in floats in, a quantised one out, checked before anybody sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.decoded import Decoded, decode_checkpoint, quantisation
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.dtypes import Array
from inlay.errors import CheckFailed, InputError, OutputError
from inlay.output.destination import check_destination
from inlay.output.staging import Staging
from inlay.quantising.awq import Scaled, quantise_awq
from inlay.quantising.calibration import MAX_LENGTH, SAMPLES, Text, read_texts
from inlay.quantising.gptq import quantise_gptq

METHODS = ("awq", "gptq")


@dataclass(frozen=True)
class Quantised:
    """What was written: bytes of all weights, how many are quantised, modules left as they are, and for AWQ the groups
    with their errors. `checked` weights were decoded again and compared with what was encoded (GPTQ: with nothing, for
    its codes make up for each other's errors; they are decoded and must be finite)."""

    path: Path
    method: str
    nbytes: int
    weights: int
    checked: int
    excluded: tuple[str, ...]
    tokens: int
    groups: tuple[Scaled, ...] = ()


def quantise(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    method: str,
    *,
    bits: int = 4,
    group_size: int = 128,
    texts: Sequence[Text] | None = None,
    samples: int = SAMPLES,
    max_length: int = MAX_LENGTH,
    keep: Sequence[str] = (),
    max_memory: int | None = None,
    exist_ok: bool = False,
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[Path, Checkpoint], None] | None = None,
) -> Quantised:
    """Quantise the checkpoint in `source` into the directory `output`, which appears whole or not at all.

    `texts` are what it is calibrated with (those of the package if not given), `keep` are patterns of modules that stay
    in 16 bits. `progress` is called with the layers that are done and all, `finish` with the folder and its checkpoint
    before it is published.
    Raises InputError for what cannot be done, before anything is written, and CheckFailed for a result that is not
    what was meant, which is removed.
    """
    if method not in METHODS:
        raise InputError(f"{method!r} is no method of quantising with calibration; there are {', '.join(METHODS)}")
    base, target = open_source(Path(source)), Path(output)
    texts = read_texts() if texts is None else texts
    problems = check_destination(target, {"base": base.path}, exist_ok, base.nbytes // 2)
    if problems:
        raise OutputError("; ".join(f"{p.where}: {p.what}" for p in problems))
    work: Callable[..., Any] = quantise_awq if method == "awq" else quantise_gptq
    # Nothing of an earlier run is taken up, so no two runs have the same inputs.
    with Staging(target, f"quantise-{method}", {"started": time.time_ns()}) as staging:
        try:
            made = work(
                base, staging.path, texts=texts, bits=bits, group_size=group_size, samples=samples,
                max_length=max_length, keep=keep, max_memory=max_memory, progress=progress,
            )  # fmt: skip
            result, decoded = check_result(staging.path, set(made.settings), made.samples)
            if finish is not None:
                finish(staging.path, result)
        except BaseException:
            staging.discard()
            raise
        staging.publish()
    return Quantised(
        target, method, result.nbytes, len(decoded.encodings), len(made.samples), made.excluded, made.tokens,
        tuple(made.groups),
    )  # fmt: skip


def open_source(source: Path) -> Checkpoint:
    """A checkpoint in floats. Raises InputError for one that is quantised already, or no language model."""
    base = open_checkpoint(source)
    if (found := quantisation(base)) is not None:
        method = found.get("quant_method", "codes")
        raise InputError(f"{source}: is quantised already ({method}); decode it first: inlay export --fp16 true")
    if base.components or not base.config:
        raise InputError(f"{source}: has no config.json of a language model, which calibration needs")
    return base


def check_result(
    folder: Path, intended: set[str], samples: Mapping[str, tuple[int, Array]]
) -> tuple[Checkpoint, Decoded]:
    """Read the result as any reader would. Raises CheckFailed where it is not what was meant.

    `intended` are the weights that should be quantised, `samples` rows of them as they were given to the encoder.
    """
    result = open_checkpoint(folder)
    decoded = decode_checkpoint(result)
    if decoded.problems:
        raise CheckFailed("; ".join(f"{p.where}: {p.what}" for p in decoded.problems))
    if missing := sorted(intended - decoded.encodings.keys()):
        raise CheckFailed(f"{len(missing)} weights should be quantised and are not: {missing[0]}")
    with SpanReader({BASE: folder}) as reader:
        for key, (first, wanted) in samples.items():
            shard, info = decoded.checkpoint.tensors[key]
            found = reader.rows(TensorRef.of(BASE, shard.file, info), first, first + len(wanted))
            _check_rows(key, found, wanted, decoded.encodings[key].settings)
    return result, decoded


def _check_rows(key: str, found: Array, wanted: Array, settings: Mapping[str, Any]) -> None:
    """Each value within half a step of its group, the step being the group's range in 15 parts, in float16."""
    size = settings["group_size"] if settings["group_size"] > 0 else wanted.shape[1]
    groups = wanted.astype(np.float64).reshape(len(wanted), -1, size)
    step = (np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)) / (2 ** settings["bits"] - 1)
    bound = step / 2 * (1 + 2.0**-9) + 2.0**-24  # the scale is rounded up; the second term: subnormal scales
    off = np.abs(found.reshape(groups.shape) - groups).max(-1)
    if not (off <= bound).all():
        raise CheckFailed(f"{key}: decodes {float((off / bound).max()) / 2:.3g} steps away from what was encoded")
