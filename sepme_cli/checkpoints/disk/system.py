"""What operating systems and file systems do not all have, and what is done without it.

Linux has everything. macOS copies nothing within its kernel. Windows has no shared locks, no owners
and no folders that can be synced, and replaces no file that is open. Nobody else asks which system
this is; the calls of Linux that Python has no name for are in `kernel`.
"""

import errno
import mmap
import os
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

NOT_THROUGH_LINKS: int = getattr(os, "O_NOFOLLOW", 0)
"""For `open_file`: a symbolic link is not followed. On Windows few users can make any."""

_ALWAYS: int = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NAME_BYTES = 255
"""How long a file's name can be, where the system does not say that it must be shorter."""
_AT_ONCE = 2**30
"""Bytes that one call reads or writes; macOS refuses twice as many."""
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""How file systems say that they have no such thing."""
_seeking = threading.Lock()


def _module(name: str) -> Any:
    """A module that not every system has; None where it is missing."""
    try:
        return import_module(name)
    except ImportError:
        return None


_fcntl, _msvcrt = _module("fcntl"), _module("msvcrt")


def replaces_open_files() -> bool:
    """Whether a file can be replaced or removed while somebody has it open."""
    return os.name != "nt"


def open_file(path: Path, flags: int) -> int:
    """As os.open, for bytes, and not for programs that are started; a new file has the umask's
    mode."""
    return os.open(path, flags | _ALWAYS, 0o666)


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes at `offset` of an open file; none where it ends."""
    count = min(count, _AT_ONCE)
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    with _sought(descriptor, offset):
        return os.read(descriptor, count)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write at `offset` of an open file; returns how many bytes were taken."""
    data = data[:_AT_ONCE]
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _sought(descriptor, offset):
        return os.write(descriptor, data)


@contextmanager
def _sought(descriptor: int, offset: int) -> Iterator[None]:
    """An open file's place is at `offset`, for one thread at a time, and goes back after it."""
    with _seeking:
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, offset, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)


def maps_files(descriptor: int) -> bool:
    """Whether an open file, which is not empty, can be mapped into memory."""
    try:
        mmap.mmap(descriptor, 1, access=mmap.ACCESS_READ).close()
    except OSError:
        return False
    return True


def copy_within(source: int, begin: int, target: int, offset: int, count: int) -> int:
    """Copy from one open file to another within the kernel; returns how many bytes, zero where
    it cannot."""
    with suppress(OSError):
        if hasattr(os, "copy_file_range"):
            return os.copy_file_range(source, target, count, begin, offset)
    return 0


def lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed; False where there are no such locks.

    Raises BlockingIOError if another holds it. Windows, and Linux of SMB, tell the one no
    differently from the other: then that is False, too.
    """
    try:
        if _fcntl is not None:
            how = _fcntl.LOCK_SH if shared else _fcntl.LOCK_EX
            _fcntl.flock(descriptor, how | _fcntl.LOCK_NB)
            return True
        if _msvcrt is not None and not shared:
            _msvcrt.locking(descriptor, _msvcrt.LK_NBLCK, 1)
            return True
    except BlockingIOError:
        raise
    except OSError:
        return False
    return False


def unlock(descriptor: int) -> None:
    """Take a shared lock back, where there was one."""
    if _fcntl is not None:
        with suppress(OSError):
            _fcntl.flock(descriptor, _fcntl.LOCK_UN)


def close_and_remove(descriptor: int, path: Path) -> None:
    """Close a lock's file and remove it: first its name, so that nobody locks it in between.

    Where an open file has to stay, whoever has it open by then keeps it there.
    """
    if not replaces_open_files():
        os.close(descriptor)
    with suppress(OSError):
        path.unlink()
    if replaces_open_files():
        os.close(descriptor)


def is_standard_output(path: Path) -> bool:
    """Whether a path is another name of standard output, as /dev/stdout and /dev/fd/1 are.

    The name of a regular file that standard output is sent to is none: that means the file.
    """
    try:
        status = path.stat()
        same = os.path.samestat(status, os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # nothing is there, or standard output is none of the system's
        return False
    named = path.absolute().parts[1:2] in (("dev",), ("proc",))
    return same and (named or not stat.S_ISREG(status.st_mode))


def user() -> int | None:
    """Whose process this is; None where files have no owners."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def copy_owner(descriptor: int, status: os.stat_result) -> bool:
    """Give an open file the mode that `status` tells, and the owner where that is allowed.

    False if it has another mode in the end.
    """
    if not hasattr(os, "fchown"):
        return True
    with suppress(OSError):
        os.fchown(descriptor, status.st_uid, status.st_gid)
    return set_mode(descriptor, stat.S_IMODE(status.st_mode))


def set_mode(descriptor: int, mode: int) -> bool:
    """Give an open file a mode, where files have one; False if it has another in the end."""
    if not hasattr(os, "fchmod"):
        return True
    with suppress(OSError):
        os.fchmod(descriptor, mode)
    return stat.S_IMODE(os.fstat(descriptor).st_mode) == mode


def sync_folder(folder: Path) -> None:
    """Make what was made, renamed or removed in a folder last, as far as the system does that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _ALWAYS)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files and know nothing of it for folders.
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int | None:
    """How much can still be written to the disk of a folder; None where it does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def longest_name(folder: Path) -> int:
    """How many bytes a name in a folder can have."""
    with suppress(OSError):
        # FAT counts characters, and says what the most bytes are that they may come to.
        if hasattr(os, "pathconf") and (told := os.pathconf(folder, "PC_NAME_MAX")) > 0:
            return min(told, _NAME_BYTES)
    return _NAME_BYTES


def first_hole(descriptor: int, size: int) -> int:
    """Where an open file's first hole begins; its size if it has none, or nobody can tell."""
    try:
        return os.lseek(descriptor, 0, os.SEEK_HOLE) if hasattr(os, "SEEK_HOLE") else size
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return size
