"""`torch.save` files, read without torch and without running them; torch is the judge."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import (
    CONFIG,
    adapter_config,
    adapter_tensors,
    base_tensors,
    listing,
    modules_of,
    read_arrays,
    read_tensors,
    with_memory,
    within,
    write_adapter,
    write_base,
    write_json,
)
from inlay import make_plan, run_plan, verify
from inlay.checkpoints.torch_bin import read_torch_bin
from inlay.errors import CheckpointError

torch = pytest.importorskip("torch")

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
PLAIN = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
# Types without a storage class of their own; torch writes them by `_rebuild_tensor_v3`.
NEWER = {
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def save(state: Any, path: Path, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def tensor_bytes(tensor: Any) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What inlay finds: dtype, shape, and the bytes at the span."""
    content = path.read_bytes()
    return {t.key: (t.dtype.name, t.shape, content[t.start : t.end]) for t in read_torch_bin(path)}


def some(dtype: str, shape: tuple[int, ...] = (3, 4)) -> Any:
    kind = getattr(torch, dtype)
    nbytes = int(np.prod(shape)) * torch.empty((), dtype=kind).element_size()
    raw = np.random.default_rng(len(dtype)).integers(0, 2, nbytes, dtype=np.uint8)
    return torch.from_numpy(raw).view(kind if nbytes else torch.uint8).to(kind).reshape(shape)


@FORMATS
@pytest.mark.parametrize("dtype", PLAIN)
def test_every_type_is_read_as_torch_wrote_it(tmp_path: Path, dtype: str, zipped: bool) -> None:
    state = {"a": some(dtype), "scalar": some(dtype, ()), "none": some(dtype, (0, 3)), "flat": some(dtype, (7,))}
    path = save(state, tmp_path / "x.bin", zipped)
    assert read(path) == {k: (PLAIN[dtype], tuple(t.shape), tensor_bytes(t)) for k, t in state.items()}


@FORMATS
@pytest.mark.parametrize("dtype", NEWER)
def test_types_without_a_storage_class_are_read_too(tmp_path: Path, dtype: str, zipped: bool) -> None:
    state = {"a": some(dtype)}
    path = save(state, tmp_path / "x.bin", zipped)
    assert read(path) == {"a": (NEWER[dtype], (3, 4), tensor_bytes(state["a"]))}


