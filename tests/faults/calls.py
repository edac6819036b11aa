"""Every system call by which sepme changes a disk, counted, and each of them made to go wrong.

The calls are met where Python makes them, so that this needs no privileges and no tracer;
`test_calls` compares what is met here with what strace sees.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sepme_cli.checkpoints.disk import kernel

Make = Callable[[], Any]

_OF_PYTHON = {
    "open": "openat",
    "pwrite": "pwrite64",
    "write": "write",
    "copy_file_range": "copy_file_range",
    "fsync": "fsync",
    "replace": "rename",
    "rename": "rename",
    "unlink": "unlink",
    "remove": "unlink",
    "mkdir": "mkdir",
    "rmdir": "rmdir",
    "fchmod": "fchmod",
    "fchown": "fchown",
    "chmod": "chmod",
    "ftruncate": "ftruncate",
    "truncate": "truncate",
    "link": "link",
    "symlink": "symlink",
}
"""Functions of `os` and the system calls they make; those of the kernel module are named so."""
WRITES = ("openat", "pwrite64", "copy_file_range", "mkdir", "fallocate")
"""Those that take space."""
_SECOND = ("rename", "link", "symlink")


@dataclass(frozen=True)
class Call:
    """One call. name: of the system call. paths: of the files it is about, those it names last."""

    name: str
    paths: tuple[str, ...]
    arguments: tuple[Any, ...]

    @property
    def has_halves(self) -> bool:
        """Whether half of it can be done."""
        return self.name in ("pwrite64", "copy_file_range")


class Faults:
    """What to do about the calls. By default: count them, and make them.

    A sync is not made: a process that dies takes nothing with it that the kernel has.
    """

    def __init__(self) -> None:
        self.count = 0
        self.status = 70
        self._turn = threading.RLock()  # a signal may come while it is held

    def begin(self) -> None:
        """Called in the child before the command is run."""

    def met(self, call: Call, make: Make) -> Any:
        """A call that is about to be made; returns what it returns."""
        with self._turn:
            self.count += 1
            return self.fault(self.count, call, lambda: 0 if call.name == "fsync" else make())

    def fault(self, number: int, call: Call, make: Make) -> Any:
        """Make the call, or something else of it."""
        return make()


class Recorded(Faults):
    """Keeps a list of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def fault(self, number: int, call: Call, make: Make) -> Any:
        plain = (bytes(a) if isinstance(a, memoryview) else a for a in call.arguments)
        self.calls.append(replace(call, arguments=tuple(plain)))
        return make()


class Killed(Faults):
    """Dies by SIGKILL before call `at`, or halfway through it, if it can be done by halves.

    Dead before one is dead after the one before it.
    """

    def __init__(self, at: int, *, halfway: bool = False) -> None:
        super().__init__()
        self.at, self.halfway = at, halfway

    def fault(self, number: int, call: Call, make: Make) -> Any:
        if number == self.at:
            if self.halfway:
                _half(call)
            os.kill(os.getpid(), signal.SIGKILL)
        return make()


class Signalled(Faults):
    """Gets a signal at call `at`: before it takes effect, or after."""

    def __init__(self, at: int, signal_number: int, *, after: bool) -> None:
        super().__init__()
        self.at, self.signal, self.after = at, signal_number, after

    def fault(self, number: int, call: Call, make: Make) -> Any:
        if number != self.at:
            return make()
        if not self.after:
            _real["kill"](os.getpid(), self.signal)
        try:
            return make()
        finally:
            if self.after:
                _real["kill"](os.getpid(), self.signal)


class Refused(Faults):
    """The system refuses call `at` of those named, or all from there on."""

    def __init__(self, at: int, error: int, names: tuple[str, ...], *, lasting: bool) -> None:
        super().__init__()
        self.at, self.error, self.names, self.lasting = at, error, names, lasting
        self.matching = 0

    def fault(self, number: int, call: Call, make: Make) -> Any:
        if call.name in self.names:
            self.matching += 1
            if self.matching == self.at or (self.lasting and self.matching > self.at):
                raise OSError(self.error, os.strerror(self.error), call.paths[-1])
        return make()


def _half(call: Call) -> None:
    match call.name:
        case "pwrite64":
            descriptor, data, offset = call.arguments
            _real["pwrite"](descriptor, bytes(data)[: len(data) // 2], offset)
        case "copy_file_range":
            source, target, count, *offsets = call.arguments
            _real["copy_file_range"](source, target, count // 2, *offsets)


_real = {name: getattr(os, name) for name in (*_OF_PYTHON, "kill")}


def install(faults: Faults) -> None:
    """From now on every call of this process goes through `faults`; there is no way back."""
    for name, system_call in _OF_PYTHON.items():
        setattr(os, name, _through(faults, system_call, _real[name]))
    make = kernel._call

    def called(name: str, *arguments: Any) -> None:
        plain = tuple(getattr(value, "value", value) for value in arguments)
        call = Call(name, _paths(name, plain), plain)
        faults.met(call, lambda: make(name, *arguments))

    kernel._call = called


def _through(faults: Faults, name: str, make: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **more: Any) -> Any:
        if name == "openat" and not arguments[1] & os.O_CREAT:
            return make(*arguments, **more)
        paths = _paths(name, arguments, more.get("dir_fd"))
        return faults.met(Call(name, paths, arguments), lambda: make(*arguments, **more))

    return called


def _paths(name: str, arguments: Any, folder: int | None = None) -> tuple[str, ...]:
    """The files a call is about: by the names it gives them, or of its descriptors."""
    if name == "renameat2":
        return os.fsdecode(arguments[1]), os.fsdecode(arguments[3])
    given = arguments[:2] if name in (*_SECOND, "copy_file_range") else arguments[:1]
    return tuple(_path(value, folder) for value in given)


def _path(value: Any, folder: int | None) -> str:
    if isinstance(value, int):
        return os.readlink(f"/proc/self/fd/{value}")
    within = Path(os.readlink(f"/proc/self/fd/{folder}")) if folder is not None else Path.cwd()
    return str(within / os.fsdecode(value))
