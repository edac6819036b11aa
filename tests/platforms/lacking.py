"""Takes away from Python what other operating systems do not have: a plugin for pytest.

SEPME_AS says which one this process is to be like. What it cannot be like: paths, text encodings,
and programs that behave differently there.
"""

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

SYSTEMS = ("macos", "windows")
MODULES = {"macos": (), "windows": ("fcntl", "grp", "pwd", "resource", "termios", "tty")}
NAMES = {
    "macos": ("copy_file_range", "posix_fallocate", "posix_fadvise", "splice", "memfd_create"),
    "windows": (
        *("copy_file_range", "posix_fallocate", "posix_fadvise", "splice", "memfd_create"),
        *("pread", "preadv", "pwrite", "pwritev", "fchmod", "fchown", "chown"),
        *("geteuid", "pathconf", "fpathconf", "sync"),
        *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "SEEK_DATA", "SEEK_HOLE"),
    ),
}
CALLS = ("fallocate", "renameat2", "sync_file_range")
"""Of Linux, in its C library."""


def be_like(name: str) -> None:
    """From now on this process has what that system has; there is no way back."""
    if name == "windows":
        sys.modules["msvcrt"] = _msvcrt(fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for module in MODULES[name]:
        sys.modules[module] = None  # type: ignore[assignment]
    for attribute in NAMES[name]:
        delattr(os, attribute)
    real = ctypes.CDLL

    def library(path: Any, *arguments: Any, **options: Any) -> Any:
        if path is not None:
            return real(path, *arguments, **options)
        if name == "windows":
            raise TypeError("bad argument type for built-in operation")
        return _Without(real(path, *arguments, **options))

    ctypes.CDLL = library  # type: ignore[assignment,misc]
    if name == "windows":
        _keep_open_files()


class _Without:
    """A C library that has not all calls."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        if name in CALLS:
            raise AttributeError(name)
        return getattr(self._library, name)


def _msvcrt(flock: Callable[[int, int], None], how: int) -> ModuleType:
    """Windows' module, with the one thing that we use of it."""
    module: Any = ModuleType("msvcrt")
    module.LK_NBLCK = 2

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (module.LK_NBLCK, 1)
        try:
            flock(descriptor, how)
        except BlockingIOError:
            raise _denied(None) from None

    module.locking = locking
    return module


def _keep_open_files() -> None:
    """Have the system replace and remove no file that this process has open."""
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, _if_closed(getattr(os, name)))
    from sepme_cli.checkpoints.disk import system

    system.replaces_open_files = lambda: False


def _if_closed(make: Callable[..., None]) -> Callable[..., None]:
    def made(*paths: Any, **options: Any) -> None:
        if not options:
            for path in paths:
                if os.path.realpath(path) in _opened():
                    raise _denied(path)
        make(*paths, **options)

    return made


def _opened() -> set[str]:
    folder, found = Path("/proc/self/fd"), set()
    for number in os.listdir(folder):
        try:
            found.add(os.readlink(folder / number))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found


def _denied(path: object) -> OSError:
    return PermissionError(errno.EACCES, "Permission denied", path)


if "SEPME_AS" in os.environ:
    be_like(os.environ["SEPME_AS"])
