"""The parts of a weight with one code a value and a grid of scales: which there are, and where.

Parts are described in `scaled`, whose settings these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from inlay.codecs import compressed_config, grids
from inlay.dtypes import Array

Layout = dict[str, tuple[str, tuple[int, ...]]]
Spans = dict[str, tuple[int, int, int] | None]
Found = Mapping[str, tuple[str, tuple[int, ...]]]

# Replaces a scale that is 0: torch.finfo(dtype).eps, by calculate_qparams.
EPS = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}
EXPONENTS = ("U8", "F8_E8M0")


def require(module: str, found: Found, *parts: str) -> None:
    """Refused where a part is absent without which the others mean nothing."""
    missing = [f"{module}.{part}" for part in parts if part not in found]
    if missing:
        raise ValueError(f"{module} is stored quantised, but {', '.join(missing)} is missing")


def check_layout(module: str, form: str, found: Found, wanted: Found) -> None:
    """Refused where the parts that are there are not those that this form has."""
    for part in sorted({*found, *wanted}):
        there, expected = (
            f"{parts[part][0]} {list(parts[part][1])}" if part in parts else "absent" for parts in (found, wanted)
        )
        if there != expected:
            raise ValueError(f"{module}.{part} is {there}, but in {form} it is {expected}")


def made(shape: list[int], codes: str, weights: Mapping[str, Any], scale_dtype: str) -> dict[str, Any]:
    """Settings of a new weight with these arguments."""
    cell = compressed_config.cell(weights, shape)
    bands, columns = grids.extent(shape, cell)
    grid = [1] if (bands, columns) == (1, 1) and weights["strategy"] == "tensor" else [bands, columns]
    zeros = None
    if not weights["symmetric"]:
        packed = codes == "I32" and weights["strategy"] in ("group", "channel")  # PACK_ZP_STRATS
        zeros = ["I32", [-(-bands * weights["num_bits"] // 32), columns]] if packed else ["I8", grid]
    return {
        "shape": shape, "cell": cell, "codes": codes, "weights": dict(weights), "scale": [scale_dtype, grid],
        "zero_point": zeros, "g_idx": None, "ordered": False,
    }  # fmt: skip


def read_settings(
    module: str, shape: list[int], codes: str, weights: Mapping[str, Any], found: Found, read: Callable[[str], Array]
) -> dict[str, Any]:
    """Settings of a stored weight: what its arguments ask for, as far as it agrees with what is there."""
    require(module, found, "weight_scale")
    _check_arguments(module, codes, weights)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"the weight of {module} is {shape}; a quantised weight is read as (out, in)")
    scale_dtype, scale_shape = found["weight_scale"]
    exponents = EXPONENTS if weights["type"] == "float" and weights["strategy"] == "group" else ()
    if scale_dtype not in (*EPS, *exponents):
        raise ValueError(f"{module}.weight_scale is {scale_dtype}; it is read as {', '.join((*EPS, *exponents))}")
    settings = made(shape, codes, weights, scale_dtype)
    wanted = tuple(settings["scale"][1])
    if scale_shape != wanted and not (wanted == (1,) and scale_shape in ((), (1, 1))):
        raise ValueError(
            f"{module}.weight_scale is {list(scale_shape)}, but strategy {weights['strategy']} makes "
            f"{list(wanted)} for a weight {shape}"
        )
    settings["scale"][1] = list(scale_shape)
    _add_zero_point(settings, module, found)
    _add_order(settings, module, found, read)
    return settings


def _check_arguments(module: str, codes: str, weights: Mapping[str, Any]) -> None:
    bits, kind = weights["num_bits"], weights["type"]
    if kind != ("float" if codes.startswith("F8") else "int") or not (bits == 8 or (kind == "int" and 2 <= bits < 8)):
        raise ValueError(f"{module} is stored as {codes}, but its config group says {kind} of {bits} bits")
    if kind == "float" and not weights["symmetric"]:
        raise ValueError(f"{module} has float codes that are not symmetric, which no reader of the format supports")


def _add_zero_point(settings: dict[str, Any], module: str, found: Found) -> None:
    """A symmetric weight may have one too, as older writers left it: it is read like any other."""
    if "weight_zero_point" not in found:
        if settings["zero_point"]:
            raise ValueError(f"{module} is not symmetric, but has no weight_zero_point")
        return
    dtype, shape = found["weight_zero_point"]
    if dtype == "I8":
        wanted = settings["scale"][1]
    else:
        dtype, wanted = settings["zero_point"] or ("I8", settings["scale"][1])
    if found["weight_zero_point"] != (dtype, tuple(wanted)):
        raise ValueError(
            f"{module}.weight_zero_point is {found['weight_zero_point'][0]} {list(shape)}, not {dtype} {wanted}"
        )
    settings["zero_point"] = [dtype, list(shape)]


def _add_order(settings: dict[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> None:
    """Columns by group, where the config or the file has them. One −1 says that they never were set."""
    if "weight_g_idx" not in found:
        if settings["weights"]["actorder"] in (True, "group", "dynamic"):
            raise ValueError(f"{module} has its columns in groups by activation order, but no weight_g_idx")
        return
    width, size = settings["shape"][1], settings["cell"][1]
    dtype, shape = found["weight_g_idx"]
    if dtype not in ("I32", "I64") or shape != (width,):
        raise ValueError(f"{module}.weight_g_idx is {dtype} {list(shape)}, not I32 [{width}]")
    groups = read("weight_g_idx")
    settings["g_idx"], settings["ordered"] = dtype, -1 not in groups
    if settings["ordered"] and not np.array_equal(np.sort(groups), np.arange(width) // size):
        raise ValueError(f"{module}.weight_g_idx does not put {size} columns into each of {width // size} groups")


def layout(settings: Mapping[str, Any]) -> Layout:
    """The codes and what scales them."""
    return {"weight": (settings["codes"], tuple(settings["shape"])), **scale_layout(settings)}


def scale_layout(settings: Mapping[str, Any]) -> Layout:
    """The parts beside the codes."""
    parts: Layout = {"weight_scale": (settings["scale"][0], tuple(settings["scale"][1]))}
    if settings["zero_point"]:
        parts["weight_zero_point"] = (settings["zero_point"][0], tuple(settings["zero_point"][1]))
    if settings["g_idx"]:
        parts["weight_g_idx"] = (settings["g_idx"], (settings["shape"][1],))
    return parts


def spans(settings: Mapping[str, Any], first: int, last: int) -> Spans:
    """Rows of codes, and the bands of the grids."""
    return {"weight": (0, first, last), **scale_spans(settings, first, last)}


def scale_spans(settings: Mapping[str, Any], first: int, last: int) -> Spans:
    """Of the parts beside the codes."""
    begin, end = grids.band(settings["cell"], first, last)
    one = grids.extent(settings["shape"], settings["cell"])[0] == 1
    found: Spans = {"weight_scale": None if one else (0, begin, end)}
    if settings["zero_point"]:
        rows = rows_a_word(settings)
        found["weight_zero_point"] = None if one else (0, begin // rows, -(-end // rows))
    if settings["g_idx"]:
        found["weight_g_idx"] = None
    return found


def align(settings: Mapping[str, Any]) -> int:
    """The rows of a block that has scales of its own, and of a word of zero points."""
    measured = grids.extent(settings["shape"], settings["cell"]) == (1, 1)
    return rows_a_word(settings) * (1 if measured else int(settings["cell"][0]))


def rows_a_word(settings: Mapping[str, Any]) -> int:
    """Rows of zero points in one stored element."""
    packed = settings["zero_point"] and settings["zero_point"][0] == "I32"
    return 32 // int(settings["weights"]["num_bits"]) if packed else 1
