"""`torch.save` files (`pytorch_model*.bin`), read as a table of spans and without running code.

Two layouts exist:

    zip       (torch >= 1.6)  <name>/data.pkl describes the tensors, <name>/data/<key> holds a storage, uncompressed
    legacy    (torch <  1.6)  pickles for magic, protocol, system, tensors and storage keys; then each storage
                              as 8 bytes of element count and its elements

A pickle is a program. Ours may build dicts and lists, and call the handful of names below, which only
make descriptions; anything else is refused by name. No torch is needed, and no tensor data is read.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from inlay.checkpoints.header import LFS_POINTER, MAX_HEADER_BYTES, MAX_SIZE
from inlay.checkpoints.refs import TensorInfo
from inlay.dtypes import DTYPES, DType
from inlay.errors import CheckpointError

STORAGE_TYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
# What pickle, zipfile and struct raise on broken input.
BROKEN = (
    zipfile.BadZipFile, struct.error, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
    OverflowError, MemoryError, RecursionError, NotImplementedError, RuntimeError, OSError,
)  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Sealed:
    """Base of all that a pickle can get hold of: it cannot be given another state."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it wants to change what it was given")


@dataclass(frozen=True)
class _Storage(_Sealed):
    """`dtype` is None for an untyped storage, whose `count` is in bytes."""

    key: str
    dtype: DType | None
    count: int


@dataclass(frozen=True)
class _Tensor(_Sealed):
    storage: _Storage
    dtype: DType
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Name(_Sealed):
    """A name of the pickle: a function to call, a storage type or a dtype to refer to; never a real class."""

    call: Callable[..., Any] | None = None
    dtype: DType | None = None
    is_storage: bool = False

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise pickle.UnpicklingError("it wants to call a type")
        return self.call(*args)


class _State(dict):  # type: ignore[type-arg]
    """An OrderedDict of the pickle; the `_metadata` that modules hang on it is dropped."""

    def __setstate__(self, state: object) -> None:
        pass


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or storage.dtype is None:
        raise pickle.UnpicklingError("a tensor without a typed storage")
    return _described(storage, storage.dtype, offset, shape, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    """Types that have no storage class of their own, such as float8, lie in untyped storages."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Name) or dtype.dtype is None:
        raise pickle.UnpicklingError("a tensor without a storage and a dtype")
    return _described(storage, dtype.dtype, offset, shape, stride)


def _described(storage: _Storage, dtype: DType, offset: Any, shape: Any, stride: Any) -> _Tensor:
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        raise pickle.UnpicklingError(f"a tensor of shape {shape!r:.80} and strides {stride!r:.80}")
    if not all(type(n) is int and 0 <= n < MAX_SIZE for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError(f"a tensor of shape {shape!r:.80} and strides {stride!r:.80} at {offset!r:.80}")
    return _Tensor(storage, dtype, offset, shape, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


ALLOWED = {
    ("collections", "OrderedDict"): _Name(lambda *items: _State(*items)),
    ("torch._utils", "_rebuild_tensor"): _Name(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Name(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Name(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Name(_rebuild_parameter),
    ("torch.storage", "UntypedStorage"): _Name(is_storage=True),
    ("torch", "UntypedStorage"): _Name(is_storage=True),
    **{("torch", name): _Name(dtype=DTYPES[dtype], is_storage=True) for name, dtype in STORAGE_TYPES.items()},
    **{("torch", d.torch): _Name(dtype=d) for d in DTYPES.values() if d.torch and d.bits >= 8},
}


# The interpreter of pickle that is written in Python keeps its memo in a dictionary; the compiled one
# allocates it up to the largest number that the file names.
class _Reader(pickle._Unpickler):
    """An unpickler that can name nothing outside ALLOWED."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it wants to use {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError(f"unknown reference {pid!r:.80}")
        kind, key, count = pid[1], pid[2], pid[4]
        if not kind.is_storage or not isinstance(key, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"unknown reference {pid!r:.80}")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage, as torch < 0.4 wrote it")
        return _Storage(key, kind.dtype, count)


def read_torch_bin(path: Path) -> tuple[TensorInfo, ...]:
    """Tensors of the file and their spans, in file order.

    Raises CheckpointError for a file with code in it, a broken file, and a tensor that is not stored
    contiguously.
    """
    with open(path, "rb") as file:
        try:
            start = file.read(max(4, len(LFS_POINTER)))
            if start == LFS_POINTER:
                raise CheckpointError(f"{path} is a Git-LFS pointer, not the file itself: fetch it with `git lfs pull`")
            file.seek(0)
            state, places = _read_zip(file, path) if start[:4] == b"PK\x03\x04" else _read_legacy(file)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: refused: {error}. A checkpoint holds tensors only; this one holds code or objects, which are "
                "never run. Load it where you trust it and save it again as safetensors"
            ) from None
        except BROKEN as error:
            raise CheckpointError(f"{path}: not a file that torch.save wrote: {error!r}") from None
    return tuple(_spans(state, places, path))


