"""What a plan is asked for: inputs opened and read, settings checked, before anything is decided."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from inlay.adapters.adapter import Adapter, read_adapter
from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.decoded import Decoded, decode_checkpoint, quantisation
from inlay.dtypes import BY_TORCH_NAME
from inlay.errors import InputError, PlanError, Problem
from inlay.plan.combination import Options, method_problems, weight_problems
from inlay.plan.quant import Quant, request_problems
from inlay.plan.types import Settings

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Request:
    """A base, the adapters to merge into it with their weights, and the settings.

    `decoded` is the base in floats, if it is stored in codes and anything is to be done with its values.
    """

    base: Checkpoint
    decoded: Decoded | None
    adapters: Sequence[Adapter]
    weights: tuple[float, ...]
    settings: Settings
    options: Options
    quant: Quant


def read_request(
    model: StrPath | Checkpoint,
    adapters: Sequence[StrPath | Adapter],
    *,
    weights: Sequence[float] | None,
    torch_dtype: str | None,
    combine_by: str,
    options: Options,
    quant: Quant,
    max_shard_size: int | str | None,
) -> Request:
    """The arguments of `make_plan`, read. Raises PlanError for what contradicts itself or cannot be decoded."""
    base = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
    if problems := method_problems(combine_by, options) + weight_problems(combine_by, weights, len(read)):
        raise PlanError(problems)
    factors = (1.0,) * len(read) if weights is None else tuple(float(w) for w in weights)
    dtype = dtype_name(torch_dtype)
    quantised = quantisation(base) is not None
    if problems := request_problems(quant, dtype, quantised, bool(read)):
        raise PlanError(problems)
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    settings = Settings(dtype, combine_by, shard_bytes, options.given(), quant.given())
    decoded = decode_checkpoint(base) if quantised and (read or dtype or quant.keep or quant.method) else None
    if decoded and decoded.problems:  # what the adapters lack would only repeat it
        method = (quantisation(base) or {}).get("quant_method", "no method named")
        what = f"is quantised ({method}), and cannot be read so; mend it, or give the 16-bit original with --model"
        raise PlanError([Problem(str(base.path), what), *decoded.problems])
    return Request(base, decoded, read, factors, settings, options, quant)


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text such as "512MB", "5GB", "64MiB"."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size.lower())
    if not found:
        raise InputError(f"{size!r} is not a size; write it like 512MB, 5GB or 64MiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))


def dtype_name(name: str | None) -> str | None:
    """The type of the output by its safetensors name; None for each tensor's own. Raises InputError."""
    if name is None or name == "auto":
        return None
    found = BY_TORCH_NAME.get(name.lower().removeprefix("torch."))
    if found is None or found.name == "F64":
        raise InputError(f"torch_dtype {name!r} is not supported; use bfloat16, float16 or float32")
    return found.name
