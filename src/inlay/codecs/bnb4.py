"""bitsandbytes nf4 and fp4: four bits a value, one absmax for a block of values.

    weight       two codes a byte, the first in the high half; bytes in rows of one, [n, 1], or the same bytes under
                 another dtype (`quant_storage`): [n / 2, 1] of BF16, [n / 4, 1] of F32
    absmax       one scale for each `blocksize` values of the weight read row by row; a block may cross rows
    quant_map    the 16 values, F32; as bitsandbytes does, decoding goes by the type's name, so they must agree
    quant_state  JSON text as bytes: quant_type, blocksize, dtype, shape, and nested_… below; its key names the type

    value = table[code] · absmax[block]                                    Dettmers et al. 2023, QLoRA, section 3

With double quantisation absmax is U8, one code of nested_quant_map with one nested_absmax for each
`nested_blocksize` of them. The product is rounded to nested_dtype, and so is its sum with nested_offset:

    absmax = nested_quant_map[code] · nested_absmax[block] + nested_offset

bitsandbytes 0.50.2: functional.py, QuantState and quantize_4bit; backends/default/ops.py. Its kernel for CPUs with
AVX-512 takes another absmax where a row does not begin at a block; the formula above is that of every other kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.codecs import compiled
from inlay.dtypes import BY_TORCH_NAME, DTYPES, Array, DType, decode32, round_nearest

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

METHODS = ("bitsandbytes",)
PARTS = {"weight": ".weight", "absmax": ".weight.absmax", "quant_map": ".weight.quant_map"}
OPTIONAL = {
    "state_nf4": ".weight.quant_state.bitsandbytes__nf4",
    "state_fp4": ".weight.quant_state.bitsandbytes__fp4",
    "nested_absmax": ".weight.nested_absmax",
    "nested_quant_map": ".weight.nested_quant_map",
}
NAME_SUFFIX = ".weight"
CODES = ("U8", "I8", "U16", "I16", "BF16", "F16", "F32", "I32", "F64")  # of bnb_4bit_quant_storage
EXTRAS: tuple[str, ...] = ()

TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4,
        0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4,
    ),
}  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FIELDS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
NESTED_FIELDS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
FLOATS = ("bfloat16", "float16", "float32")
STORAGE = {"U8": "uint8", "I8": "int8", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
OPTIONS = {"quant_type": "nf4", "blocksize": 64, "double_quant": True, "dtype": "bfloat16", "storage": "uint8"}
CHUNK = 1 << 17  # values that stay in the cache while codes are chosen; a multiple of every block size
NESTED_BLOCK = 256
OFFSET_ROOM = 20 * " "  # for a longer offset than 0.0, after the text
TINY = np.float32(1e-38)  # the least absmax that bitsandbytes divides by


def settings(
    config: Mapping[str, Any],
    module: str,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Array],
) -> dict[str, Any]:
    """Shape, block sizes and dtypes, from the packed quant_state and checked against every part."""
    if config.get("load_in_8bit") and not config.get("load_in_4bit"):
        raise ValueError(f"{module} has 4-bit parts, but quantization_config has load_in_8bit")
    missing = [PARTS[part] for part in PARTS if part not in found]
    if missing:
        raise ValueError(f"{module} has no {', '.join(missing)}: not a complete 4-bit weight of bitsandbytes")
    types = [kind for kind in TABLES if f"state_{kind}" in found]
    if len(types) != 1:
        raise ValueError(f"{module} has {len(types)} tensors quant_state.bitsandbytes__nf4 or …__fp4, and needs one")
    known = _parse(module, types[0], read(f"state_{types[0]}").tobytes())
    known["storage"], known["absmax"] = found["weight"][0], found["absmax"][0]
    _check_dtypes(module, known)
    expected = layout(known)
    for part in sorted(found.keys() | expected.keys()):
        if found.get(part) != expected.get(part):
            raise ValueError(
                f"{module}{(PARTS | OPTIONAL)[part]} is {_said(found.get(part))}, but a weight "
                f"{known['shape']} in blocks of {known['blocksize']} has {_said(expected.get(part))}"
            )
    if not np.allclose(read("quant_map"), TABLES[types[0]], rtol=0, atol=1e-6):
        raise ValueError(f"{module}.weight.quant_map is not the table of {types[0]}, by which bitsandbytes decodes")
    return known


def _said(part: tuple[str, tuple[int, ...]] | None) -> str:
    return "no such tensor" if part is None else f"{part[0]} {list(part[1])}"


def _parse(module: str, quant_type: str, text: bytes) -> dict[str, Any]:
    """Settings from the text of quant_state; `storage` and `absmax` are those of the tensors."""
    key = f"{module}{OPTIONAL[f'state_{quant_type}']}"
    try:
        state = json.loads(text.decode())
    except ValueError as error:
        raise ValueError(f"{key} is not JSON: {error}") from None
    if not isinstance(state, dict) or state.keys() not in (FIELDS, FIELDS | NESTED_FIELDS):
        raise ValueError(f"{key} must have {', '.join(sorted(FIELDS))}, and all of nested_… or none: {state}")
    shape = state["shape"]
    if not isinstance(shape, list) or len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{key} has shape {shape}, which is not that of a matrix")
    if state["quant_type"] != quant_type:
        raise ValueError(f"{key} has quant_type {state['quant_type']!r}, which is not that of its name")
    if state["blocksize"] not in BLOCK_SIZES or state["dtype"] not in FLOATS:
        raise ValueError(
            f"{key} has blocksize {state['blocksize']!r} and dtype {state['dtype']!r}: unknown to bitsandbytes"
        )
    nested = {name.removeprefix("nested_"): state[name] for name in state if name in NESTED_FIELDS} or None
    if nested and not (
        isinstance(nested["blocksize"], int) and nested["blocksize"] > 0
        and nested["dtype"] in FLOATS
        and isinstance(nested["offset"], int | float) and math.isfinite(nested["offset"])
    ):  # fmt: skip
        raise ValueError(f"{key} has double quantisation with {nested}: unknown to bitsandbytes")
    return {
        "shape": shape, "quant_type": quant_type, "blocksize": state["blocksize"], "dtype": state["dtype"],
        "nested": nested, "state": text.decode(),
    }  # fmt: skip


def _check_dtypes(module: str, known: Mapping[str, Any]) -> None:
    if known["storage"] not in STORAGE:
        raise ValueError(f"{module}.weight is {known['storage']}, which bitsandbytes does not store codes in")
    if known["absmax"] not in (("U8",) if known["nested"] else ("F32", "BF16", "F16")):
        raise ValueError(
            f"{module}.weight.absmax is {known['absmax']}, and quant_state has "
            f"{'' if known['nested'] else 'no '}double quantisation"
        )


def layout(settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each part's dtype and shape."""
    blocks = -(-math.prod(settings["shape"]) // settings["blocksize"])
    parts = {
        "weight": (settings["storage"], (_units(settings), 1)),
        "absmax": (settings["absmax"], (blocks,)),
        "quant_map": ("F32", (16,)),
        f"state_{settings['quant_type']}": ("U8", (len(settings["state"].encode()),)),
    }
    if settings["nested"]:
        parts["nested_absmax"] = ("F32", (-(-blocks // settings["nested"]["blocksize"]),))
        parts["nested_quant_map"] = ("F32", (256,))
    return parts


def _itemsize(settings: Mapping[str, Any]) -> int:
    return DTYPES[settings["storage"]].bits // 8


def _units(settings: Mapping[str, Any]) -> int:
    """Elements that the codes fill, of the stored dtype."""
    return -(-int(math.prod(settings["shape"])) // (2 * _itemsize(settings)))


def _columns(settings: Mapping[str, Any]) -> int:
    return int(math.prod(settings["shape"][1:]))


def spans(settings: Mapping[str, Any], first: int, last: int) -> dict[str, tuple[int, int, int] | None]:
    """Codes and scales that hold the rows: the slices may begin before them and end after."""
    begin, end = first * _columns(settings), last * _columns(settings)
    unit, block = 2 * _itemsize(settings), settings["blocksize"]
    needed: dict[str, tuple[int, int, int] | None] = {
        "weight": (0, begin // unit, -(-end // unit)),
        "absmax": (0, begin // block, -(-end // block)),
    }
    if settings["nested"]:
        block *= settings["nested"]["blocksize"]
        needed["nested_absmax"] = (0, begin // block, -(-end // block))
        needed["nested_quant_map"] = None
    return needed


def decode(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int) -> F32Array:
    """Rows `[first, last)`, float32 (last − first, in)."""
    columns, unit = _columns(settings), 2 * _itemsize(settings)
    begin, count = first * columns, (last - first) * columns
    codes = np.ascontiguousarray(parts["weight"]).reshape(-1).view(np.uint8)
    values = _lookup(codes, settings["quant_type"])[begin % unit :][:count]
    _scale(values, _scales(parts, settings, begin // settings["blocksize"]), begin, settings["blocksize"])
    return values.reshape(last - first, columns)


def by_kernel(settings: Mapping[str, Any]) -> bool:
    """Always."""
    return True


def decode_into(parts: Mapping[str, Array], settings: Mapping[str, Any], first: int, last: int, out: F32Array) -> None:
    """The same by the compiled kernel."""
    columns, unit, block = _columns(settings), 2 * _itemsize(settings), settings["blocksize"]
    begin = first * columns
    codes = np.ascontiguousarray(parts["weight"]).reshape(-1).view(np.uint8)
    nested = settings["nested"]
    if nested and nested["dtype"] == "float32":
        within = begin // block % nested["blocksize"]
        tables = parts["nested_quant_map"], parts["nested_absmax"]
        scales = compiled.nested(parts["absmax"], *tables, within, nested["blocksize"], nested["offset"])
    else:
        scales = _scales(parts, settings, begin // block)
    table = _table(settings["quant_type"])
    compiled.sixteen(codes, begin % unit, table, scales, begin % block, block, out.reshape(-1))


@cache
def _table(quant_type: str) -> F32Array:
    return np.array(TABLES[quant_type], np.float32)


@cache
def _fours(quant_type: str) -> npt.NDArray[np.complex128]:
    """The four values of two bytes, 16 bytes each; one item of the table, so that a lookup copies all of them."""
    table = np.array(TABLES[quant_type], np.float32)
    byte = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    four = np.stack([byte >> 4, byte & 15], axis=2).reshape(-1, 4)
    return np.ascontiguousarray(table[four]).view(np.complex128).reshape(-1)


def _lookup(codes: U8Array, quant_type: str) -> F32Array:
    """Two values a byte, in an array of its own. `clip` spares numpy a check and a buffer; no index is out of range."""
    even = len(codes) // 2 * 2
    values = np.empty(2 * len(codes), np.float32)
    np.take(_fours(quant_type), codes[:even].view("<u2"), out=values[: 2 * even].view(np.complex128), mode="clip")
    if even < len(codes):
        values[-2:] = _fours(quant_type)[codes[-1:]].view(np.float32)[:2]
    return values


def _scales(parts: Mapping[str, Array], settings: Mapping[str, Any], block: int) -> F32Array:
    """absmax as float32, of the blocks from `block` on."""
    if settings["nested"]:
        return _expand(parts, settings["nested"], block)
    return decode32(parts["absmax"], DTYPES[settings["absmax"]])


def _expand(parts: Mapping[str, Array], nested: Mapping[str, Any], block: int) -> F32Array:
    """absmax from its codes: product and sum each rounded to nested_dtype, and the offset too."""
    place = np.arange(block, block + len(parts["absmax"])) // nested["blocksize"] - block // nested["blocksize"]
    scales: F32Array = parts["nested_quant_map"][parts["absmax"]] * parts["nested_absmax"][place]
    offset = np.array(nested["offset"], np.float32)
    stored = BY_TORCH_NAME[nested["dtype"]]
    if stored.name == "F32":
        return scales + offset
    return _rounded(_rounded(scales, stored) + _rounded(offset, stored), stored)


def _rounded(values: F32Array, stored: DType) -> F32Array:
    return decode32(round_nearest(values.astype(np.float64), stored), stored)


def _scale(values: F32Array, scales: F32Array, begin: int, block: int) -> None:
    """Multiply values, the first of which is number `begin` of the weight, by the scale of their blocks."""
    head = min(-begin % block, len(values))
    if head:
        values[:head] *= scales[0]
        scales = scales[1:]
    whole = (len(values) - head) // block
    inner = values[head : head + whole * block].reshape(whole, block)
    np.multiply(inner, scales[:whole, None], out=inner)
    if head + whole * block < len(values):
        values[head + whole * block :] *= scales[whole]


def align(settings: Mapping[str, Any]) -> int:
    """Rows after which a block ends. Every block size is a multiple of what one stored element holds."""
    return int(settings["blocksize"] // math.gcd(settings["blocksize"], _columns(settings)))


def encode(weight: F32Array, settings: Mapping[str, Any], first: int, known: Mapping[str, Array]) -> dict[str, Array]:
    """Codes of whole blocks, and absmax in float32 where `finish` is to compress it.

    As quantize_4bit of bitsandbytes on the CPU, code for code: with double quantisation too, codes are chosen with
    absmax before it is compressed. With a stored absmax (`known`), with that.
    """
    block = settings["blocksize"]
    if first % align(settings):
        raise ValueError(f"row {first} does not begin at a block of {block}: cut at multiples of {align(settings)}")
    values = np.ascontiguousarray(weight, np.float32).reshape(-1)
    parts: dict[str, Array] = {}
    if "absmax" in known:
        scales = _scales(known, settings, first * _columns(settings) // block)
    else:
        scales = _absmax(values, block)
        stored = DTYPES["F32" if settings["nested"] else settings["absmax"]]
        parts["absmax"] = scales if stored.name == "F32" else round_nearest(scales.astype(np.float64), stored)
        scales = decode32(parts["absmax"], stored)
    packed = _pack(_places(values, scales, settings), settings["quant_type"])
    parts["weight"] = packed.view(np.dtype(DTYPES[settings["storage"]].raw)).reshape(-1, 1)
    return parts


def _absmax(values: F32Array, block: int) -> F32Array:
    starts = np.arange(0, len(values), block)
    absmax: F32Array = np.abs(np.maximum(np.maximum.reduceat(values, starts), -np.minimum.reduceat(values, starts)))
    if not np.isfinite(absmax).all():
        raise ValueError("the weight has NaN or infinite values, which 4 bits cannot hold")
    if len(values) % block:
        absmax[-1] = max(absmax[-1], TINY)  # bitsandbytes stores it so for the last block if it is not full
    return absmax


@cache
def _order(quant_type: str) -> tuple[F32Array, U8Array]:
    """The middles between the sorted values, and the code at each place."""
    table = np.array(TABLES[quant_type], np.float32)
    order = np.argsort(table, kind="stable")
    middles: F32Array = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    return middles, order.astype(np.uint8)


def _places(values: F32Array, scales: F32Array, settings: Mapping[str, Any]) -> U8Array:
    """The place of the nearest value in the sorted table: how many middles lie below."""
    block = settings["blocksize"]
    middles, _ = _order(settings["quant_type"])
    divisors = np.copysign(np.maximum(np.abs(scales), TINY), scales)
    inverse = np.float32(1) / divisors
    full = len(values) // block * block
    places = np.empty(len(values), np.uint8)
    for start in range(0, len(values), CHUNK):
        part = values[start : min(start + CHUNK, full)].reshape(-1, block)
        scaled = (part * inverse[start // block :][: len(part), None]).reshape(-1)
        if start + CHUNK >= len(values) > full:  # bitsandbytes divides in a last block that is not full
            scaled = np.append(scaled, values[full:] / divisors[-1])
        place = places[start : start + CHUNK]
        above = np.empty(len(scaled), np.bool_)
        place[:] = 0
        for middle in middles:
            place += np.greater(scaled, middle, out=above).view(np.uint8)
    return places


def _pack(places: U8Array, quant_type: str) -> U8Array:
    """Two codes a byte; an odd one is followed by the code of zero, place 7 of both tables."""
    _, order = _order(quant_type)
    if len(places) % 2:
        places = np.append(places, np.uint8(7))
    byte = np.arange(256)
    pairs = order[byte >> 4] << 4 | order[byte & 15]
    packed: U8Array = np.take(pairs, places[::2] << 4 | places[1::2], mode="clip")
    return packed


def finish(parts: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    """The parts beside the codes, from absmax of all blocks; nothing if absmax was kept.

    With double quantisation they are written with a new offset, in float32, as quantize_4bit does. The text of
    quant_state keeps its length, so that its place in the file is known before.
    """
    if "absmax" not in parts:
        return {}
    whole: dict[str, Array] = {"quant_map": np.array(TABLES[settings["quant_type"]], np.float32)}
    text = settings["state"]
    if settings["nested"]:
        text, offset = _state_text(settings, float(np.mean(parts["absmax"], dtype=np.float64)))
        whole |= _compress(parts["absmax"], offset, settings["nested"]["blocksize"])
    else:
        whole["absmax"] = parts["absmax"]
    whole[f"state_{settings['quant_type']}"] = np.frombuffer(text.encode(), np.uint8)
    return whole


def _state_text(settings: Mapping[str, Any], offset: float) -> tuple[str, np.float32]:
    """quant_state for this offset of absmax, as long as the one before, and the offset as written.

    As bitsandbytes writes it where that fits; else without spaces and with nine digits, which tell every float32
    apart, or fewer where a text was as short before.
    """
    state = {name: settings[name] for name in ("quant_type", "blocksize", "dtype", "shape")}
    nested = {"nested_blocksize": settings["nested"]["blocksize"], "nested_dtype": "float32"}
    room = len(settings["state"])
    numbers = [float(np.float32(offset)), *(float(f"{np.float32(offset):.{digits}g}") for digits in range(9, 0, -1))]
    for number in numbers:
        for separators in ((", ", ": "), (",", ":")):
            text = json.dumps({**state, **nested, "nested_offset": number}, separators=separators)
            if len(text) <= room:
                return text.ljust(room), np.float32(number)
    raise ValueError(f"quant_state of {room} bytes has no room for an offset of absmax: {settings['state']}")


def _compress(absmax: F32Array, offset: np.float32, block: int) -> dict[str, Array]:
    """absmax − offset in 8 bits, each the nearest of the dynamic map; a block of zeros has scale zero."""
    table = dynamic_map()
    centred = absmax - offset
    scales = np.maximum.reduceat(np.abs(centred), np.arange(0, len(centred), block))
    scaled = centred * (np.float32(1) / np.maximum(scales, TINY)).repeat(block)[: len(centred)]
    codes = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), scaled).astype(np.uint8)
    return {"absmax": codes, "nested_absmax": scales, "nested_quant_map": table}


def dynamic_map() -> F32Array:
    """The 256 values of bitsandbytes' signed dynamic type, sorted: create_dynamic_map in functional.py.

    ±10^(i − 6) times the middles of 2^i equal parts of [0.1, 1], for i = 0 … 6; zero; one. Bit for bit, so the
    borders are those of torch.linspace: a float32 step, counted from the nearer end.
    """
    values = [np.array([0.0, 1.0], np.float32)]
    for i in range(7):
        parts = 1 << i
        step, k = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(parts)), np.arange(parts + 1)
        upwards, downwards = np.float32(0.1) + step * k, 1 - step * (parts - k)
        borders = np.where(k < (parts + 1) // 2, upwards, downwards).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((borders[:-1] + borders[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


def fresh(shape: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a new weight. Options, all with a default: those of OPTIONS, dtypes by their names in torch."""
    unknown = options.keys() - OPTIONS.keys()
    if unknown:
        raise ValueError(f"bitsandbytes 4-bit has no option {', '.join(sorted(unknown))}; it has {', '.join(OPTIONS)}")
    chosen = {**OPTIONS, **options}
    storage = {name: stored for stored, name in STORAGE.items()}.get(chosen["storage"])
    if chosen["quant_type"] not in TABLES or chosen["blocksize"] not in BLOCK_SIZES or storage is None:
        raise ValueError(
            f"bitsandbytes has no 4-bit form with quant_type {chosen['quant_type']!r}, "
            f"blocksize {chosen['blocksize']!r} and storage {chosen['storage']!r}"
        )
    if chosen["dtype"] not in FLOATS:
        raise ValueError(f"bitsandbytes decodes to bfloat16, float16 or float32, not to {chosen['dtype']!r}")
    if len(shape) < 2 or math.prod(shape) == 0:
        raise ValueError(f"a weight {tuple(shape)} is not a matrix, which bitsandbytes needs")
    new = {
        "shape": list(shape), "quant_type": chosen["quant_type"], "blocksize": chosen["blocksize"],
        "dtype": chosen["dtype"], "storage": storage, "absmax": "U8" if chosen["double_quant"] else "F32",
        "nested": {"blocksize": NESTED_BLOCK, "dtype": "float32", "offset": 0.0} if chosen["double_quant"] else None,
    }  # fmt: skip
    if -(-math.prod(shape) // 2) % _itemsize(new):
        raise ValueError(f"the codes of {tuple(shape)} do not fill elements of {chosen['storage']}: use storage uint8")
    state = {name: new[name] for name in ("quant_type", "blocksize", "dtype", "shape")}
    if new["nested"]:
        state |= {f"nested_{name}": value for name, value in new["nested"].items()}
        return {**new, "state": json.dumps(state) + OFFSET_ROOM}
    return {**new, "state": json.dumps(state)}


def config(settings: Mapping[str, Any], excluded: list[str]) -> dict[str, Any]:
    """`quantization_config` as transformers 5 writes it (BitsAndBytesConfig.to_dict)."""
    return {
        "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False,
        "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_compute_dtype": settings["dtype"],
        "bnb_4bit_quant_storage": STORAGE[settings["storage"]],
        "bnb_4bit_quant_type": settings["quant_type"],
        "bnb_4bit_use_double_quant": bool(settings["nested"]),
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(excluded) or None, "llm_int8_threshold": 6.0,
    }  # fmt: skip