@FORMATS
def test_views_into_one_storage_are_found_at_their_offsets(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(24, dtype=torch.float32)
    state = {
        "whole": whole,
        "rows": whole.view(6, 4)[2:5],
        "tail": whole[20:],
        "again": whole,
        "reshaped": whole.view(2, 12),
    }
    path = save(state, tmp_path / "x.bin", zipped)
    assert read(path) == {k: ("F32", tuple(t.shape), tensor_bytes(t)) for k, t in state.items()}


@FORMATS
def test_tied_parameters_share_their_span(tmp_path: Path, zipped: bool) -> None:
    tied = torch.nn.Parameter(torch.randn(4, 3))
    infos = {t.key: t for t in read_torch_bin(save({"one": tied, "other": tied}, tmp_path / "x.bin", zipped))}
    assert (infos["one"].start, infos["one"].end) == (infos["other"].start, infos["other"].end)


@FORMATS
def test_a_state_dict_of_a_module_is_read(tmp_path: Path, zipped: bool) -> None:
    """Parameters, buffers, an OrderedDict with `_metadata`."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    assert isinstance(state, OrderedDict)
    assert hasattr(state, "_metadata")
    found = read(save(state, tmp_path / "x.bin", zipped))
    assert {k: v[2] for k, v in found.items()} == {k: tensor_bytes(t) for k, t in state.items()}
    assert found["1.num_batches_tracked"][:2] == ("I64", ())


@FORMATS
def test_parameters_and_gradients_flags_do_not_matter(tmp_path: Path, zipped: bool) -> None:
    state = {"p": torch.nn.Parameter(torch.randn(2, 2)), "t": torch.randn(2, requires_grad=True)}
    found = read(save(state, tmp_path / "x.bin", zipped))
    assert {k: v[2] for k, v in found.items()} == {k: tensor_bytes(t) for k, t in state.items()}


@FORMATS
def test_a_state_dict_in_a_wrapper_is_found(tmp_path: Path, zipped: bool) -> None:
    state = {"a": torch.randn(2)}
    assert read(save({"state_dict": state, "epoch": 3}, tmp_path / "x.bin", zipped)).keys() == {"a"}


@FORMATS
def test_tensors_come_in_the_order_of_the_file(tmp_path: Path, zipped: bool) -> None:
    infos = read_torch_bin(save({f"t{i}": torch.randn(i + 1) for i in range(12)}, tmp_path / "x.bin", zipped))
    assert [t.start for t in infos] == sorted(t.start for t in infos)


NOT_COPYABLE: dict[str, Callable[[], Any]] = {
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "strided": lambda: torch.arange(12.0)[::2],
    "expanded": lambda: torch.zeros(1).expand(3, 3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex128": lambda: torch.zeros(2, dtype=torch.complex128),
    "meta": lambda: torch.zeros(2, device="meta"),
}


@FORMATS
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
@pytest.mark.parametrize("kind", NOT_COPYABLE)
def test_what_cannot_be_copied_as_it_lies_is_refused(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = save({"good": torch.zeros(2), "bad": NOT_COPYABLE[kind]()}, tmp_path / "x.bin", zipped)
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_bin(path)


@FORMATS
@pytest.mark.parametrize(
    "state", [[torch.zeros(2)], torch.zeros(2), {"a": 1}, {"a": [torch.zeros(2)]}, {1: torch.zeros(2)}, 5, None]
)
def test_anything_but_a_dictionary_of_tensors_is_refused(tmp_path: Path, state: Any, zipped: bool) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_bin(save(state, tmp_path / "x.bin", zipped))


# ─── hostile files ───────────────────────────────────────────────────────────────────────────────────────────────────


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def bin_file(path: Path, data_pkl: bytes, storage: bytes = bytes(64), **how: Any) -> Path:
    """A zip of torch's form with any pickle in it."""
    with zipfile.ZipFile(path, "w", how.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", how.get("byteorder", "little"))
        if how.get("compress_storage"):
            archive.writestr("archive/data/0", storage, zipfile.ZIP_DEFLATED)
        else:
            archive.writestr("archive/data/0", storage, zipfile.ZIP_STORED)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("call", ["os.system", "open", "exec", "subprocess.Popen", "builtins.eval", "shutil.rmtree"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path, call: str, zipped: bool) -> None:
    trace, victim = tmp_path / "trace", tmp_path / "victim"
    victim.mkdir()
    payload = {
        "os.system": Payload(os.system, f"touch {trace}"),
        "open": Payload(open, str(trace), "w"),
        "exec": Payload(exec, f"open({str(trace)!r}, 'w')"),
        "subprocess.Popen": Payload(subprocess.Popen, ["touch", str(trace)]),
        "builtins.eval": Payload(eval, f"open({str(trace)!r}, 'w')"),
        "shutil.rmtree": Payload(shutil.rmtree, str(victim)),
    }[call]
    path = save({"weight": torch.zeros(2), "evil": payload}, tmp_path / "x.bin", zipped)
    with pytest.raises(CheckpointError, match=r"x\.bin.*(code|never run)"):
        read_torch_bin(path)
    assert not trace.exists()
    assert victim.exists()


def test_code_in_a_bare_pickle_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "x.bin").write_bytes(pickle.dumps(Payload(open, str(trace), "w"), protocol))
        with pytest.raises(CheckpointError, match=r"x\.bin"):
            read_torch_bin(tmp_path / "x.bin")
    assert not trace.exists()


def test_code_of_an_adapter_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write_base(tmp_path / "base")
    write_json(tmp_path / "adapter" / "adapter_config.json", adapter_config())
    save({"evil": Payload(open, str(trace), "w")}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        make_plan(tmp_path / "base", [tmp_path / "adapter"])
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    ["torch\nload", "torch._utils\n_rebuild_tensor_v2.__globals__", "torch\nFloatStorage.__class__", "builtins\ngetattr",
     "collections\nOrderedDict.__init__", "inlay.checkpoints.torch_bin\nread_torch_bin", "torch.storage\n_load_from_bytes"],
)  # fmt: skip
def test_no_name_outside_the_list_can_be_reached(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_bin(bin_file(tmp_path / "x.bin", b"\x80\x02c" + name.encode() + b"\n."))


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
REBUILD = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00(K\x04tK\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
# A tensor of four float32, under the key "a".
GOOD = b"\x80\x02}X\x01\x00\x00\x00a" + REBUILD + b"s."


def test_the_handmade_pickle_is_one_that_torch_reads(tmp_path: Path) -> None:
    path = bin_file(tmp_path / "x.bin", GOOD, np.arange(16, dtype="<f4").tobytes())
    assert torch.load(path, weights_only=True)["a"].tolist() == [0, 1, 2, 3]
    assert read(path) == {"a": ("F32", (4,), np.arange(4, dtype="<f4").tobytes())}


def built_onto(state: bytes, target: bytes = REBUILD) -> bytes:
    """The good pickle with BUILD on one of its objects: attributes set past every check."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + target + state + b"bs."


def attribute(name: str, value: bytes) -> bytes:
    return b"}X" + struct.pack("<I", len(name)) + name.encode() + value + b"s"


OVERWRITES = {
    "shape a string": ("shape", b"X\x01\x00\x00\x00x"),
    "shape negative": ("shape", b"J\xff\xff\xff\xff\x85"),
    "shape None": ("shape", b"N"),
    "stride too long": ("stride", b"K\x01K\x01\x86"),
    "offset negative": ("offset", b"J\xf8\xff\xff\xff"),
    "offset a string": ("offset", b"X\x01\x00\x00\x00x"),
    "offset a float": ("offset", b"G\x3f\xf0\x00\x00\x00\x00\x00\x00"),
    "storage None": ("storage", b"N"),
}


@pytest.mark.parametrize("case", OVERWRITES)
def test_a_checked_description_cannot_be_overwritten(tmp_path: Path, case: str) -> None:
    """Frozen dataclasses do not stop BUILD, which writes to `__dict__`."""
    name, value = OVERWRITES[case]
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_bin(bin_file(tmp_path / "x.bin", built_onto(attribute(name, value))))


def run_python(code: str, *args: object, memory: int | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, so that what a file may do to the process stays there."""

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, preexec_fn=limit, check=False)


READ_TWO = """
import sys
from pathlib import Path
from inlay.checkpoints.torch_bin import read_torch_bin
from inlay.errors import CheckpointError
try:
    read_torch_bin(Path(sys.argv[1]))
except CheckpointError:
    pass
print([(t.key, t.dtype.name, t.shape) for t in read_torch_bin(Path(sys.argv[2]))])
"""


@pytest.mark.parametrize("method", ["__setitem__", "items", "get"])
@pytest.mark.parametrize("target", ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2"])
def test_one_file_cannot_change_how_the_next_is_read(tmp_path: Path, method: str, target: str) -> None:
    """BUILD with a pair sets attributes on what is named, the reader's own classes and functions included."""
    slots = b"N" + attribute(method, b"ctorch._utils\n_rebuild_parameter\n") + b"\x86"
    evil = bin_file(tmp_path / "evil.bin", built_onto(slots, b"c" + target.encode() + b"\n"))
    good = save(OrderedDict(a=torch.zeros(3)), tmp_path / "good.bin")
    done = run_python(READ_TWO, evil, good)
    assert done.stdout.strip() == "[('a', 'F32', (3,))]", done.stderr[-500:]


READ_ONE = """
import resource, sys
from pathlib import Path
from inlay.checkpoints.torch_bin import read_torch_bin
from inlay.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_torch_bin(Path(sys.argv[1]))
    word = "read"
except CheckpointError as error:
    word = "refused"
print(word, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def greed(path: Path) -> tuple[str, int]:
    """What became of a file, and the kilobytes that reading it took."""
    done = run_python(READ_ONE, path, memory=4 << 30)
    assert done.returncode == 0, done.stderr[-800:]
    word, peak = done.stdout.split()
    return word, int(peak)


GREEDY = {
    "memo of a hundred million": b"\x80\x02K\x01r" + struct.pack("<I", 10**8) + b"0" + GOOD[2:],
    "string of four billion": b"\x80\x02X\xff\xff\xff\xff",
    "bytes of an exabyte": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60),
    "frame of an exabyte": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60),
    "a number of two billion bytes": b"\x80\x02\x8b\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_small_file_cannot_take_much_memory(tmp_path: Path, case: str) -> None:
    path = bin_file(tmp_path / "x.bin", GREEDY[case])
    assert path.stat().st_size < 1000
    assert greed(path)[1] < 100_000


def test_a_packed_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """A pickle of 60 MB in a file of 60 kB; torch.save never compresses."""
    path = bin_file(tmp_path / "x.bin", GOOD[:-1] + b"N0" * 30_000_000 + b".", compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    word, peak = greed(path)
    assert word == "refused"
    assert peak < 30_000


def test_a_compressed_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin.*compressed"):
        read_torch_bin(bin_file(tmp_path / "x.bin", GOOD, compress_storage=True))


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin.*endian"):
        read_torch_bin(bin_file(tmp_path / "x.bin", GOOD, byteorder="big"))


def test_a_storage_smaller_than_its_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin.*'a'"):
        read_torch_bin(bin_file(tmp_path / "x.bin", GOOD, bytes(12)))


def test_a_size_in_the_directory_beyond_the_file_is_refused(tmp_path: Path) -> None:
    """The central directory claims a longer member than there is."""
    path = bin_file(tmp_path / "x.bin", GOOD.replace(b"(K\x04t", b"(M\xff\xfft"), bytes(64))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"archive/data/0")
    content[at - 46 + 20 : at - 46 + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_bin(path)


def test_an_archive_without_or_with_two_pickles_is_refused(tmp_path: Path) -> None:
    for names in ([], ["a/data.pkl", "b/data.pkl"]):
        with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
            archive.writestr("version", "3")
            for name in names:
                archive.writestr(name, GOOD)
        with pytest.raises(CheckpointError, match=r"x\.bin"):
            read_torch_bin(tmp_path / "x.bin")


@FORMATS
def test_a_file_cut_anywhere_is_refused_or_still_holds_its_tensors(tmp_path: Path, zipped: bool) -> None:
    path = save({"a": torch.arange(40.0), "b": torch.arange(9, dtype=torch.int16)}, tmp_path / "whole.bin", zipped)
    whole, content = read(path), path.read_bytes()
    for length in range(0, len(content), 7):
        cut = tmp_path / "cut.bin"
        cut.write_bytes(content[:length])
        try:
            assert read(cut) == whole
        except CheckpointError as error:
            assert "cut.bin" in str(error)


@FORMATS
def test_no_flipped_bit_in_the_description_raises_anything_else(tmp_path: Path, zipped: bool) -> None:
    path = save(OrderedDict(a=torch.arange(4.0), b=torch.zeros(2, 2)), tmp_path / "x.bin", zipped)
    content = path.read_bytes()
    described = [i for i in range(len(content)) if content[i]]
    pick = np.random.default_rng(0)
    with within(60), with_memory(1 << 30):
        for i in pick.choice(described, 300):
            changed = bytearray(content)
            changed[i] ^= 1 << int(pick.integers(8))
            path.write_bytes(changed)
            try:
                for info in read_torch_bin(path):
                    assert 0 <= info.start <= info.end <= len(content)
            except CheckpointError as error:
                assert "x.bin" in str(error)


@pytest.mark.parametrize("at", [50, 200, -200])
def test_an_archive_that_lost_bytes_is_refused_or_still_holds_its_tensors(tmp_path: Path, at: int) -> None:
    """Offsets in the directory then point before the start of the file."""
    path = save({"a": torch.arange(400.0)}, tmp_path / "x.bin")
    content = path.read_bytes()
    path.write_bytes(content[:at] + content[at + 2 :])
    try:
        read_torch_bin(path)
    except CheckpointError as error:
        assert "x.bin" in str(error)


@pytest.mark.parametrize("count", [-1, -(2**62), 2**62, 2**55, 2**40])
def test_an_absurd_count_before_a_legacy_storage_is_refused(tmp_path: Path, count: int) -> None:
    path = save({"a": torch.full((4,), 7.0), "b": torch.full((4,), 7.0)}, tmp_path / "x.bin", zipped=False)
    content = path.read_bytes()
    at = content.index(struct.pack("<q4f", 4, 7, 7, 7, 7))
    path.write_bytes(content[:at] + struct.pack("<q", count) + content[at + 8 :])
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_bin(path)


# ─── merging ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_torch(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        key: torch.from_numpy(a.view(np.int16) if a.dtype.name == "bfloat16" else a).view(getattr(torch, a.dtype.name))
        for key, a in arrays.items()
    }


@FORMATS
def test_a_bin_base_merges_to_what_its_safetensors_twin_gives(tmp_path: Path, zipped: bool) -> None:
    write_base(tmp_path / "twin")
    write_json(tmp_path / "base" / "config.json", CONFIG)
    save(as_torch(base_tensors()), tmp_path / "base" / "pytorch_model.bin", zipped)
    adapter = write_adapter(tmp_path / "adapter")
    for name in ("base", "twin"):
        run_plan(make_plan(tmp_path / name, [adapter]), tmp_path / f"{name}-merged")
    assert read_tensors(tmp_path / "base-merged" / "model.safetensors") == read_tensors(
        tmp_path / "twin-merged" / "model.safetensors"
    )
    assert not list((tmp_path / "base-merged").glob("*.bin"))
    assert verify(tmp_path / "base", [adapter], tmp_path / "base-merged").exact


def test_a_sharded_bin_base_gets_a_safetensors_index(tmp_path: Path) -> None:
    write_base(tmp_path / "twin")
    tensors = as_torch(base_tensors())
    halves = [list(tensors)[:6], list(tensors)[6:]]
    weight_map = {}
    for i, keys in enumerate(halves, 1):
        name = f"pytorch_model-{i:05d}-of-00002.bin"
        save({key: tensors[key] for key in keys}, tmp_path / "base" / name)
        weight_map |= dict.fromkeys(keys, name)
    nbytes = sum(t.nbytes for t in tensors.values())
    write_json(tmp_path / "base" / "config.json", CONFIG)
    write_json(
        tmp_path / "base" / "pytorch_model.bin.index.json",
        {"metadata": {"total_size": nbytes}, "weight_map": weight_map},
    )
    adapter = write_adapter(tmp_path / "adapter")
    merged, twin = tmp_path / "merged", tmp_path / "twin-merged"
    run_plan(make_plan(tmp_path / "base", [adapter]), merged)
    run_plan(make_plan(tmp_path / "twin", [adapter]), twin)
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert {p.name for p in merged.iterdir()} == {
        *names,
        "model.safetensors.index.json",
        "config.json",
        "README.md",
        "inlay.json",
    }
    found = {key: value for name in names for key, value in read_tensors(merged / name).items()}
    assert found == read_tensors(twin / "model.safetensors")
    for name, keys in zip(names, halves, strict=True):
        assert set(read_tensors(merged / name)) == set(keys)
    import json

    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, keys in zip(names, halves, strict=True) for key in keys}
    assert index["metadata"]["total_size"] == nbytes


def test_tied_tensors_of_a_bin_base_are_both_written(tmp_path: Path) -> None:
    tensors = as_torch(base_tensors())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_json(tmp_path / "base" / "config.json", CONFIG)
    save(tensors, tmp_path / "base" / "pytorch_model.bin")
    run_plan(make_plan(tmp_path / "base", [write_adapter(tmp_path / "adapter")]), tmp_path / "merged")
    merged = read_arrays(tmp_path / "merged")
    assert merged["lm_head.weight"].tobytes() == merged["model.embed_tokens.weight"].tobytes()
    assert merged["lm_head.weight"].tobytes() == base_tensors()["model.embed_tokens.weight"].tobytes()


@FORMATS
def test_a_bin_adapter_is_the_same_as_its_safetensors_twin(tmp_path: Path, zipped: bool) -> None:
    write_base(tmp_path / "base")
    twin = write_adapter(tmp_path / "twin")
    write_json(tmp_path / "bin" / "adapter_config.json", (twin / "adapter_config.json").read_text())
    pairs = {k: torch.from_numpy(a) for k, a in adapter_tensors(modules_of()).items()}
    save(pairs, tmp_path / "bin" / "adapter_model.bin", zipped)
    for name in ("bin", "twin"):
        run_plan(make_plan(tmp_path / "base", [tmp_path / name]), tmp_path / f"{name}-merged")
    assert read_tensors(tmp_path / "bin-merged" / "model.safetensors") == read_tensors(
        tmp_path / "twin-merged" / "model.safetensors"
    )


def test_reading_headers_of_a_bin_reads_no_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 64 MB is described by a few kilobytes."""
    path = save({"a": torch.zeros(8_000_000), "b": torch.zeros(8_000_000)}, tmp_path / "x.bin")
    read_bytes = 0

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> Any:
            nonlocal read_bytes
            done = super().readinto(buffer)
            read_bytes += done or 0
            return done

    def opened(file: Any, mode: str = "r", *_: Any, **__: Any) -> Any:
        return io.BufferedReader(Counting(file, "rb")) if mode == "rb" else open(file, mode)

    monkeypatch.setattr("inlay.checkpoints.torch_bin.open", opened, raising=False)
    assert len(read_torch_bin(path)) == 2
    assert 0 < read_bytes < 1_000_000


def test_refusing_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    save({"evil": Payload(os.system, f"touch {tmp_path}/trace")}, tmp_path / "base" / "pytorch_model.bin")
    before = listing(tmp_path)
    with pytest.raises(CheckpointError):
        make_plan(tmp_path / "base", [])
    assert listing(tmp_path) == before


def test_the_handmade_pickles_of_this_file_are_well_formed() -> None:
    for name, value in OVERWRITES.values():
        pickletools.dis(built_onto(attribute(name, value)), io.StringIO())
