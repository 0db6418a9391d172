"""What a merge must give, by means that share no code with inlay: numpy, exact integers, PEFT in float64.

Three yardsticks:

    rounded       one rounding of float64 values, for results that float64 holds exactly
    exact_sum     w + Σ s · left · right in exact integers, rounded once: the definition itself
    peft_float64  PEFT's own merge with model and adapters in float64, which rounds at 2**-53
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cases import MODELS, load_peft, third_party

U64 = 2.0**-53

# MultiheadAttention.merge adds the delta of out_proj and then calls out_proj.merge, which adds it again
# (peft 0.21.2, lora/layer.py; https://github.com/huggingface/peft/pull/3774). One delta is what it means.
DOUBLED_BY_PEFT = ("attention.base_layer.out_proj.base_layer.weight",)


@dataclass(frozen=True)
class Format:
    """A binary float: bits of the fraction, least exponent of a normal number, greatest exponent."""

    fraction: int
    least: int
    greatest: int

    @property
    def largest(self) -> float:
        return (2 - 2.0**-self.fraction) * 2.0**self.greatest


FORMATS = {"F32": Format(23, -126, 127), "BF16": Format(7, -126, 127), "F16": Format(10, -14, 15)}


def spacing(x: np.ndarray, dtype: str) -> np.ndarray:
    """Distance between neighbours of the format at |x|."""
    form = FORMATS[dtype]
    _, exponent = np.frexp(np.abs(x))
    exponent = np.where(x == 0, form.least, np.maximum(exponent - 1, form.least))
    return np.ldexp(1.0, exponent - form.fraction)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded once, to nearest, ties to even; beyond the range infinity."""
    step = spacing(x, dtype)
    nearest = np.rint(x / step) * step  # x / step is exact: step is a power of two
    return np.where(np.abs(nearest) > FORMATS[dtype].largest, np.copysign(np.inf, x), nearest)


# --- exact integers ---------------------------------------------------------------------------------


def _integers(x: np.ndarray) -> tuple[np.ndarray, int]:
    """`x == n · 2**-shift` with Python integers n."""
    ratios = [v.as_integer_ratio() for v in np.asarray(x, np.float64).reshape(-1).tolist()]
    shift = max((d.bit_length() - 1 for _, d in ratios), default=0)
    whole = np.array([n << (shift - (d.bit_length() - 1)) for n, d in ratios], object)
    return whole.reshape(np.shape(x)), shift


