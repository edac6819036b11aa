"""Running one reader under watch: time, memory, and what it touches or starts."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from patch_spec.errors import FormatError
from sepme_cli.errors import SepmeError

SECONDS = 1.0
"""Of the processor, that one mutant may take."""
BYTES = 256 * 2**20
"""By how much all mutants together may raise the process's memory."""

_TOUCHING = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_TOUCHING |= {"os.symlink", "os.chmod", "os.listdir", "shutil.rmtree"}
_STARTING = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.", "os.spawn")
_READABLE = (sys.prefix, sys.base_prefix, "/usr/lib", "/proc", "/sys", "/dev/urandom")


class Hang(BaseException):
    """A mutant took longer than it may. Not an Exception, which a reader might swallow."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    label: "accepted", or which typed error refused it ("malformed H3"). crash: what went wrong
    with the reader itself, by which equal crashes are told; None for nothing.
    """

    label: str
    crash: str | None = None


class Guard:
    """Watches calls that may touch `folder` and no other file."""

    _active: "Guard | None" = None
    _hooked = False

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        self.folder = os.path.realpath(folder)
        self.readable = (*map(os.path.realpath, _READABLE), str(Path(__file__).parents[2]))
        self.seconds = seconds
        self.seen: list[str] = []
        self.start = _peak()
        if not Guard._hooked:
            sys.addaudithook(_heard)
            Guard._hooked = True

    def run(self, read: Callable[[bytes], object], data: bytes) -> Outcome:
        """What `read` makes of a mutant."""
        self.seen.clear()
        try:
            with self._watched():
                read(data)
            outcome = Outcome("accepted")
        except (SepmeError, FormatError) as error:
            outcome = Outcome(label_of(error))
        except (Exception, Hang) as error:
            outcome = Outcome("crash", crash_of(error))
        if self.seen:
            return Outcome("crash", f"touched {self.seen[0]}")
        if _peak() - self.start > BYTES:
            self.start = _peak()
            return Outcome("crash", "took too much memory")
        return outcome

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            raise Hang(f"longer than {self.seconds} s")

        before = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        Guard._active = self
        try:
            yield
        finally:
            Guard._active = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of a file outside of the folder, or of something started."""
        if event.startswith(_STARTING):
            self.seen.append(f"{event} {arguments[:1]!r:.60}")
        elif event in _TOUCHING and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            reads = event == "os.listdir" or (
                event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            inside = path == self.folder or path.startswith(self.folder + os.sep)
            if not inside and not (reads and path.startswith(self.readable)):
                self.seen.append(f"{event} {path[:60]}")


def label_of(error: SepmeError | FormatError) -> str:
    """How a refusal is counted: its kind, and the rule of the format if one was broken."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FormatError):
        cause = cause.__cause__
    kind = error.kind if isinstance(error, SepmeError) else "format"
    return kind if cause is None else f"{kind} {cause.rule}"


def crash_of(error: BaseException) -> str:
    """The exception and the line of ours that it came out of."""
    place, trace = "?", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if any(f"/{ours}/" in path for ours in ("sepme_cli", "patch_spec", "fuzzing")):
            place = f"{Path(path).stem}.{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    if isinstance(error, AssertionError) and error.args:
        place += f": {error.args[0]}"
    return f"{type(error).__name__} in {place}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    guard = Guard._active
    if guard is not None:
        Guard._active = None  # what it does to find out is not heard
        try:
            guard.hear(event, arguments)
        finally:
            Guard._active = guard
