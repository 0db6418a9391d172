"""Tensors that no file holds, made from stored ones when they are read: decoded weights, combined factors.

A reference to such a tensor carries its formula by name, the stored tensors it is made of, and its settings. To
everything that reads by reference it is a tensor like others; its bytes are those of its values, row-major.

    codec     a quantised weight, decoded (`inlay.codecs`): float32, row block by row block
    simulated  a weight as it would be decoded, had it been quantised: float32; its codes are kept
    factor    A or B of a combination of LoRA pairs (`inlay.tuners.combining`): float32, whole (`pair` for both)
    mixture   a delta mixed of several adapters' (`inlay.tuners.mixing`): float64, row block by row block
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from inlay.checkpoints.refs import Made, TensorRef
from inlay.codecs import compiled
from inlay.codecs.encoding import F32Array, encode_whole, row_blocks, settled
from inlay.codecs.table import codec
from inlay.dtypes import DTYPES, F32, Array, F64Array, decode, decode32, is_finite, round_nearest
from inlay.errors import InputError
from inlay.tuners import combining, mixing

BLOCK_ELEMENTS = 1 << 18  # of a weight that is encoded to be decoded again

Rows = Callable[[int, int], Array]  # stored bits of rows [first, last)
Slices = Callable[[Mapping[str, tuple[int, int, int] | None]], dict[str, Array]]  # parts of a weight, cut


class Maker(NamedTuple):
    """Makes rows of a tensor, and where a kernel does it, into an array (last − first, cols) that is there."""

    rows: Rows
    into: Callable[[int, int, Array], None] | None = None


class Reader(Protocol):
    """What reads the stored tensors: `inlay.checkpoints.spans.SpanReader`."""

    def rows(self, ref: TensorRef, first: int, last: int) -> Array: ...

    def view(self, ref: TensorRef, start: int, shape: tuple[int, int], strides: tuple[int, int]) -> Array: ...

    def slice(self, ref: TensorRef, span: tuple[int, int, int] | None) -> Array: ...

    def whole(self, ref: TensorRef) -> Array: ...

    def maker(self, made: Made) -> Maker: ...


@lru_cache(maxsize=256)
def read_settings(text: str) -> dict[str, Any]:
    """Settings of a formula; shared, so not to be changed."""
    return dict(json.loads(text))


def maker(reader: Reader, made: Made) -> Maker:
    """The function that makes rows of the tensor; what it keeps for all rows is made once, here or on first use."""
    makers = {"codec": _decoder, "factor": _factor, "pair": _pair, "mixture": _mixture, "simulated": _simulated}
    return makers[made.formula](reader, made)


def _decoder(reader: Reader, made: Made) -> Maker:
    settings, parts = read_settings(made.settings), dict(made.parts)

    def slices(spans: Mapping[str, tuple[int, int, int] | None]) -> dict[str, Array]:
        return {name: reader.slice(parts[name], span) for name, span in spans.items()}

    return _decoding(settings, slices)


def _decoding(settings: Mapping[str, Any], slices: Slices) -> Maker:
    form = codec(settings["codec"])

    def rows(first: int, last: int) -> Array:
        decoded: Array = form.decode(slices(form.spans(settings, first, last)), settings, first, last)
        return decoded

    def into(first: int, last: int, out: Array) -> None:
        form.decode_into(slices(form.spans(settings, first, last)), settings, first, last, out)

    return Maker(rows, into if compiled.serves(form, settings) else None)


def _simulated(reader: Reader, made: Made) -> Maker:
    settings, ref = read_settings(made.settings), dict(made.parts)["weight"]
    form, count = codec(settings["codec"]), ref.matrix[0]
    step = form.align(settings) * max(1, BLOCK_ELEMENTS // (form.align(settings) * max(1, made.cols)))
    cast = DTYPES[settings.get("cast", "F32")]

    def blocks() -> Iterator[tuple[int, F32Array]]:
        for first, last in row_blocks(count, step):
            values = decode32(reader.rows(ref, first, last), ref.dtype)
            yield first, values if cast is F32 else decode32(round_nearest(values.astype(np.float64), cast), cast)

    try:
        parts = encode_whole(form, settings, blocks)
        settings = {**settled(form, settings, parts), "codec": settings["codec"]}
    except ValueError as error:
        raise InputError(f"{ref.key}: {error}") from error

    return _decoding(settings, lambda spans: {name: _cut(parts[name], span) for name, span in spans.items()})


def _cut(part: Array, span: tuple[int, int, int] | None) -> Array:
    return part if span is None else part[(slice(None),) * span[0] + (slice(span[1], span[2]),)]


def _factor(reader: Reader, made: Made) -> Maker:
    """One of the two; both are made at once, and the other is wanted next."""
    settings = dict(read_settings(made.settings))
    which = "AB".index(settings.pop("part"))
    pair = reader.maker(Made.of("pair", dict(made.parts), settings, 1))
    return Maker(lambda first, last: pair.rows(which, which + 1)[first:last])


def _pair(reader: Reader, made: Made) -> Maker:
    settings, parts = read_settings(made.settings), dict(made.parts)

    def matrix(ref: TensorRef) -> F64Array:
        return decode(reader.whole(ref), ref.dtype).reshape(ref.shape[0], -1)

    pairs = [
        combining.Pair(**pair, a=matrix(parts[f"a{i}"]), b=matrix(parts[f"b{i}"]))
        for i, pair in enumerate(settings["pairs"])
    ]
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            combined = combining.combine(combining.Recipe(**settings["recipe"]), settings["module"], pairs)
            a, b = (round_nearest(x, F32) for x in combined)
        finite = bool(is_finite(a, F32).all() and is_finite(b, F32).all())
    except np.linalg.LinAlgError:  # what numpy says of Inf and NaN
        finite = False
    if not finite:
        raise InputError(f"{settings['module']}: the combination is too large for float32; nothing was written")
    return Maker(lambda which, _: (a, b)[which])


def _mixture(reader: Reader, made: Made) -> Maker:
    settings, parts = read_settings(made.settings), dict(made.parts)

    def view(name: str, place: list[int], first: int, last: int) -> F64Array:
        start, _, cols, down, right = place
        ref = parts[name]
        stored = reader.view(ref, start + first * down, (last - first, cols), (down, right))
        return np.ascontiguousarray(decode(stored, ref.dtype))

    def stretches(name: str, places: list[list[int]], first: int, last: int) -> F64Array:
        found, at = [], 0
        for place in places:  # one below the other
            begin, end = max(first, at), min(last, at + place[1])
            if begin < end:
                found.append(view(name, place, begin - at, end - at))
            at += place[1]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def pair(name: str, step: dict[str, Any]) -> mixing.Pair:
        left = partial(stretches, f"left{name}", step["left"]) if step["left"] else None
        return mixing.Pair(step["scaling"], view(f"right{name}", step["right"], 0, step["right"][1]), left)

    terms = [[pair(f"{i}.{j}", step) for j, step in enumerate(steps)] for i, steps in enumerate(settings["terms"])]
    mixer = mixing.Mixer(mixing.Mix(**settings["mix"]), terms, tuple(settings["shape"]))

    def rows(first: int, last: int) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are found where the result is
            return mixer.rows(first, last)

    return Maker(rows)
