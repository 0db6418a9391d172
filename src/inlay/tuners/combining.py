"""Several LoRA pairs of one module made into one pair, by the methods of PEFT's `add_weighted_adapter`.

Adapter i brings A_i (r_i, in) and B_i (out, r_i), a scaling s_i and a weight w_i. Its part of the sum is
c_i B_i A_i with c_i = w_i s_i. The result is a pair A, B whose own scaling is 1.

    cat       A = [c_i A_i] below each other, B = [B_i] side by side: the exact sum, of rank Σ r_i
    linear    A = Σ sgn(c_i) √|c_i| A_i, B = Σ √|c_i| B_i: equal ranks, and cross terms B_i A_j
    svd       the nearest product of a given rank to the sum (Eckart and Young 1936)
    magnitude_prune, ties, dare_linear, dare_ties       as linear, each A_i and each B_i pruned before
    …_svd     the same on the deltas s_i B_i A_i with weights w_i, and svd of what comes out

    prune     magnitude (magnitude_prune, ties): keep the int(density · size) largest elements;
              random (dare): keep each element with probability density, divide by density. Density 1: keep all
    ties      Yadav et al. 2023: elect a sign for each element, from the pruned tensors without their weights;
              average, over those that have this sign, of the weighted tensors
    dare      Yu et al. 2023

Everything is float64. A random element is kept or dropped by the seed, the place of the adapter in the list,
the names of module and factor, and its own row-major index: by nothing else (see `random_keep`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.digests import digest_json
from inlay.dtypes import F64Array
from inlay.tuners.decomposition import svd

MAJORITY_SIGNS = ("total", "frequency")
KEEP_BLOCK = 1 << 20  # random numbers drawn at a time
KEY_DIGITS = 32  # of a digest in hex: the 128 bits of a Philox key

BoolArray = npt.NDArray[np.bool_]
Tensors = Callable[[], Iterator[F64Array]]  # starts a pass over tensors of one shape, one at a time


@dataclass(frozen=True)
class Method:
    """`prunes` is "", "magnitude" or "random"; `on_deltas` tells methods that end in a truncated SVD."""

    prunes: str = ""
    elects_sign: bool = False
    on_deltas: bool = False


METHODS: dict[str, Method] = {
    "cat": Method(),
    "linear": Method(),
    "svd": Method(on_deltas=True),
    "ties": Method("magnitude", elects_sign=True),
    "ties_svd": Method("magnitude", elects_sign=True, on_deltas=True),
    "dare_linear": Method("random"),
    "dare_ties": Method("random", elects_sign=True),
    "dare_linear_svd": Method("random", on_deltas=True),
    "dare_ties_svd": Method("random", elects_sign=True, on_deltas=True),
    "magnitude_prune": Method("magnitude"),
    "magnitude_prune_svd": Method("magnitude", on_deltas=True),
}


@dataclass(frozen=True)
class Recipe:
    """A method and its settings; those that the method has no use for change nothing."""

    name: str
    density: float = 1.0
    majority_sign: str = "total"
    svd_rank: int = 1
    seed: int = 0

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def needs_equal_ranks(self) -> bool:
        return self.name != "cat" and not self.method.on_deltas


@dataclass(frozen=True)
class Pair:
    """What the adapter at `position` in the list adds: weight · scaling · b @ a, a (r, in), b (out, r)."""

    position: int
    weight: float
    scaling: float
    a: F64Array
    b: F64Array

    @property
    def factor(self) -> float:
        return self.weight * self.scaling


def result_rank(recipe: Recipe, ranks: Sequence[int], outputs: int, inputs: int) -> int:
    """Rank of the result for pairs of these ranks on a weight (outputs, inputs)."""
    if recipe.name == "cat":
        return sum(ranks)
    if not recipe.method.on_deltas:
        return ranks[0]
    largest = sum(ranks) if recipe.name == "svd" else max(outputs, inputs)
    return min(recipe.svd_rank, outputs, inputs, largest)


def combine(recipe: Recipe, module: str, pairs: Sequence[Pair]) -> tuple[F64Array, F64Array]:
    """A (r, in) and B (out, r) of the result, r = `result_rank`."""
    if recipe.name == "cat":
        return np.vstack([p.factor * p.a for p in pairs]), np.hstack([p.b for p in pairs])
    if recipe.name == "svd":
        return _nearest_to_sum(pairs, recipe.svd_rank)
    if recipe.method.on_deltas:
        deltas = _pruned(recipe, module, "delta", pairs, lambda p: p.scaling * (p.b @ p.a))
        return _nearest(_mixed(recipe, deltas, [p.weight for p in pairs]), recipe.svd_rank)
    roots = [math.sqrt(abs(p.factor)) for p in pairs]
    signed = [math.copysign(root, p.factor) for root, p in zip(roots, pairs, strict=True)]
    a = _mixed(recipe, _pruned(recipe, module, "A", pairs, lambda p: p.a), signed)
    b = _mixed(recipe, _pruned(recipe, module, "B", pairs, lambda p: p.b), roots)
    return a, b


def _pruned(
    recipe: Recipe, module: str, part: str, pairs: Sequence[Pair], tensor: Callable[[Pair], F64Array]
) -> Tensors:
    """Passes over the pruned tensors: made anew each time, so that one delta at a time is in memory."""

    def one(pair: Pair) -> F64Array:
        x = tensor(pair)
        if recipe.density >= 1 or not recipe.method.prunes:
            return x
        if recipe.method.prunes == "magnitude":
            return np.where(largest_keep(x, recipe.density), x, 0.0)
        key = mask_key(recipe.seed, pair.position, module, part)
        return np.where(random_keep(key, x.size, recipe.density).reshape(x.shape), x / recipe.density, 0.0)

    return lambda: map(one, pairs)


def largest_keep(x: F64Array, density: float) -> BoolArray:
    """True for the int(density · size) elements of largest magnitude; of equal ones, for the first."""
    size = np.abs(x).reshape(-1)
    count = int(density * size.size)
    if count == 0:
        return np.zeros(x.shape, bool)
    least = np.partition(size, size.size - count)[size.size - count]
    keep: BoolArray = size > least
    keep[np.flatnonzero(size == least)[: count - int(keep.sum())]] = True
    return keep.reshape(x.shape)


def mask_key(seed: int, position: int, module: str, part: str) -> int:
    """Key of the random numbers for one tensor: 128 bits of the digest of its JSON, [seed, position, module, part].

    `part` is "A" or "B", or "delta" for the methods that end in an SVD.
    """
    return int(digest_json([seed, position, module, part]).partition(":")[2][:KEY_DIGITS], 16)


def random_keep(key: int, count: int, density: float) -> BoolArray:
    """True with probability `density`, independently for each of `count` elements.

    Element n is kept if the upper 53 bits of the n-th output of Philox4x64-10 (Salmon et al. 2011) with this
    key and a counter that begins at 0 are less than density · 2⁵³. numpy keeps this stream for all versions.
    """
    generator, below = np.random.Philox(key=key), np.uint64(math.ceil(density * 2**53))
    keep = np.empty(count, bool)
    for start in range(0, count, KEEP_BLOCK):
        block = keep[start : start + KEEP_BLOCK]
        block[:] = generator.random_raw(block.size) >> np.uint64(11) < below
    return keep


def _mixed(recipe: Recipe, tensors: Tensors, weights: Sequence[float]) -> F64Array:
    """Weighted sum of the tensors, or average over those that have the majority's sign."""
    if not recipe.method.elects_sign:
        return _sum(w * x for w, x in zip(weights, tensors(), strict=True))
    sign = majority_sign(tensors(), recipe.majority_sign)
    total, count = np.zeros(sign.shape), np.zeros(sign.shape)
    for w, x in zip(weights, tensors(), strict=True):
        agrees = np.sign(x) == sign  # never for a zero
        total += np.where(agrees, w * x, 0.0)
        count += agrees
    return total / np.maximum(count, 1.0)


def majority_sign(tensors: Iterator[F64Array], how: str) -> F64Array:
    """1 or -1 for each element, 1 where it is undecided: of the sum, or (frequency) of the sum of signs."""
    total = _sum(np.sign(x) if how == "frequency" else x for x in tensors)
    return np.where(total >= 0, 1.0, -1.0)


def _sum(tensors: Iterator[F64Array]) -> F64Array:
    total = next(tensors).copy()
    for x in tensors:
        total += x
    return total


def _nearest(delta: F64Array, rank: int) -> tuple[F64Array, F64Array]:
    """The pair of this rank whose product is nearest to `delta`; the singular values are in B."""
    u, s, v = svd(delta)
    return v[:rank], u[:, :rank] * s[:rank]


def _nearest_to_sum(pairs: Sequence[Pair], rank: int) -> tuple[F64Array, F64Array]:
    """`_nearest` to Σ c_i B_i A_i, whose rank is small: the sum itself, (out, in), is never made."""
    left, upper = np.linalg.qr(np.hstack([p.factor * p.b for p in pairs]))
    right, lower = np.linalg.qr(np.vstack([p.a for p in pairs]).T)
    a, b = _nearest(upper @ lower.T, rank)
    return a @ right.T, left @ b
