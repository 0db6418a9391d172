"""Moving bytes: shared extents, in-kernel copies, and what happens where neither works."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import build
import inlay
from inlay.output import copying
from inlay.run import local


def test_copy_span_moves_exactly_the_span(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 8)
    with open(tmp_path / "a", "rb") as a, open(tmp_path / "b", "w+b") as b:
        b.write(b"\xff" * 1000)
        b.flush()
        copying.copy_span(a.fileno(), 100, b.fileno(), 10, 700)
    wanted = b"\xff" * 10 + (bytes(range(256)) * 8)[100:800] + b"\xff" * 290
    assert (tmp_path / "b").read_bytes() == wanted


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_copy_file_range_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    base, adapter = build.write_base(tmp_path / "base"), build.write_adapter(tmp_path / "adapter")
    plan = inlay.make_plan(base, [adapter])
    inlay.run_plan(plan, tmp_path / "kernel")
    monkeypatch.setattr(os, "copy_file_range", refused)
    inlay.run_plan(plan, tmp_path / "buffer")
    name = "model.safetensors"
    assert (tmp_path / "kernel" / name).read_bytes() == (tmp_path / "buffer" / name).read_bytes()


def test_a_disk_error_while_copying_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    plan = inlay.make_plan(build.write_base(tmp_path / "base"), [build.write_adapter(tmp_path / "adapter")])
    monkeypatch.setattr(os, "copy_file_range", broken)
    with pytest.raises(inlay.InlayError, match=os.strerror(errno.EIO)):
        inlay.run_plan(plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_cloned_shard_gets_only_its_touched_spans_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of file systems that share extents, with a clone made by copying."""
    base, adapter = build.write_base(tmp_path / "base"), build.write_adapter(tmp_path / "adapter")
    plan = inlay.make_plan(base, [adapter])
    inlay.run_plan(plan, tmp_path / "written")
    cloned, copied = [], []

    def clone(source: int, target: int) -> bool:
        cloned.append(target)
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return True

    monkeypatch.setattr(local, "clone", clone)
    monkeypatch.setattr(local, "copies", lambda *args: copied.append(args) or iter(()))
    inlay.run_plan(plan, tmp_path / "cloned")
    name = "model.safetensors"
    assert cloned
    assert not copied
    assert (tmp_path / "cloned" / name).read_bytes() == (tmp_path / "written" / name).read_bytes()


def test_a_shard_with_another_header_is_not_cloned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = inlay.make_plan(
        build.write_base(tmp_path / "base"), [build.write_adapter(tmp_path / "adapter")], torch_dtype="float32"
    )
    monkeypatch.setattr(local, "clone", lambda *_: pytest.fail("a clone would keep the wrong header"))
    inlay.run_plan(plan, tmp_path / "out")
