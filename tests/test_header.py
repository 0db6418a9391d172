"""One layout for reader and writer, with `safetensors` as the judge of both."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from build import raw_file, read_tensors, write_tensors
from inlay.checkpoints.header import layout, parse_header, read_header
from inlay.dtypes import DTYPES
from inlay.errors import CheckpointError

# Bits an element, written down from the format's README and tensor.rs, not from `inlay.dtypes`.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
WHOLE_BYTES = sorted(name for name, bits in BITS.items() if bits % 8 == 0)

# What the format's own writer can be given, by the names of numpy, ml_dtypes and torch.
WRITABLE = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda key: key != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def described(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    """Tensors with unique keys, each filling whole bytes."""
    names = draw(st.lists(keys, unique=True, max_size=6))
    found = []
    for name in names:
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(shapes)
        if math.prod(shape) * BITS[dtype] % 8:
            shape = (*shape, 4)
        found.append((name, dtype, shape))
    return found


def written(
    entries: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, bytes]]:
    """A file laid out by inlay and filled with random bytes; the bytes of each tensor."""
    raw, infos = layout([(key, DTYPES[dtype], shape) for key, dtype, shape in entries], metadata)
    pick = np.random.default_rng(len(raw))
    data, file = {}, raw
    for info in sorted(infos, key=lambda t: t.start):
        assert info.start == len(file), f"{info.key} does not follow its neighbour"
        data[info.key] = pick.bytes(info.nbytes)
        file += data[info.key]
    return file, data


def test_every_type_of_the_format_is_known_with_its_size() -> None:
    assert {name: dtype.bits for name, dtype in DTYPES.items()} == BITS


@given(described(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_safetensors_reads_what_layout_describes(
    entries: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    file, data = written(entries, metadata)
    found = {key: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for key, v in deserialize(file)}
    assert found == {key: (dtype, shape, data[key]) for key, dtype, shape in entries}


@given(described(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_parse_header_gives_back_what_layout_described(
    entries: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    raw, infos = layout([(key, DTYPES[dtype], shape) for key, dtype, shape in entries], metadata)
    end = max((t.end for t in infos), default=len(raw))
    header = parse_header(raw, end, "there")
    assert sorted(header.tensors, key=lambda t: t.key) == sorted(infos, key=lambda t: t.key)
    assert (header.metadata, header.raw) == (metadata, raw)


@given(described())
def test_spans_of_a_parsed_header_tile_the_rest_of_the_file(entries: list[tuple[str, str, tuple[int, ...]]]) -> None:
    file, _ = written(entries, {})
    at = 8 + struct.unpack("<Q", file[:8])[0]
    for tensor in parse_header(file[:at], len(file), "there").tensors:
        assert tensor.start == at
        at = tensor.end
    assert at == len(file)


@given(described())
def test_wide_elements_lie_on_multiples_of_their_size(entries: list[tuple[str, str, tuple[int, ...]]]) -> None:
    raw, infos = layout([(key, DTYPES[dtype], shape) for key, dtype, shape in entries], {})
    assert len(raw) % 8 == 0
    for info in infos:
        assert info.nbytes == 0 or info.start % max(1, BITS[info.dtype.name] // 8) == 0, info


@given(st.lists(st.tuples(keys, shapes), unique_by=lambda e: e[0], max_size=6), st.sampled_from(WHOLE_BYTES))
def test_order_is_kept_where_all_elements_have_one_size(entries: list[tuple[str, tuple[int, ...]]], dtype: str) -> None:
    raw, infos = layout([(key, DTYPES[dtype], shape) for key, shape in entries], {})
    assert [t.key for t in infos] == [key for key, _ in entries]
    assert list(json.loads(raw[8:])) == [key for key, _ in entries]


def test_order_is_kept_while_every_tensor_stays_aligned() -> None:
    entries = [("z", DTYPES["U8"], (4,)), ("a", DTYPES["F32"], (1,)), ("m", DTYPES["BF16"], (3,))]
    _, infos = layout(entries, {})
    assert [t.key for t in infos] == ["z", "a", "m"]


def test_wider_elements_come_first_where_order_would_break_alignment() -> None:
    entries = [("z", DTYPES["U8"], (3,)), ("a", DTYPES["F32"], (1,)), ("b", DTYPES["I64"], (1,))]
    _, infos = layout(entries, {})
    assert [t.key for t in infos] == ["b", "a", "z"]


def test_order_of_the_file_is_that_of_the_spans(tmp_path: Path) -> None:
    file, _ = written([("b", "F32", (2,)), ("a", "F32", (1,)), ("c", "F32", (3,))], {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(file)
    with safe_open(tmp_path / "x.safetensors", "np") as opened:
        assert (
            opened.offset_keys() == [t.key for t in read_header(tmp_path / "x.safetensors").tensors] == ["b", "a", "c"]
        )


@pytest.mark.parametrize("name", sorted(WRITABLE))
def test_read_header_reads_every_type_that_safetensors_writes(tmp_path: Path, name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    raw = np.random.default_rng(0).bytes(6 * dtype.itemsize)
    array = np.zeros((2, 3), dtype)
    array.view(np.uint8)[...] = (np.frombuffer(raw, np.uint8) & 1).reshape(2, -1)
    path = write_tensors(
        tmp_path / "x.safetensors", {"one": array, "none": array[:0], "scalar": array[0, 0:1].reshape(())}
    )
    header = read_header(path)
    content = path.read_bytes()
    found = {t.key: (t.dtype.name, t.shape, content[t.start : t.end]) for t in header.tensors}
    assert found == read_tensors(path)
    assert {dtype for dtype, _, _ in found.values()} == {WRITABLE[name]}


@pytest.mark.parametrize(
    ("name", "shape", "nbytes"), [("F4", (2, 4), 4), ("F6_E3M2", (4,), 3), ("F6_E2M3", (2, 8), 12)]
)
def test_packed_types_are_read_and_written_alike(
    tmp_path: Path, name: str, shape: tuple[int, ...], nbytes: int
) -> None:
    handmade = raw_file({"x": {"dtype": name, "shape": shape, "data_offsets": [0, nbytes]}}, bytes(range(nbytes)))
    (tmp_path / "x.safetensors").write_bytes(handmade)
    assert read_tensors(tmp_path / "x.safetensors") == {"x": (name, shape, bytes(range(nbytes)))}
    (tensor,) = read_header(tmp_path / "x.safetensors").tensors
    assert (tensor.dtype.name, tensor.shape, tensor.nbytes) == (name, shape, nbytes)
    raw, (info,) = layout([("x", DTYPES[name], shape)], {})
    assert (info.start, info.nbytes) == (len(raw), nbytes)


def test_packed_elements_that_fill_no_whole_byte_are_refused() -> None:
    file = raw_file({"x": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(SafetensorError):
        deserialize(file)
    with pytest.raises(CheckpointError, match="'x'"):
        parse_header(file[:-1], len(file), "there")


def judged(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the format's own reader makes of a file; None where it refuses."""
    try:
        return {key: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for key, v in deserialize(file)}
    except SafetensorError:
        return None


