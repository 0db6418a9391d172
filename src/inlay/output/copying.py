"""Moving bytes between files without looking at them: shared extents, in-kernel copies."""

from __future__ import annotations

import errno
import os

FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
CHUNK = 1 << 24
# "This pair of files cannot do it", as opposed to an error of the disk.
UNSUPPORTED = (
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EPERM, errno.ETXTBSY,
)  # fmt: skip


def clone(source: int, target: int) -> bool:
    """Make `target` share all extents of `source`; False where the file system cannot."""
    try:
        import fcntl

        fcntl.ioctl(target, FICLONE, source)
    except ImportError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def copy_span(source: int, start: int, target: int, at: int, nbytes: int) -> None:
    """Copy `nbytes` from `start` of `source` to `at` of `target`; extents are shared where they can be.

    `copy_file_range`, else `sendfile`, both inside the kernel; else blocks through a buffer.
    """
    done = 0
    for move in (_copy_file_range, _through_buffer):
        try:
            while done < nbytes:
                moved = move(source, start + done, target, at + done, min(nbytes - done, CHUNK))
                if moved == 0:
                    raise AssertionError(f"the source shrank while it was copied: wanted byte {start + done}")
                done += moved
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED or move is _through_buffer:
                raise


def _copy_file_range(source: int, start: int, target: int, at: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, target, nbytes, start, at)


def _through_buffer(source: int, start: int, target: int, at: int, nbytes: int) -> int:
    return write_at(target, os.pread(source, nbytes, start), at)


def write_at(fd: int, data: bytes | memoryview, at: int) -> int:
    """Write all of `data` at offset `at`; its length."""
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], at + done)
    return done
