"""HQQ: one scale and one zero point a group, packed by pieces of the whole weight.

    W_q         codes of the weight in groups, an array (R, C): (groups, group_size) for axis 1, (group_size, groups)
                for axis 0; either is the weight read row by row. Its R rows are cut into pieces of H rows, and row h
                of W_q holds row h of every piece, the first in the highest bits:
                    8bit_u8  1 piece, 4bit_u8  2, 2bit_u8  4, 1bit_u8  8 in a byte;  3bit_32  10 in an int32
    scale, zero (R, 1) for axis 1, (1, C) for axis 0, of compute_dtype
    nbits, group_size, shape, axis, packing, … one small tensor each; texts are bytes

    value = (code − zero) · scale                      Badri and Shaji 2023, Half-Quadratic Quantization

hqq 0.2.8: core/quantize.py, Quantizer and HQQLinear.state_dict; core/bitpack.py; core/utils.py. The library computes
in compute_dtype, here it is float32. The search for the best zero point, which gives the method its name, is not done
here: new scales go from the least value to the largest, as with `optimize=False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import BY_TORCH_NAME, DTYPES, Array, decode32, round_nearest

F32Array = npt.NDArray[np.float32]

METHODS = ("hqq",)
PARTS = {
    name: f".{name}"
    for name in (
        "W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "compute_dtype",
        "encoded_state_dict",
    )
}  # fmt: skip
OPTIONAL = {
    name: f".{name}"
    for name in (
        "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "offload_meta", "stores_quant_config",
        "channel_wise", "optimize", "round_zero",
    )
}  # fmt: skip
NAME_SUFFIX = ".weight"
CODES = ("U8", "I32", "BF16", "F16", "F32")
EXTRAS: tuple[str, ...] = ()
UNFINISHED = ("W_q",)

PACKINGS = {
    "8bit_u8": (1, 8),
    "4bit_u8": (2, 4),
    "2bit_u8": (4, 2),
    "1bit_u8": (8, 1),
    "3bit_32": (10, 3),
}  # pieces, bits
BIT_PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
OPTIONS = {"nbits": 4, "group_size": 64, "dtype": "bfloat16"}
OFFSET = "zero"  # floats, and the same for all values of a group
TEXTS = ("packing", "compute_dtype", "unpack_view_dtype")
NUMBERS = {"shape": "I64", "nbits": "I32", "group_size": "I32", "axis": "I32"}  # others are U8


def settings(
    config: Mapping[str, Any],
    module: str,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Array],
) -> dict[str, Any]:
    """Shape, packing, axis and dtypes; the small tensors as they are, to be written again."""
    missing = [PARTS[part] for part in PARTS if part not in found]
    if missing:
        raise ValueError(f"{module} has no {', '.join(missing)}: not a weight that HQQ saved for safetensors")
    small = {part: read(part).reshape(-1).tolist() for part in found if part not in ("W_q", "scale", "zero")}
    texts = {part: bytes(small[part]).decode() for part in TEXTS if part in small}
    for flag, said in (("quant_scale", "quantised scales"), ("quant_zero", "quantised zero points")):
        if small.get(flag, [0])[0]:
            raise ValueError(
                f"{module} has {said}, which HQQ itself has dropped: load it with hqq and save it in 16 bits"
            )
    if not small.get("channel_wise", [1])[0]:
        raise ValueError(f"{module} has one scale for the weight (channel_wise false), which is not read")
    known = {
        "shape": small["shape"], "packing": texts["packing"], "axis": small["axis"][0],
        "group_size": small["group_size"][0], "nbits": small["nbits"][0],
        "dtype": texts["compute_dtype"].removeprefix("torch."), "codes": found["W_q"][0],
        "scale": found["scale"][0], "zero": found["zero"][0], "small": small,
    }  # fmt: skip
    _check(module, known, found)
    expected = layout(known)
    for part in found:
        if found[part] != expected[part]:
            raise ValueError(f"{module}.{part} is {found[part]}, but a weight {known['shape']} has {expected[part]}")
    return known


def _check(module: str, known: Mapping[str, Any], found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    shape, group, packing, nbits = (known[name] for name in ("shape", "group_size", "packing", "nbits"))
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{module}.shape is {shape}, which is not that of a matrix")
    if packing not in PACKINGS or not 0 < nbits <= PACKINGS[packing][1]:
        raise ValueError(f"{module} has {nbits} bits packed as {packing!r}; known are {', '.join(PACKINGS)}")
    if known["axis"] not in (0, 1) or group < 1 or math.prod(shape) % group:
        raise ValueError(f"{module} has groups of {group} along axis {known['axis']}, which do not divide {shape}")
    if _rows(known) % PACKINGS[packing][0] and packing != "3bit_32":
        raise ValueError(f"{module} has {_rows(known)} rows of groups, which {packing} cannot hold")
    if known["scale"] not in ("F32", "BF16", "F16") or known["zero"] not in ("F32", "BF16", "F16"):
        raise ValueError(f"{module} has scale {known['scale']} and zero {known['zero']}, and needs F32, BF16 or F16")
    word = _word(known)
    if known["codes"] not in (word, "F32", "BF16", "F16") or _columns(known) * _size(word) % _size(known["codes"]):
        raise ValueError(f"{module}.W_q is {known['codes']} {list(found['W_q'][1])}, which does not hold {word}")


def _size(dtype: str) -> int:
    return DTYPES[dtype].bits // 8


def _word(settings: Mapping[str, Any]) -> str:
    return "I32" if settings["packing"] == "3bit_32" else "U8"


def _rows(settings: Mapping[str, Any]) -> int:
    """R, rows of the array of groups."""
    count, group = math.prod(settings["shape"]), settings["group_size"]
    return int(count // group if settings["axis"] == 1 else group)


def _columns(settings: Mapping[str, Any]) -> int:
    """C, columns of the array of groups."""
    return int(math.prod(settings["shape"]) // _rows(settings))


def _piece(settings: Mapping[str, Any]) -> int:
    """H · C, values of a piece."""
    return -(-_rows(settings) // PACKINGS[settings["packing"]][0]) * _columns(settings)


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each part's dtype and shape."""
    rows, columns = _rows(settings), _columns(settings)
    stored = columns * _size(_word(settings)) // _size(settings["codes"])
    scales = (rows, 1) if settings["axis"] == 1 else (1, columns)
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "W_q": (settings["codes"], (_piece(settings) // columns, stored)),
        "scale": (settings["scale"], scales),
        "zero": (settings["zero"], scales),
    }
    for part, values in settings["small"].items():
        parts[part] = NUMBERS.get(part, "U8"), (len(values),) if part in (*TEXTS, "shape") else ()
    return parts


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, tuple[int, int, int] | None]:
    """Rows of W_q, all of them where the rows lie in two pieces; scales of the groups."""
    begin, end = first * settings["shape"][1], last * settings["shape"][1]
    columns, piece, group = _columns(settings), _piece(settings), settings["group_size"]
    needed: dict[str, tuple[int, int, int] | None] = {"W_q": None}
    if begin // piece == (end - 1) // piece:
        needed["W_q"] = (0, begin % piece // columns, (end - 1) % piece // columns + 1)
    scales = None
    if settings["axis"] == 1:
        scales = (0, begin // group, -(-end // group))
    elif begin // columns == (end - 1) // columns:
        scales = (1, begin % columns, (end - 1) % columns + 1)
    return {**needed, "scale": scales, "zero": scales}


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows `[first, last)`, float32 (last − first, in)."""
    values, begin = _codes(parts, settings, first, last), first * settings["shape"][1]
    for operation, part in ((np.subtract, "zero"), (np.multiply, "scale")):
        stored = decode32(parts[part], DTYPES[settings[part]])
        for inside, of_group in _broadcasts(values, stored, settings, begin):
            operation(inside, of_group, out=inside)
    return values.reshape(last - first, settings["shape"][1])


def _codes(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Codes of the rows, put end to end."""
    span = spans(settings, first, last)["W_q"]
    begin, end = first * settings["shape"][1], last * settings["shape"][1]
    words = np.ascontiguousarray(parts["W_q"]).reshape(-1).view(np.dtype(DTYPES[_word(settings)].raw))
    piece, start = _piece(settings), span[1] * _columns(settings) if span else 0
    values = np.empty(end - begin, np.float32)
    for number in range(begin // piece, -(-end // piece)):
        low, high = max(begin, number * piece), min(end, (number + 1) * piece)
        taken = words[low - number * piece - start : high - number * piece - start]
        _unpack(taken, settings["packing"], number, values[low - begin : high - begin])
    return values


def _unpack(words: Array, packing: str, piece: int, out: F32Array) -> None:
    """The codes of one piece, as float32."""
    pieces, bits = PACKINGS[packing]
    shift, mask = bits * (pieces - 1 - piece), (1 << bits) - 1
    if packing == "3bit_32":
        out[:] = words >> np.int32(shift) & np.int32(mask)
    else:
        table = (np.arange(256) >> shift & mask).astype(np.float32)
        np.take(table, words, out=out, mode="clip")


def _broadcasts(
    values: F32Array, stored: F32Array, settings: Mapping[str, Any], begin: int
) -> list[tuple[F32Array, F32Array]]:
    """Views of `values`, the first of which is number `begin`, each with the scales that it meets."""
    if settings["axis"] == 1:
        group, flat = settings["group_size"], stored.reshape(-1)
        head = min(-begin % group, len(values))
        groups = (len(values) - head) // group
        body, one = head + groups * group, int(head > 0)
        inner = values[head:body].reshape(groups, group), flat[one : one + groups, None]
        return [(values[:head], flat[:one]), inner, (values[body:], flat[one + groups :])]
    columns, flat = _columns(settings), stored.reshape(-1)
    if len(flat) < columns:  # the slice of one row of groups
        return [(values, flat)]
    cuts = [0, *range(-begin % columns or columns, len(values), columns), len(values)]
    return [(values[low:high], flat[(begin + low) % columns :][: high - low]) for low, high in pairwise(cuts)]


def align(settings: Mapping[str, Any]) -> int:
    """Rows after which a group ends, for groups along a row; otherwise no new scales are made."""
    group, columns = settings["group_size"], settings["shape"][1]
    return int(group // math.gcd(group, columns)) if settings["axis"] == 1 else 1


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Codes, one a byte, in the weight's shape: `finish` packs them. New scales for groups along a row only.

    Where the codes are known too, only the zero points.
    """
    if "W_q" in known:
        return {"zero": _zeros(weight, settings, first, known)}
    values = np.array(weight, np.float32).reshape(-1)
    parts: dict[str, Array] = {}
    if not {"scale", "zero"} <= known.keys():
        if settings["axis"] == 0:
            raise ValueError("groups along axis 0 reach across the whole weight: keep the stored scales, or use axis 1")
        parts = _scales(values.reshape(-1, settings["group_size"]), settings)
        known = parts
    scale, zero = (decode32(known[part], DTYPES[settings[part]]) for part in ("scale", "zero"))
    begin = first * settings["shape"][1]
    for operation, stored in ((np.divide, scale), (np.add, zero)):
        for inside, of_group in _broadcasts(values, stored, settings, begin):
            operation(inside, of_group, out=inside)
    np.clip(np.rint(values, out=values), 0, (1 << settings["nbits"]) - 1, out=values)
    return {"W_q": values.astype(np.uint8).reshape(-1, settings["shape"][1]), **parts}


def shifted_together(settings: Mapping[str, Any]) -> int:
    """Columns of a row that share a zero point; 0 where those that share one lie in several rows."""
    whole_rows = settings["axis"] == 1 and settings["shape"][1] % settings["group_size"] == 0
    return int(settings["group_size"]) if whole_rows else 0


def _zeros(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> Array:
    """Zero points with which codes and scales that are known give this weight: the mean of code − weight / scale.

    All values of a group agree on it, but for the rounding of float32, where the weight is one of these codes and
    scales that was shifted group by group.
    """
    groups = (-1, settings["group_size"])
    codes = _codes(known, settings, first, first + len(weight)).reshape(groups)
    scales = decode32(known["scale"], DTYPES[settings["scale"]]).astype(np.float64).reshape(-1, 1)
    if not (np.isfinite(weight).all() and np.isfinite(scales).all() and scales.all()):
        raise ValueError("a value is not finite, or a scale is 0 or not finite, for which there is no zero point")
    zeros = (codes - weight.reshape(groups) / scales).mean(axis=1, keepdims=True)
    stored = round_nearest(zeros, DTYPES[settings["zero"]])
    if not np.isfinite(decode32(stored, DTYPES[settings["zero"]])).all():
        raise ValueError(
            f"a zero point of {np.abs(zeros).max():.3g} is beyond {settings['zero']}, in which it is stored"
        )
    return stored


def _scales(groups: F32Array, settings: Mapping[str, Any]) -> dict[str, Array]:
    """Scale and zero point of each group, from its least and largest value (Quantizer.quantize)."""
    least, largest = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    if not (np.isfinite(least).all() and np.isfinite(largest).all()):
        raise ValueError("the weight has NaN or infinite values, which HQQ cannot hold")
    width = largest - least
    narrow = width <= np.float32(1e-4)
    # A number divided by a tensor is its reciprocal times the number in torch: two roundings.
    steps = np.float32(1) / np.where(narrow, np.float32(1), width) * np.float32((1 << settings["nbits"]) - 1)
    steps = np.minimum(np.where(narrow, np.float32(1), steps), np.float32(2e4))
    zeros = -least * steps
    if settings["small"].get("round_zero", [0])[0]:
        zeros = np.rint(zeros)
    made = {"scale": np.float32(1) / steps, "zero": zeros}
    return {part: round_nearest(made[part].astype(np.float64), DTYPES[settings[part]]) for part in made}


def finish(parts: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    """W_q packed, and the small tensors."""
    if "W_q" not in parts:  # it is kept
        return {}
    pieces, bits = PACKINGS[settings["packing"]]
    rows = _piece(settings) // _columns(settings)
    codes = np.zeros((pieces * rows, _columns(settings)), np.dtype(DTYPES[_word(settings)].raw))
    codes[: _rows(settings)] = parts["W_q"].reshape(_rows(settings), -1)
    packed = codes[:rows].copy()
    for piece in range(1, pieces):
        packed <<= bits
        packed |= codes[piece * rows : (piece + 1) * rows]
    whole: dict[str, Array] = {"W_q": packed.view(np.dtype(DTYPES[settings["codes"]].raw))}
    expected = layout(settings)
    for part, values in settings["small"].items():
        dtype, shape = expected[part]
        whole[part] = np.array(values, np.dtype(DTYPES[dtype].raw)).reshape(shape)
    return whole


def fresh(shape: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight, groups along a row. Options, all with a default: those of OPTIONS."""
    unknown = options.keys() - OPTIONS.keys()
    if unknown:
        raise ValueError(f"HQQ has no option {', '.join(sorted(unknown))}; it has {', '.join(OPTIONS)}")
    chosen = {**OPTIONS, **options}
    nbits, group, dtype = chosen["nbits"], chosen["group_size"], chosen["dtype"]
    if nbits not in BIT_PACKINGS or dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"HQQ has no form with nbits {nbits!r} and dtype {dtype!r}")
    packing, stored = BIT_PACKINGS[nbits], BY_TORCH_NAME[dtype].name
    word = "torch.int32" if packing == "3bit_32" else "torch.uint8"
    texts = {"packing": packing, "compute_dtype": f"torch.{dtype}", "unpack_view_dtype": word}
    small = {
        **{part: list(text.encode()) for part, text in texts.items()},
        "shape": list(shape), "nbits": [nbits], "group_size": [group], "axis": [1], "view_as_float": [0],
        "quant_scale": [0], "quant_zero": [0], "offload_meta": [0], "encoded_state_dict": [1],
        "stores_quant_config": [1], "channel_wise": [1], "optimize": [0], "round_zero": [0],
    }  # fmt: skip
    new = {
        "shape": list(shape), "packing": packing, "axis": 1, "group_size": group, "nbits": nbits, "dtype": dtype,
        "codes": "I32" if packing == "3bit_32" else "U8", "scale": stored, "zero": stored, "small": small,
    }  # fmt: skip
    _check("a new weight", new, {"W_q": (str(new["codes"]), ())})
    return new


def config(settings: Mapping[str, Any], excluded: list[str]) -> dict[str, Any]:
    """`quantization_config` as HqqConfig of transformers writes it."""
    weight = {name: settings[name] for name in ("nbits", "group_size", "axis")}
    flags = {"channel_wise": True, "optimize": True, "round_zero": settings["nbits"] == 4, "view_as_float": False}
    params = {"weight_quant_params": {**weight, **flags}, "scale_quant_params": None, "zero_quant_params": None}
    return {
        "quant_method": "hqq", "quant_config": {**params, "offload_meta": False}, "skip_modules": list(excluded),
    }  # fmt: skip
