"""System calls of Linux that Python has no name for."""

import ctypes
import errno
import os

_AT_CWD = -100
_EXCHANGE = 2
_WRITE = 2


def fallocate(descriptor: int, mode: int, offset: int, count: int) -> None:
    """Change what space a file has; see fallocate(2). OSError, also where there is no such call."""
    _call("fallocate", descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(count))


def exchange(one: os.PathLike[str], other: os.PathLike[str]) -> None:
    """Swap two names at once; OSError as above."""
    _call("renameat2", _AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE)


def start_writing(descriptor: int, offset: int, count: int) -> None:
    """Begin to write a range of a file to the disk, without waiting for it; OSError as above."""
    _call("sync_file_range", descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), _WRITE)


def _call(name: str, *arguments: object) -> None:
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, TypeError):  # as macOS and as Windows say that there is none
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
