"""Deltas of several adapters mixed into one, element by element, by the methods of mergekit.

Adapter i brings a delta D_i (rows, cols) = Σ s L R over its pairs, and a weight w_i. With M_i a mask of what is
kept, the mixed delta is

    breadcrumbs          Σ w_i M_i D_i; M drops the int(gamma · size) largest magnitudes of a tensor and the smallest,
                         so that a share `density` is kept (Davari and Belilovsky 2023)
    della_linear         Σ w_i c_i M_i D_i; M is random: in each row the probability of being kept rises with the rank
                         of the magnitude from density - epsilon to density + epsilon (Deep et al. 2024);
                         c_i makes the sum of magnitudes what it was
    …_ties, della        the same over those that have the majority's sign; della divides by the sum of their weights
    slerp                the way on the sphere from D_0 to D_1, t = w_1 / (w_0 + w_1) of it; the straight one where they
                         are nearly parallel (|cosine| > 0.9995)
    model_stock          t times the mean, t = N c / (1 + (N - 1) c), c the mean cosine of two deltas (Jang et al. 2024)

as mergekit has them (sparsify.py, generalized_task_arithmetic.py, slerp.py, model_stock.py of 0.1.5), with four
differences. Deltas are those of the adapters and not differences of rounded models. Breadcrumbs with no
large magnitude to drop keeps what it should, where mergekit keeps nothing; equal magnitudes at a threshold are all
kept. model_stock takes t = 0 where the formula has no positive denominator. A module that one adapter alone has is
taken from it as it is by slerp and model_stock.

Everything is float64, each product summed in the order of its ranks and each statistic row by row, so the result
does not depend on how rows are cut into blocks. A random element is decided by the seed, the place of the
adapter, the name of the tensor and its row-major index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from inlay.dtypes import F64Array
from inlay.tuners.combining import BoolArray, mask_key

BLOCK_ELEMENTS = 1 << 17  # worked on at a time: a megabyte for each of about a dozen arrays
PARALLEL = 0.9995
LEAST_SUM = 1e-7  # sums of magnitudes that are not rescaled, as in mergekit
LEAST_NORM = 1e-6


@dataclass(frozen=True)
class Method:
    """What a method has: a mask of its deltas ("outliers", "ranks" or none), signs, and a normalised sum."""

    prunes: str = ""
    elects_sign: bool = False
    normalises: bool = False
    most: int | None = None  # adapters
    weighted: bool = True


METHODS: dict[str, Method] = {
    "breadcrumbs": Method("outliers"),
    "breadcrumbs_ties": Method("outliers", elects_sign=True),
    "della": Method("ranks", elects_sign=True, normalises=True),
    "della_linear": Method("ranks"),
    "slerp": Method(most=2),
    "model_stock": Method(weighted=False),
}
GAMMA, EPSILON = 0.01, 0.15  # mergekit's


@dataclass(frozen=True)
class Mix:
    """A method, its settings, and the places in the list of the adapters that take part."""

    name: str
    tensor: str
    positions: Sequence[int]
    weights: Sequence[float]
    density: float = 1.0
    gamma: float = GAMMA
    epsilon: float = EPSILON
    majority_sign: str = "total"
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """scaling · left @ right: right (r, cols); `left` gives rows [first, last), (rows, r), None for ones."""

    scaling: float
    right: F64Array
    left: Callable[[int, int], F64Array] | None

    def add_to(self, out: F64Array, first: int) -> None:
        """Add its rows from `first` on, rank by rank: no sum depends on how many rows there are."""
        left = np.ones((len(out), 1)) if self.left is None else self.left(first, first + len(out))
        for k in range(len(self.right)):
            out += (self.scaling * left[:, k : k + 1]) * self.right[k]


class Mixer:
    """The mixed delta of one tensor, (rows, cols); `terms` are the pairs of each adapter."""

    def __init__(self, mix: Mix, terms: Sequence[Sequence[Pair]], shape: tuple[int, int]) -> None:
        self.mix = mix
        self.method = METHODS[mix.name]
        self.terms = terms
        self.height, self.width = shape

    def rows(self, first: int, last: int) -> F64Array:
        """Rows [first, last), float64."""
        out = np.empty((last - first, self.width))
        for at, end in self._blocks(first, last):
            out[at - first : end - first] = self._few_rows(at, end)
        return out

    def _few_rows(self, first: int, last: int) -> F64Array:
        deltas = [self._delta(i, first, last) for i in range(len(self.terms))]
        if self.mix.name in ("slerp", "model_stock"):
            factors = self._factors if len(deltas) > 1 else [1.0]
            return _sum(f * d for f, d in zip(factors, deltas, strict=True))
        for i, delta in enumerate(deltas):
            if self.mix.density < 1:
                delta *= self._keep(i, delta, first)
                delta *= self._rescale[i]
        return self._mixed(deltas)

    def _mixed(self, deltas: list[F64Array]) -> F64Array:
        weighted = [w * d for w, d in zip(self.mix.weights, deltas, strict=True)]
        if not self.method.elects_sign:
            return _sum(iter(weighted))
        votes = _sum(iter(weighted if self.mix.majority_sign == "total" else [np.sign(d) for d in weighted]))
        sign = np.where(votes >= 0, 1.0, -1.0)
        agrees = [np.sign(d) == sign for d in weighted]
        total = _sum(np.where(a, d, 0.0) for a, d in zip(agrees, weighted, strict=True))
        total[np.isnan(votes)] = np.nan  # of Inf and NaN, which would agree with no sign and so be lost
        if self.method.normalises:
            divisor = _sum(w * a.astype(np.float64) for w, a in zip(self.mix.weights, agrees, strict=True))
            total /= np.where(divisor == 0, 1.0, divisor)
        return total

    def _delta(self, i: int, first: int, last: int) -> F64Array:
        out = np.zeros((last - first, self.width))
        for pair in self.terms[i]:
            pair.add_to(out, first)
        return out

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """These rows, a few at a time."""
        step = max(1, BLOCK_ELEMENTS // max(1, self.width))
        for at in range(first, last, step):
            yield at, min(last, at + step)

    def _all_rows(self, i: int) -> Iterator[tuple[int, F64Array]]:
        for first, last in self._blocks(0, self.height):
            yield first, self._delta(i, first, last)

    def _keep(self, i: int, delta: F64Array, first: int) -> BoolArray:
        if self.method.prunes == "outliers":
            low, high = self._thresholds[i]
            size = np.abs(delta).astype(np.float32)
            keep: BoolArray = (size >= low) & (size <= high)
            return keep
        order = np.argsort(np.abs(delta), axis=1, kind="stable")
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(self.width)[None, :], axis=1)
        mix = self.mix
        likely = (mix.density - mix.epsilon) + ranks * (2 * mix.epsilon / max(1, self.width - 1))
        key = mask_key(mix.seed, mix.positions[i], mix.tensor, "delta")
        kept: BoolArray = _uniform(key, first * self.width, delta.size).reshape(delta.shape) < likely
        return kept

    @cached_property
    def _thresholds(self) -> list[tuple[np.float32, np.float32]]:
        """Least and largest magnitude that breadcrumbs keeps of each delta, as float32."""
        size = self.height * self.width
        kept, top = int(self.mix.density * size), int(self.mix.gamma * size)
        bottom = size - kept - top
        if bottom < 0:
            top, bottom = top + bottom, 0
        last = size - top - 1
        if last < bottom:  # nothing is kept
            return [(np.float32(np.inf), np.float32(0))] * len(self.terms)
        return [self._ordered(i, bottom, last) for i in range(len(self.terms))]

    def _ordered(self, i: int, *places: int) -> tuple[np.float32, np.float32]:
        """The magnitudes with these numbers in ascending order: counts of the upper 16 bits, then of the lower."""
        upper = np.zeros(1 << 16, np.int64)
        for _, delta in self._all_rows(i):
            upper += np.bincount(_bits(delta) >> np.uint32(16), minlength=1 << 16)
        ends = np.cumsum(upper)
        heads = [int(np.searchsorted(ends, place, side="right")) for place in places]
        lower = {head: np.zeros(1 << 16, np.int64) for head in heads}
        for _, delta in self._all_rows(i):
            bits = _bits(delta)
            for head, counts in lower.items():
                there = bits[bits >> np.uint32(16) == head] & np.uint32(0xFFFF)
                counts += np.bincount(there, minlength=1 << 16)
        found = []
        for place, head in zip(places, heads, strict=True):
            before = int(ends[head] - upper[head])
            tail = int(np.searchsorted(np.cumsum(lower[head]), place - before, side="right"))
            found.append(np.array([(head << 16) | tail], np.uint32).view(np.float32)[0])
        return found[0], found[1]

    @cached_property
    def _rescale(self) -> list[float]:
        """Factors that give a thinned delta the sum of magnitudes that it had; mergekit's `rescale`, della only."""
        if self.method.prunes != "ranks":
            return [1.0] * len(self.terms)
        factors = []
        for i in range(len(self.terms)):
            before, after = [], []
            for first, delta in self._all_rows(i):
                size = np.abs(delta)
                before += size.sum(axis=1).tolist()
                after += (size * self._keep(i, delta, first)).sum(axis=1).tolist()
            was, is_ = math.fsum(before), math.fsum(after)
            factors.append(1.0 if was < LEAST_SUM or is_ < LEAST_SUM else was / is_)
        return factors

    @cached_property
    def _factors(self) -> list[float]:
        """What slerp and model_stock multiply each delta by."""
        gram = self._gram()
        count = len(gram)
        if self.mix.name == "slerp":
            first, second = self.mix.weights
            return _slerp(second / (first + second), gram)
        cosines = [
            max(-1.0, min(1.0, gram[i][j] / max(math.sqrt(gram[i][i]) * math.sqrt(gram[j][j]), LEAST_NORM)))
            for i in range(count)
            for j in range(i + 1, count)
        ]
        c = math.fsum(cosines) / len(cosines)
        below = 1 + (count - 1) * c
        return [(count * c / below if below > 0 else 0.0) / count] * count

    def _gram(self) -> list[list[float]]:
        """Inner products of the deltas."""
        count = len(self.terms)
        sums: dict[tuple[int, int], list[float]] = {(i, j): [] for i in range(count) for j in range(i, count)}
        for first, last in self._blocks(0, self.height):
            deltas = [self._delta(i, first, last) for i in range(count)]
            for (i, j), values in sums.items():
                values += (deltas[i] * deltas[j]).sum(axis=1).tolist()
        return [[math.fsum(sums[min(i, j), max(i, j)]) for j in range(count)] for i in range(count)]


def _slerp(t: float, gram: list[list[float]]) -> list[float]:
    norms = math.sqrt(gram[0][0]), math.sqrt(gram[1][1])
    cosine = gram[0][1] / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0
    if abs(cosine) > PARALLEL:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin(angle * (1 - t)) / math.sin(angle), math.sin(angle * t) / math.sin(angle)]


def _bits(delta: F64Array) -> np.ndarray:
    """Magnitudes as the bits of float32, which order as the magnitudes do."""
    return np.abs(delta).astype(np.float32).view(np.uint32).reshape(-1)


def _uniform(key: int, start: int, count: int) -> F64Array:
    """Numbers in [0, 1) for the elements [start, start + count): see `combining.random_keep` for the stream."""
    generator = np.random.Philox(key=key).advance(start // 4)  # four numbers a step of the counter
    raw = generator.random_raw(start % 4 + count)[start % 4 :]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _sum(arrays: Iterator[F64Array]) -> F64Array:
    total = next(arrays).copy()
    for x in arrays:
        total += x
    return total