def exact_sum(weight: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> tuple[np.ndarray, int]:
    """`weight + Σ s · left @ right` as integers over a power of two: no rounding anywhere."""
    total, shift = _integers(weight)
    for left, right, scaling in pairs:
        l, a = _integers(left)  # noqa: E741
        r, b = _integers(right)
        s, c = _integers(np.array([scaling]))
        delta, other = (l @ r) * s[0], a + b + c
        common = max(shift, other)
        total = total * (1 << (common - shift)) + delta * (1 << (common - other))
        shift = common
    return total, shift


def round_exactly(total: np.ndarray, shift: int, dtype: str) -> np.ndarray:
    """Integers over 2**shift rounded once to the format: the correctly rounded result, in float64.

    Zero comes out as +0.0.
    """
    form = FORMATS[dtype]
    flat = [_round_one(n, shift, form) for n in total.reshape(-1).tolist()]
    return np.array(flat, np.float64).reshape(total.shape)


def _round_one(n: int, shift: int, form: Format) -> float:
    sign, n = (-1.0, -n) if n < 0 else (1.0, n)
    if n == 0:
        return 0.0
    exponent = max(n.bit_length() - 1 - shift, form.least) - form.fraction  # of the last place
    drop = exponent + shift
    if drop <= 0:
        q = n << -drop
    else:
        q, rest, half = n >> drop, n & ((1 << drop) - 1), 1 << (drop - 1)
        q += rest > half or (rest == half and q & 1)
    value = float(q) * 2.0**exponent if exponent > -1000 else 0.0
    return sign * (value if value <= form.largest else float("inf"))


# --- directories ------------------------------------------------------------------------------------


def shard_files(path: Path) -> list[Path]:
    """Weight files of a directory: those of the index, or the only one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        return [path / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [path / "model.safetensors"]


def header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, keys in stored order."""
    raw = file.read_bytes()
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def read(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint directory (or of one file), as torch tensors by key."""
    from safetensors.torch import load_file

    files = [path] if path.is_file() else shard_files(path)
    return {k: t for file in files for k, t in load_file(file).items()}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two directories hold the same values under the same keys."""
    a, b = read(one), read(other)
    assert a.keys() == b.keys()
    return all(a[key].equal(b[key]) for key in a)


def float64(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().double().numpy())


def bits(tensor: Any) -> np.ndarray:
    """The stored bits of a tensor, so that -0.0 and +0.0 differ."""
    import torch

    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return np.asarray(tensor.contiguous().view(kinds[tensor.element_size()]).numpy())


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two directories have the same weight files with the same bytes."""
    left, right = shard_files(a), shard_files(b)
    return [f.name for f in left] == [f.name for f in right] and all(
        x.read_bytes() == y.read_bytes() for x, y in zip(left, right, strict=True)
    )


# --- PEFT -------------------------------------------------------------------------------------------


def peft_merged(model: str, base: Path, adapters: Iterable[Path], dtype: str) -> dict[str, Any]:
    """State dict of PEFT's merge, computed with all base tensors in `dtype`.

    In float64 the adapter is held in float64 too (`autocast_adapter_dtype=False` gives it the type of the
    base), so that every value of the file enters exactly; else PEFT's default, adapters in float32.
    """
    module = MODELS[model].load(base, dtype)
    adapted = load_peft(module, *adapters, autocast=dtype != "F64")
    before = {k: t.clone() for k, t in module.state_dict().items() if k.endswith(DOUBLED_BY_PEFT)}
    with third_party():
        merged = dict(adapted.merge_and_unload().state_dict())
    for key in merged.keys() & {k.replace(".base_layer.", ".") for k in before}:
        weight = next(t for k, t in before.items() if k.replace(".base_layer.", ".") == key)
        merged[key] = weight + (merged[key] - weight) / 2
    return merged


def reach(values: np.ndarray, other: np.ndarray, rank: int = 16) -> float:
    """How far float64 arithmetic may be off: (r + few) u on the largest magnitude that takes part.

    The sum of magnitudes of r products is at most r times the largest; four more roundings for scaling,
    sum and, in DoRA, norm and quotient.
    """
    largest = max(float(np.abs(values).max(initial=0)), float(np.abs(values - other).max(initial=0)))
    return (rank + 4) * rank * U64 * largest


def correctly_rounded(stored: np.ndarray, exact: np.ndarray, error: float, dtype: str) -> np.ndarray:
    """Which stored values are the rounding of a number within `error` of `exact`."""
    return (rounded(exact - error, dtype) <= stored) & (stored <= rounded(exact + error, dtype))


def undecided(exact: np.ndarray, error: float, dtype: str) -> float:
    """Share of the elements that `error` leaves open: the blind spot of `correctly_rounded`."""
    return float(np.mean(rounded(exact - error, dtype) != rounded(exact + error, dtype))) if exact.size else 0.0


def logits_tolerance(logits: Any) -> float:
    """How far two float32 forward passes of the tiny models may differ, the weights being the same function.

    A weight rounded once in place of a delta added in the forward pass is off by u = 2**-24 of itself, and
    each of some 30 matrix products in a row sums at most 48 terms, each off by u: 30 · 48 · u of the
    largest activation, times a factor of 2 for what softmax and norms may magnify.
    """
    return 2 * 30 * 48 * 2.0**-24 * float(logits.abs().max())


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys whose tensors have other bits."""
    return [k for k in a if k not in b or a[k].shape != b[k].shape or not np.array_equal(bits(a[k]), bits(b[k]))]