def ours(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The same by inlay."""
    length = struct.unpack("<Q", file[:8])[0]
    try:
        header = parse_header(file[: 8 + length], len(file), "there")
    except CheckpointError:
        return None
    return {t.key: (t.dtype.name, t.shape, file[t.start : t.end]) for t in header.tensors}


@settings(max_examples=300)
@given(described(), st.data())
def test_a_header_that_inlay_accepts_means_the_same_to_safetensors(
    entries: list[tuple[str, str, tuple[int, ...]]], data: st.DataObject
) -> None:
    """Any byte of the header changed: where inlay reads the file, the format's reader reads the same in it."""
    file, _ = written(entries, {"format": "pt"})
    length = struct.unpack("<Q", file[:8])[0]
    assume(length)
    at = data.draw(st.integers(8, 7 + length), "at")
    to = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789[]{},:"- ')), "to")
    mutated = file[:at] + bytes([to]) + file[at + 1 :]
    found = ours(mutated)
    if found is not None:
        assert found == judged(mutated)


ACCEPTED_BY_THE_FORMAT = {
    "no tensors": raw_file({}),
    "no tensors, padded": raw_file("{}      "),
    "metadata null": raw_file('{"__metadata__":null}'),
    "metadata empty": raw_file('{"__metadata__":{}}'),
    "scalar": raw_file({"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, b"1234"),
    "empty axis": raw_file({"x": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]}}),
    "empty tensors at one place": raw_file(
        {k: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for k in ("x", "y")}
    ),
    "empty tensor between others": raw_file(
        {
            "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            "none": {"dtype": "U8", "shape": [0], "data_offsets": [1, 1]},
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        },
        b"abc",
    ),
    "members in another order": raw_file('{"x":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"}}', b"1"),
    "escaped key": raw_file('{"\\u00e9\\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "misaligned": raw_file(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
        },
        b"12345",
    ),
}


@pytest.mark.parametrize("case", ACCEPTED_BY_THE_FORMAT)
def test_what_safetensors_reads_is_read(case: str) -> None:
    file = ACCEPTED_BY_THE_FORMAT[case]
    assert judged(file) is not None
    assert ours(file) == judged(file)