def _read_zip(file: IO[bytes], path: Path) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    with zipfile.ZipFile(file) as archive:
        infos = {i.filename: i for i in archive.infolist()}
        pickles = [name for name in infos if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: expected one data.pkl in the archive, found {len(pickles)}")
        root = pickles[0][: -len("data.pkl")]
        order = infos.get(root + "byteorder")
        if order is not None and _member(file, order, path) != b"little":
            raise CheckpointError(f"{path}: stored in big-endian order; save it again on a little-endian machine")
        state = _Reader(io.BytesIO(_member(file, infos[pickles[0]], path))).load()
        prefix = root + "data/"
        places = {
            name[len(prefix) :]: _stored_span(file, info, path)
            for name, info in infos.items()
            if name.startswith(prefix)
        }
    return state, places


def _stored_span(file: IO[bytes], info: zipfile.ZipInfo, path: Path) -> tuple[int, int]:
    """Span of an archive member's data: the local header has lengths of its own (APPNOTE.TXT 4.3.7)."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: member {info.filename} is compressed; torch.save stores it as it is")
    file.seek(info.header_offset)
    local = file.read(30)
    name_length, extra_length = struct.unpack("<HH", local[26:30]) if len(local) == 30 else (0, 0)
    if local[:4] != b"PK\x03\x04" or file.read(name_length) != info.filename.encode():
        raise CheckpointError(f"{path}: broken archive at member {info.filename}")
    start = info.header_offset + 30 + name_length + extra_length
    return start, start + info.file_size


def _member(file: IO[bytes], info: zipfile.ZipInfo, path: Path) -> bytes:
    """Content of a small member, checked against its checksum."""
    start, end = _stored_span(file, info, path)
    if end - start > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: member {info.filename} has {end - start} bytes, too many for a description")
    file.seek(start)
    content = file.read(end - start)
    if zlib.crc32(content) != info.CRC:
        raise CheckpointError(f"{path}: broken archive: member {info.filename} does not fit its checksum")
    return content


def _read_legacy(file: IO[bytes]) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    if _Reader(file).load() != LEGACY_MAGIC:
        raise pickle.UnpicklingError("no magic number")
    _Reader(file).load()  # protocol version
    system = _Reader(file).load()
    if not (isinstance(system, dict) and system.get("little_endian")):
        raise pickle.UnpicklingError("stored in big-endian order")
    state = _Reader(file).load()
    keys = _Reader(file).load()
    storages = {t.storage.key: t.storage.dtype for t in _tensors(state).values()}
    places = {}
    at = file.tell()
    for key in keys:
        file.seek(at)
        (count,) = struct.unpack("<q", file.read(8))
        if key not in storages:
            raise pickle.UnpicklingError(f"storage {key!r} belongs to no tensor")
        dtype = storages[key]
        end = at + 8 + (count if dtype is None else dtype.nbytes(count))
        places[key] = (at + 8, end)
        at = end
    return state, places


def _tensors(state: Any) -> dict[str, _Tensor]:
    """The tensors of a state dict, also of one wrapped in {"state_dict": …}."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise pickle.UnpicklingError("not a dictionary of tensors")
    others = [k for k, v in state.items() if not isinstance(v, _Tensor)]
    if others:
        raise pickle.UnpicklingError(f"{others[0]!r} is not a tensor")
    return state


def _spans(state: Any, places: Mapping[str, tuple[int, int]], path: Path) -> Iterator[TensorInfo]:
    file_nbytes = path.stat().st_size
    found = []
    try:
        tensors = _tensors(state)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for key, t in tensors.items():
        if t.storage.key not in places:
            raise CheckpointError(f"{path}: {key!r}: its storage {t.storage.key!r} is not in the file")
        if not _contiguous(t):
            raise CheckpointError(
                f"{path}: {key!r} is stored with strides {t.stride} for shape {t.shape}; "
                "save the checkpoint again with contiguous tensors (or as safetensors)"
            )
        dtype = t.dtype
        start = places[t.storage.key][0] + dtype.nbytes(t.offset)
        end = start + dtype.nbytes(math.prod(t.shape))
        if end > min(places[t.storage.key][1], file_nbytes):
            raise CheckpointError(f"{path}: truncated: {key!r} ends at byte {end}, the file at {file_nbytes}")
        found.append(TensorInfo(key, dtype, t.shape, start, end))
    yield from sorted(found, key=lambda t: t.start)


def _contiguous(t: _Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
