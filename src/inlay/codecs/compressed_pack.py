"""compressed-tensors `pack-quantized`: integers of 2, 4 or 8 bits in 32-bit words.

    weight_packed       I32, (out, ⌈in/p⌉), p = 32/bits; value j of a row is in word j // p from bit (j % p)·bits on,
                        as q + 2^(bits−1); the rest of the last word is 0
    weight_shape        I64, [out, in]
    weight_scale, weight_zero_point, weight_g_idx as in `scaled`

compressors/pack_quantized/helpers.py, 0.17. Words are little endian, so that a row is its codes from the low bits of
its first byte on. Of 3, 5, 6 and 7 bits, 0.17 leaves bits of a word empty and 0.20 does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import compressed_config, scaled, scaled_form
from inlay.codecs.floats import look_up, wide
from inlay.dtypes import Array

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

METHODS = ("compressed-tensors",)
PARTS = {
    "weight_packed": ".weight_packed",
    "weight_scale": ".weight_scale",
    "weight_shape": ".weight_shape",
}
OPTIONAL = {"weight_zero_point": ".weight_zero_point", "weight_g_idx": ".weight_g_idx"}
NAME_SUFFIX = ".weight"
CODES = ("I32",)
EXTRAS = compressed_config.EXTRAS

FORMATS = ("pack-quantized",)
BITS = (2, 4, 8)


def settings(
    config: Mapping[str, Any], module: str, found: scaled_form.Found, read: Callable[[str], Array]
) -> dict[str, Any]:
    """Shape, arguments and grid of the weight of this module."""
    group = compressed_config.scheme(config, module)
    compressed_config.check_format(group, FORMATS, module, "weight_packed I32")
    scaled_form.require(module, found, "weight_shape")
    _check_bits(group["weights"]["num_bits"], module)
    for part, types in (("weight_packed", CODES), ("weight_shape", ("I64", "I32"))):
        if found[part][0] not in types:
            raise ValueError(f"{module}.{part} is {found[part][0]}, not {' or '.join(types)}")
    shape = [int(side) for side in read("weight_shape")]
    settings = scaled_form.read_settings(module, shape, "I32", group["weights"], found, read)
    settings |= _more(group, found["weight_shape"][0])
    wanted = layout(settings)["weight_packed"][1]
    if found["weight_packed"][1] != wanted:
        raise ValueError(
            f"{module}.weight_packed is {list(found['weight_packed'][1])}, but a weight {shape} of "
            f"{group['weights']['num_bits']} bits has {list(wanted)}"
        )
    return settings


def fresh(shape: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight. Options: `scheme`, `group_size`, `scale_dtype` (BF16)."""
    group = compressed_config.fresh(options, ("W4A16", "W4A16_ASYM", "W8A16"))
    made = scaled_form.made(list(shape), "I32", group["weights"], options.get("scale_dtype", "BF16"))
    return made | _more(group, "I64")


config = compressed_config.made


def _more(group: Mapping[str, Any], shape_dtype: str) -> dict[str, Any]:
    return {"weight_shape": shape_dtype, "activations": group["input_activations"], "format": FORMATS[0]}


def _check_bits(bits: int, module: str) -> None:
    if bits in (3, 5, 6, 7):
        raise ValueError(
            f"{module} is packed with {bits} bits, which compressed-tensors 0.17 and 0.20 lay out differently without "
            "saying which; decompress it with the version that wrote it"
        )
    if bits not in BITS:
        raise ValueError(f"{module} is packed with {bits} bits; {', '.join(map(str, BITS))} are read")


def layout(settings: Mapping[str, Any]) -> scaled_form.Layout:
    """The words, the shape and what scales the codes."""
    rows, columns = settings["shape"]
    words = -(-columns // (32 // settings["weights"]["num_bits"]))
    return {
        "weight_packed": ("I32", (rows, words)),
        "weight_shape": (settings["weight_shape"], (2,)),
        **scaled_form.scale_layout(settings),
    }


def spans(settings: Mapping[str, Any], first: int, last: int) -> scaled_form.Spans:
    """Rows of words, and the bands of the grids."""
    return {"weight_packed": (0, first, last), "weight_shape": None, **scaled_form.scale_spans(settings, first, last)}


align = scaled_form.align
measure = scaled.measure


@cache
def _values(bits: int) -> F32Array:
    """The values that two bytes hold, by their codes."""
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
    return wide((codes - (1 << bits - 1)).astype(np.float32))


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows [first, last)."""
    columns = settings["shape"][1]
    octets = np.ascontiguousarray(parts["weight_packed"]).view(np.uint8)
    values = _unpack(octets, settings["weights"]["num_bits"])
    if values.shape[1] != columns:
        values = np.ascontiguousarray(values[:, :columns])
    scaled.rescale(values, parts, settings, first, last)
    return values


def _unpack(octets: U8Array, bits: int) -> F32Array:
    if bits == 8:
        return (octets ^ np.uint8(0x80)).view(np.int8).astype(np.float32)
    return look_up(octets, _values(bits))


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Words of rows that begin at `first`, the shape, and their scales."""
    bits = settings["weights"]["num_bits"]
    quotients, parts = scaled.quantise(weight, settings, first, known)
    codes = scaled.integers(quotients, settings).view(np.uint8)
    codes += np.uint8(1 << bits - 1)  # modulo 256, which makes the signed code an unsigned one
    shape = np.array(settings["shape"], np.int64 if settings["weight_shape"] == "I64" else np.int32)
    return {"weight_packed": _pack(codes, bits), "weight_shape": shape, **parts}


def _pack(codes: U8Array, bits: int) -> npt.NDArray[np.int32]:
    """Codes (n, in) as words (n, ⌈in·bits/32⌉)."""
    short = -codes.shape[1] % (32 // bits)
    if short:
        codes = np.pad(codes, ((0, 0), (0, short)))
    octets = np.ascontiguousarray(codes[:, :: 8 // bits])
    for place in range(1, 8 // bits):
        octets |= codes[:, place :: 8 // bits] << np.uint8(place * bits)
    return octets.view(np.int32)
