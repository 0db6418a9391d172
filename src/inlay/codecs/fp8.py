"""FP8 weights with a scale a block, a row or a tensor.

    X              F8_E4M3 or F8_E5M2    (out, in), or experts (experts, out, in)
    X_scale_inv    F32, BF16, F16, F8_E8M0, or U8 that holds F8_E8M0
                   (⌈out/rows⌉, ⌈in/columns⌉) for blocks of (rows, columns); experts have a grid each
    X_scale        the same under the name of AutoFP8, FBGEMM, Quark and ModelOpt

W[o, i] = X[o, i] · scale[o // rows, i // columns]

X is the key of the weight itself, `…q_proj.weight` or `…experts.gate_up_proj`. `_scale_inv` too is multiplied with:
it is the inverse of what the weight was multiplied with on its way in. A scale of one element is that of the tensor,
one with a value a row has blocks of one row; so every form is a grid. Sources: DeepSeek-V3 inference/kernel.py
`weight_dequant`; transformers 5.23 integrations/finegrained_fp8.py `_dequantize_fp8_weight`, `Fp8Dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import compiled
from inlay.codecs.floats import LARGEST, encode_float, table
from inlay.dtypes import DTYPES, Array, decode32, round_nearest

F32Array = npt.NDArray[np.float32]
Found = Mapping[str, tuple[str, tuple[int, ...]]]

METHODS = ("fp8", "fbgemm_fp8", "quark")
PARTS = {"weight": ""}
OPTIONAL = {"weight_scale_inv": "_scale_inv", "weight_scale": "_scale"}  # one of the two
NAME_SUFFIX = ""
CODES = ("F8_E4M3", "F8_E5M2")
# After the module's name, or after an expert tensor's with "_" for ".": scales of activations and of the cache.
EXTRAS = (".activation_scale", ".input_scale", ".input_scale_ub", ".act_scale", ".output_scale", ".k_scale",
          ".v_scale", ".q_scale", ".kv_scale", "_activation_scale", "_input_scale")  # fmt: skip

FORMATS = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
EXPONENTS = ("F8_E8M0", "U8")
SCALES = ("F32", "BF16", "F16", *EXPONENTS)


def settings(config: Mapping[str, Any], module: str, found: Found, read: Callable[[str], Array]) -> dict[str, Any]:
    """The shape, the stored types and the block (rows, columns) that has one scale."""
    dtype, shape = found["weight"]
    scale = _scale_part(config, module, found)
    scale_dtype, scale_shape = found[scale]
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{module} is {list(shape)}: FP8 weights are (out, in), or (experts, out, in)")
    if scale_dtype not in SCALES:
        raise ValueError(f"{scale} of {module} is {scale_dtype}; scales of FP8 are {', '.join(SCALES)}")
    strategy, block, inferred = _block(config, module, shape, scale, scale_shape)
    power = config.get("scale_fmt") == "ue8m0" or scale_dtype in EXPONENTS
    return {
        "shape": list(shape), "dtype": dtype, "scale": scale, "scale_dtype": scale_dtype,
        "scale_shape": list(scale_shape), "strategy": strategy, "block": block,
        "scale_fmt": "ue8m0" if power else "float",
        **({"inferred": True} if inferred else {}),
    }  # fmt: skip


def _scale_part(config: Mapping[str, Any], module: str, found: Found) -> str:
    """The part that holds the scale, after a look at all that does not depend on its shape."""
    dtype, shape = found["weight"]
    if dtype not in CODES:
        raise ValueError(f"{module} is {dtype}; FP8 is read as {' or '.join(CODES)}, and FP4 experts are not")
    declared = config.get("fmt")
    if declared is not None and FORMATS.get(declared) != dtype:
        raise ValueError(f"{module} is {dtype}, quantization_config says fmt {declared!r}")
    if config.get("scale_fmt") not in (None, "float", "ue8m0"):
        raise ValueError(f"scale_fmt {config['scale_fmt']!r} of quantization_config is not known: 'float' or 'ue8m0'")
    if len(shape) == 3 and config.get("quant_method") == "fbgemm_fp8":
        raise ValueError(f"{module}: experts of fbgemm_fp8 are stored transposed with scales that are not; not read")
    present = [part for part in OPTIONAL if part in found]
    if len(present) != 1:
        what = " and ".join(module + suffix for suffix in OPTIONAL.values())
        raise ValueError(f"{module} is {dtype} and has {'both' if present else 'neither'} of {what}; it needs one")
    return present[0]


def _block(
    config: Mapping[str, Any], module: str, shape: Sequence[int], scale: str, scale_shape: tuple[int, ...]
) -> tuple[str, list[int], bool]:
    """Block, channel or tensor; the rows and columns that share a scale; whether blocks of 128 are inferred."""
    lead, (out, columns) = tuple(shape[:-2]), shape[-2:]
    declared = config.get("weight_block_size")
    if declared is not None and scale_shape == _grid(shape, _checked(declared)):
        return "block", list(declared), False
    # A grid of more than one fits no other power of two, and a grid of one is the same for all of them.
    if "weight_block_size" not in config and scale == "weight_scale_inv" and scale_shape == _grid(shape, (128, 128)):
        return "block", [128, 128], True
    # Embeddings beside blocks have one weight_scale (transformers' FP8Embedding).
    if declared is None or scale == "weight_scale":
        if scale_shape in {(), (1,), (1,) * len(shape), lead, (*lead, 1, 1)}:
            return "tensor", [out, columns], False
        if scale_shape in {(*lead, out), (*lead, out, 1)}:
            return "channel", [1, columns], False
        # Experts without blocks have a scale for gate and one for up (transformers' FP8Experts).
        if lead and out % 2 == 0 and scale_shape == (*lead, 2, 1):
            return "tensor", [out // 2, columns], False
    what = f"{scale} of {module} is {list(scale_shape)} for a weight {list(shape)}"
    if declared is not None:
        raise ValueError(f"{what}; weight_block_size {list(declared)} makes it {list(_grid(shape, declared))}")
    if "weight_block_size" in config:
        raise ValueError(f"{what}; with weight_block_size null it has one value a tensor or a row")
    raise ValueError(f"{what}, which blocks of 128 do not make; name weight_block_size in quantization_config")


def _checked(block: Any) -> Sequence[int]:
    if not isinstance(block, Sequence) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(f"weight_block_size is {block!r}; two positive integers are meant")
    return block


def _grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _single(settings: Mapping[str, Any]) -> bool:
    """Whether one scale serves the whole tensor."""
    return all(n == 1 for n in settings["scale_shape"])


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The weight, and its scale."""
    return {
        "weight": (settings["dtype"], tuple(settings["shape"])),
        settings["scale"]: (settings["scale_dtype"], tuple(settings["scale_shape"])),
    }


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, tuple[int, int, int] | None]:
    """Rows, and the rows of scales they meet; of experts, whole ones."""
    *lead, out, _ = settings["shape"]
    rows, per_scale = (out, out) if lead else (1, settings["block"][0])
    return {
        "weight": (0, first // rows, -(-last // rows)),
        settings["scale"]: None if _single(settings) else (0, first // per_scale, -(-last // per_scale)),
    }


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows of code · scale in float32; of experts, rows of (experts · out, in)."""
    *lead, out, columns = settings["shape"]
    begin = first // out * out if lead else first
    codes = parts["weight"].reshape(-1, columns)[first - begin : last - begin]
    values = look_up(np.ascontiguousarray(codes), *_tables(settings["dtype"]))
    scales = _scales(parts[settings["scale"]], settings, first, last)
    with np.errstate(over="ignore", invalid="ignore"):
        _each_block(np.multiply, values, scales, settings["block"][1])
    return values


def by_kernel(settings: Mapping[str, Any]) -> bool:
    """E4M3."""
    return bool(settings["dtype"] == "F8_E4M3")


def decode_into(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int, out: F32Array) -> None:
    """The same by the compiled kernel."""
    *lead, rows, columns = settings["shape"]
    begin = first // rows * rows if lead else first
    codes = parts["weight"].reshape(-1, columns)[first - begin : last - begin]
    scales = _scales(parts[settings["scale"]], settings, first, last)
    size = settings["block"][1] if scales.shape[1] > 1 else columns
    compiled.e4m3(codes.view(np.uint8), np.ascontiguousarray(scales), size, out)


def look_up(codes: npt.NDArray[np.uint8], values: F32Array, pairs: npt.NDArray[np.uint64]) -> F32Array:
    """Values of contiguous bytes: two at a time where rows are even, as numpy widens each index to 8 bytes."""
    found = np.empty(codes.shape, np.float32)
    if codes.shape[-1] % 2:
        np.take(values, codes, out=found, mode="clip")
    else:
        np.take(pairs, codes.view("<u2"), out=found.view(np.uint64), mode="clip")
    return found


def paired(values: F32Array) -> npt.NDArray[np.uint64]:
    """The values of each two bytes side by side, 512 KB."""
    both = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    pairs: npt.NDArray[np.uint64] = values[both].view(np.uint64)
    return pairs


@cache
def _tables(dtype: str) -> tuple[F32Array, npt.NDArray[np.uint64]]:
    return table(dtype), paired(table(dtype))


def _scales(stored: Array, settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Scales of each row in the stored slice, (last - first, scales a row), or (1, 1) for the tensor's."""
    dtype = settings["scale_dtype"]
    stored = np.atleast_1d(stored)
    values = table("F8_E8M0")[stored] if dtype in EXPONENTS else decode32(stored, DTYPES[dtype])
    if _single(settings):
        return values.reshape(1, 1)
    *lead, out, columns = settings["shape"]
    rows, per_row = settings["block"][0], -(-columns // settings["block"][1])
    row = np.arange(first, last) - (first // out * out if lead else first // rows * rows)
    grid = values.reshape(-1, per_row)
    chosen: F32Array = grid[row // out * -(-out // rows) + row % out // rows if lead else row // rows]
    return chosen


def _each_block(operation: np.ufunc, values: F32Array, scales: F32Array, columns: int) -> None:
    """Multiplies or divides each `columns` values of a row by their scale, in place; the last few may be fewer."""
    if scales.shape[1] == 1:
        operation(values, scales, out=values)
        return
    whole = values.shape[1] // columns
    blocks = values[:, : whole * columns].reshape(len(values), whole, columns)
    operation(blocks, scales[:, :whole, None], out=blocks)
    if whole < scales.shape[1]:
        rest = values[:, whole * columns :]
        operation(rest, scales[:, whole:], out=rest)


def align(settings: Mapping[str, Any]) -> int:
    """The rows of a block; of experts, all rows of one."""
    *lead, out, _ = settings["shape"]
    return int(out if lead else 1 if _single(settings) else settings["block"][0])


def measure(weight: F32Array, settings: Mapping[str, Any]) -> F32Array:
    """The largest magnitude, (1,), where the tensor has one scale; otherwise nothing, (0,)."""
    return np.abs(weight).max(initial=0.0, keepdims=True).reshape(1) if _single(settings) else np.empty(0, np.float32)


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Nearest codes. A new scale is the largest magnitude of its block over the largest code, 1 where all are zero.

    It is rounded to nearest; `ue8m0` rounds up to a power of two, as DeepGEMM and transformers' Fp8Quantize do.
    """
    if not np.isfinite(weight).all():
        raise ValueError("a value is not finite, which no scale can serve")
    last, name = first + len(weight), settings["scale"]
    stored = known[name] if name in known else _new_scales(_largest(weight, settings, known), settings)
    scales = _scales(stored, settings, first, last)
    columns = settings["block"][1] if scales.shape[1] > 1 else weight.shape[1]
    codes = _nearest(np.ascontiguousarray(weight), scales, columns, settings["dtype"])
    return {"weight": codes.reshape(-1, *settings["shape"][1:]), name: stored}


def _largest(weight: F32Array, settings: Mapping[str, Any], known: Mapping[str, Array]) -> F32Array:
    """The largest magnitude of each block, in the shape of these rows' slice of the scale."""
    if _single(settings):
        return np.asarray(known["measured"], np.float32).reshape(settings["scale_shape"])
    (*lead, out, _), (rows, columns) = settings["shape"], settings["block"]
    magnitude = np.abs(weight).reshape(-1, out if lead else len(weight), weight.shape[1])
    return _maxima(_maxima(magnitude, rows, 1), columns, 2).reshape(-1, *settings["scale_shape"][1:])


def _maxima(values: F32Array, size: int, axis: int) -> F32Array:
    """The maximum of each `size` values of an axis; the last few may be fewer, which takes longer."""
    if values.shape[axis] % size:
        return np.maximum.reduceat(values, np.arange(0, values.shape[axis], size), axis=axis)
    maxima: F32Array = values.reshape(*values.shape[:axis], -1, size, *values.shape[axis + 1 :]).max(axis=axis + 1)
    return maxima


def _new_scales(largest: F32Array, settings: Mapping[str, Any]) -> Array:
    """Stored scales for these largest magnitudes."""
    top = LARGEST[settings["dtype"]]
    flat = largest.reshape(-1).astype(np.float64)
    scale = np.where(flat > 0, flat / top, 1.0)
    if settings["scale_fmt"] == "ue8m0":
        fraction, exponent = np.frexp(np.maximum(scale, 2.0**-127))
        exponent = exponent - (fraction == 0.5)
        if settings["scale_dtype"] in EXPONENTS:
            return np.asarray(exponent + 127).astype(np.uint8).reshape(largest.shape)
        scale = np.ldexp(1.0, exponent)
    dtype = DTYPES[settings["scale_dtype"]]
    bits = round_nearest(scale, dtype)
    # A scale of few bits may be rounded so far down that the largest value is out of reach.
    short = decode32(bits, dtype) * (top * (1 + 2**-5)) < flat
    raised = bits.view(f"<u{bits.itemsize}") + short
    return np.asarray(raised.view(bits.dtype).reshape(largest.shape))


def _nearest(weight: F32Array, scales: F32Array, columns: int, dtype: str) -> npt.NDArray[np.uint8]:
    """The code nearest to weight / scale, ties to even; 0 where the scale is.

    The quotient is rounded to float32 first, which can put it exactly in the middle between two codes. There, and
    only there, the product with the scale, exact in float64, says on which side it belongs.
    """
    quotient = weight.copy()
    with np.errstate(over="ignore"):
        _each_block(np.divide, quotient, np.where(scales == 0, np.float32(np.inf), scales), columns)
    codes = encode_float(quotient, dtype)
    row, column = np.nonzero((quotient.view(np.uint32) & 0xFFFF == 0) & (look_up(codes, *_tables(dtype)) != quotient))
    middle, scale = quotient[row, column], scales[row % len(scales), column // columns].astype(np.float64)
    error = (weight[row, column] - middle.astype(np.float64) * scale) * np.sign(scale)
    aside = np.nextafter(middle, np.copysign(np.float32(np.inf), error).astype(np.float32))
    codes[row, column] = encode_float(np.where(error == 0, middle, aside), dtype)
    return codes


def fresh(shape: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """A new weight: `strategy` block (the default), channel or tensor; `fmt`, `scale_fmt`, `weight_block_size`."""
    defaults = {"strategy": "block", "weight_block_size": [128, 128], "fmt": "e4m3", "scale_fmt": "float"}
    if unknown := sorted(set(options) - set(defaults)):
        raise ValueError(f"FP8 has no option {', '.join(unknown)}; it has {', '.join(defaults)}")
    chosen = {**defaults, **options}
    if len(shape) not in (2, 3):
        raise ValueError(f"a weight {list(shape)} cannot be FP8: it is (out, in), or (experts, out, in)")
    if chosen["fmt"] not in FORMATS:
        raise ValueError(f"fmt {chosen['fmt']!r} of FP8 is not known: {', '.join(FORMATS)}")
    dtype, scale, scale_dtype, lead = FORMATS[chosen["fmt"]], "weight_scale_inv", "F32", tuple(shape[:-2])
    match chosen["strategy"]:
        case "block":
            scale_shape = _grid(shape, _checked(chosen["weight_block_size"]))
            scale_dtype = "F8_E8M0" if chosen["scale_fmt"] == "ue8m0" else "F32"
        case "channel":
            scale, scale_shape = "weight_scale", (*lead, shape[-2], 1)
        case "tensor":
            scale_shape = (*lead, 1, 1) if lead else ()
        case other:
            raise ValueError(f"strategy {other!r} of FP8 is not known: block, channel or tensor")
    if chosen["strategy"] != "block":
        if {"weight_block_size", "scale_fmt"} & set(options):
            raise ValueError(f"weight_block_size and scale_fmt belong to strategy block, not to {chosen['strategy']}")
        chosen["weight_block_size"] = None
    found = {"weight": (dtype, tuple(shape)), scale: (scale_dtype, scale_shape)}
    return settings(chosen, "the weight", found, lambda _: np.empty(0))


def config(settings: Mapping[str, Any], excluded: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` as transformers 5.23 reads it; of a `weight_scale` a tensor, as AutoFP8 writes it."""
    fmt = next(name for name, dtype in FORMATS.items() if dtype == settings["dtype"])
    plain = {"quant_method": "fp8", "fmt": fmt, "activation_scheme": "dynamic"}
    skip = {"modules_to_not_convert": list(excluded)}
    match settings["strategy"], settings["scale"]:
        case "channel", "weight_scale":
            return {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, **skip}
        case "channel", _:
            raise ValueError("no quantization_config declares a weight_scale_inv a row; keep that of the base")
        case "tensor", "weight_scale":
            return {**plain, "ignored_layers": list(excluded)}
        case "tensor", _:
            return {**plain, "weight_block_size": None, **skip}
    power = {"scale_fmt": "ue8m0"} if settings["scale_fmt"] == "ue8m0" else {}
    return {**plain, "weight_block_size": settings["block"], **power, **skip}
