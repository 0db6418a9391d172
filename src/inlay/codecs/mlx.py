"""MLX affine: codes of 2 to 8 bits along a row, a scale and a bias a group.

    weight   U32  (…, out, in · bits / 32)   a row is one stream of bits, the first code in the lowest ones; codes of
                                             3, 5 and 6 bits run across words
    scales   F16 BF16 F32  (…, out, in / group_size)
    biases   as scales

    W[n, k] = q[n, k] · s[n, g] + b[n, g],  g = k // group_size

(…) is empty, or the experts of a stack (`switch_mlp`). A module may have bits and groups of its own, under its name in
the config. The parts of a module begin with its name, so that `biases` are no bias of the layer.

Sources: MLX 0.32, mlx/backend/cpu/quantized.cpp (`quantize`, `extract_bits`) and python/mlx/nn/layers/quantized.py;
the modes mxfp4, mxfp8 and nvfp4 are other forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from inlay.codecs import packing
from inlay.codecs.packing import Codes, F32Array, Found
from inlay.dtypes import DTYPES, Array, F64Array, decode32, round_nearest

METHODS = ("mlx",)
PARTS = {"weight": ".weight", "scales": ".scales"}
OPTIONAL = {"biases": ".biases"}  # the other modes have none; they are refused by name
NAME_SUFFIX = ".weight"
CODES = ("U32",)
EXTRAS: tuple[str, ...] = ()

BITS = (2, 3, 4, 5, 6, 8)
FILLED = 32  # columns that fill whole words, whatever the bits
SCALES = ("F16", "BF16", "F32")
LEAST_SCALE = np.float32(1e-7)
OFFSET = "biases"  # floats, and the same for all values of a group
OPTIONS = {"bits": 4, "group_size": 64, "scale": "BF16"}


def settings(config: Mapping[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> dict[str, Any]:
    """Shape, bits and groups, from the config of the module and checked against every part."""
    own = config.get(module, {})
    if own is False:
        raise ValueError(f"{module} has codes, and the quantization of config.json says it has none")
    chosen = {**config, **(own if isinstance(own, Mapping) else {})}
    mode = chosen.get("mode", "affine")
    if mode != "affine":
        raise ValueError(f"{module} is stored in MLX's mode {mode!r}; affine is read: dequantise it with mlx_lm first")
    if "biases" not in found:
        raise ValueError(f"{module} has no {module}.biases, and MLX's affine form has one a group")
    bits, size = chosen.get("bits", 4), chosen.get("group_size", 64)
    if bits not in BITS or not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{module} has bits {bits!r} and group_size {size!r}; bits are {', '.join(map(str, BITS))}")
    shape, scale = found["weight"][1], found["scales"][0]
    if found["weight"][0] not in CODES or scale not in SCALES:
        raise ValueError(
            f"{module} has codes of {found['weight'][0]} and scales of {scale}; "
            f"codes are U32, scales {', '.join(SCALES)}"
        )
    if len(shape) not in (2, 3) or 0 in shape or shape[-1] * 32 % bits:
        raise ValueError(f"{module}.weight is {list(shape)}, which is no matrix of {bits}-bit codes, nor a stack")
    made = {"shape": [*shape[:-1], shape[-1] * 32 // bits], "bits": bits, "group_size": size, "scale": scale}
    if made["shape"][-1] % size:
        raise ValueError(f"{module} has rows of {made['shape'][-1]} values, which groups of {size} do not fill")
    for part, wanted in layout(made).items():
        if found[part] != wanted:
            raise ValueError(
                f"{module}.{part} is {found[part][0]} {list(found[part][1])}; {bits} bits in groups of {size}, as the "
                f"config declares them, ask for {wanted[0]} {list(wanted[1])}"
            )
    return made


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Codes, scales and biases."""
    *lead, columns = settings["shape"]
    scales = settings["scale"], (*lead, columns // settings["group_size"])
    return {"weight": ("U32", (*lead, columns * settings["bits"] // 32)), "scales": scales, "biases": scales}


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, tuple[int, int, int] | None]:
    """Rows; of a stack, whole experts."""
    rows = _stacked(settings)
    return dict.fromkeys(("weight", "scales", "biases"), (0, first // rows, -(-last // rows)))


def _stacked(settings: Mapping[str, Any]) -> int:
    """Rows that one step of the first axis holds."""
    return int(settings["shape"][1]) if len(settings["shape"]) == 3 else 1


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows `[first, last)`, of a stack those of (experts · out, in), float32.

    The product is exact where scales have 16 bits, so that a value is rounded once.
    """
    skipped = first % _stacked(settings)
    rows = slice(skipped, skipped + last - first)
    raw = [parts[part].reshape(-1, parts[part].shape[-1])[rows] for part in ("weight", "scales", "biases")]
    scales, biases = (_floats(part, settings) for part in raw[1:])
    values = _unpack(raw[0], settings["bits"], settings["shape"][-1]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # scales that are not finite show in the values
        packing.by_group(np.multiply, values, scales, settings["group_size"])
        packing.by_group(np.add, values, biases, settings["group_size"])
    return values


def _floats(raw: Array, settings: Mapping[str, Any]) -> F32Array:
    return np.ascontiguousarray(decode32(np.ascontiguousarray(raw), DTYPES[settings["scale"]]))


def _unpack(words: Array, bits: int, count: int) -> Codes:
    """Codes of rows of words, (rows, count)."""
    if bits in packing.BITS:
        return packing.unpack(words, bits, count)
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(-1, bits)  # 8 codes in as many bytes as they have bits
    eight = np.zeros(len(stream), np.uint64)
    for byte in range(bits):
        eight |= stream[:, byte].astype(np.uint64) << np.uint64(8 * byte)
    codes = np.empty((len(stream), 8), np.uint8)
    for place in range(8):
        codes[:, place] = eight >> np.uint64(place * bits) & np.uint64(2**bits - 1)
    return codes.reshape(len(words), -1)[:, :count]


def _pack(codes: Codes, bits: int) -> Array:
    """The reverse of `_unpack`, as U32."""
    if bits in packing.BITS:
        return packing.pack(codes, bits).view(np.uint32)
    eights = np.ascontiguousarray(codes).reshape(-1, 8)
    eight = np.zeros(len(eights), np.uint64)
    for place in range(8):
        eight |= eights[:, place].astype(np.uint64) << np.uint64(place * bits)
    stream = np.empty((len(eights), bits), np.uint8)
    for byte in range(bits):
        stream[:, byte] = eight >> np.uint64(8 * byte) & np.uint64(0xFF)
    return np.ascontiguousarray(stream.reshape(len(codes), -1)).view(np.uint32)


def align(settings: Mapping[str, Any]) -> int:
    """Rows stand alone; of a stack, the rows of an expert."""
    return _stacked(settings)


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Nearest codes, with the scales and biases that are known or with new ones, as `quantize` of MLX has them.

    MLX chooses codes before it rounds scales and biases to their stored type, here they are rounded first. Where the
    codes are known too, only the biases.
    """
    bits, size, top = settings["bits"], settings["group_size"], 2 ** settings["bits"] - 1
    if not np.isfinite(weight).all():
        raise ValueError(packing.NOT_FINITE)
    if "weight" in known:
        return {"biases": _biases(weight, settings, known)}
    if ("scales" in known) != ("biases" in known):
        raise ValueError("scales and biases of MLX are kept together or not at all")
    raw = (known["scales"], known["biases"]) if "scales" in known else _new(weight, settings)
    scales, biases = (_floats(part.reshape(len(weight), -1), settings).astype(np.float64) for part in raw)
    places: F64Array = weight.astype(np.float64)
    packing.by_group(np.subtract, places, biases, size)
    packing.by_group(np.divide, places, np.where(scales == 0, np.inf, scales), size)
    codes = np.clip(np.rint(places, out=places), 0, top, out=places).astype(np.uint8)
    lead = (-1, _stacked(settings)) if len(settings["shape"]) == 3 else (-1,)
    wholes = {"weight": _pack(codes, bits), "scales": raw[0], "biases": raw[1]}
    return {part: np.ascontiguousarray(a).reshape(*lead, a.shape[-1]) for part, a in wholes.items()}


def shifted_together(settings: Mapping[str, Any]) -> int:
    """Columns of a row that share a bias."""
    return int(settings["group_size"])


def _biases(weight: F32Array, settings: Mapping[str, Any], known: Mapping[str, Array]) -> Array:
    """Biases with which codes and scales that are known give this weight: the mean of weight − code · scale.

    All values of a group agree on it, but for the rounding of float32, where the weight is one of these codes and
    scales that was shifted group by group.
    """
    words, raw = (known[part].reshape(len(weight), -1) for part in ("weight", "scales"))
    values = _unpack(words, settings["bits"], settings["shape"][-1]).astype(np.float64)
    packing.by_group(np.multiply, values, _floats(raw, settings).astype(np.float64), settings["group_size"])
    biases = (weight - values).reshape(len(weight), -1, settings["group_size"]).mean(axis=2)
    dtype = DTYPES[settings["scale"]]
    stored = round_nearest(biases, dtype)
    if not np.isfinite(decode32(stored, dtype)).all():
        raise ValueError(f"a bias of {np.abs(biases).max():.3g} is beyond {dtype.name}, in which it is stored")
    return stored.reshape(known["scales"].shape)


def _new(weight: F32Array, settings: Mapping[str, Any]) -> tuple[Array, Array]:
    """Stored scales and biases, (rows, groups) each.

    The value that is larger in magnitude, of the least and the largest, gets a code of its own: the bias is that
    value, and the scale is such that 0 is nearly a code.
    """
    groups = weight.reshape(len(weight), -1, settings["group_size"])
    low, high = groups.min(axis=2), groups.max(axis=2)
    below = np.abs(low) > np.abs(high)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        step = np.maximum((high - low) / np.float32(2 ** settings["bits"] - 1), LEAST_SCALE)
        step = np.where(below, step, -step)
        edge = np.where(below, low, high)
        count = np.rint(edge / step)
        scales = np.where(count != 0, edge / count, step)
    dtype = DTYPES[settings["scale"]]
    raw = [round_nearest(x.astype(np.float64), dtype) for x in (scales, np.where(count != 0, edge, 0))]
    if not all(np.isfinite(decode32(part, dtype)).all() for part in raw):
        raise ValueError(f"a group of the weight needs a scale or bias beyond {dtype.name}; store them in BF16 or F32")
    return raw[0], raw[1]


def fresh(shape: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight: `bits`, `group_size`, and the type of the `scale`."""
    unknown = options.keys() - OPTIONS.keys()
    if unknown:
        raise ValueError(f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    made = {**OPTIONS, **options}
    size = made["group_size"]
    if made["bits"] not in BITS or made["scale"] not in SCALES or not isinstance(size, int) or size < 1:
        raise ValueError(f"MLX has no form with bits {made['bits']!r}, group_size {size!r} and scale {made['scale']!r}")
    if len(shape) not in (2, 3) or 0 in shape or shape[-1] % size or shape[-1] % FILLED:
        raise ValueError(
            f"a weight {list(shape)} does not fill groups of {size} and words of {FILLED} codes in its rows"
        )
    return {**made, "shape": list(shape)}


def config(settings: Mapping[str, Any], excluded: list[str]) -> dict[str, Any]:
    """`quantization_config`, which MLX has as `quantization` too; modules that are not quantised are false there."""
    form = {"group_size": settings["group_size"], "bits": settings["bits"], "mode": "affine"}
    return {**form, **dict.fromkeys(excluded, False)}
