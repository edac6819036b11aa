"""Where a command's words go: results to standard output, everything else to standard error."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from sepme_cli.progress import Progress
from sepme_cli.render.wording import duration, json_text, printable

#: Off a terminal nothing is cut or folded: a table is as wide as its widest row.
UNFOLDED = 10_000
#: Off a terminal a long stage says how far it is at most this often, in seconds.
LINE_EVERY = 10.0


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process with the status that means "the answer is no".
        raise BrokenPipeError


def console_for(stream: TextIO) -> Console:
    """A console that takes text as it is: no markup, no emoji names, no guessed highlights."""
    width = None if stream.isatty() else UNFOLDED
    return _Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


class Reporter(Progress):
    """Remembers the warnings, for the result; shows nothing."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Keep a warning, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            self._show_warning(message)

    def _show_warning(self, message: str) -> None:
        """What a reporter that shows something does with a new warning."""

    def close(self) -> None:
        """The work is over, well or not: leave the terminal clean."""


class Lines(Reporter):
    """Plain lines, for logs and pipes; also what is common to everything that shows."""

    def __init__(self, stream: TextIO, *, verbose: bool) -> None:
        super().__init__()
        self.console = console_for(stream)
        self.verbose = verbose
        self._name: str | None = None
        self._total: int | None = None
        self._done = 0
        self._began = self._last_line = time.monotonic()

    def stage(self, name: str, total: int | None = None) -> None:
        """End the stage before, and begin a new one."""
        self._end_stage()
        self._name, self._total, self._done = name, total, 0
        self._began = self._last_line = time.monotonic()
        self._show_stage(name, total)

    def advance(self, steps: int = 1) -> None:
        """Count, and show how far the stage is."""
        self._done += steps
        self._show_advance(steps)

    def say(self, message: str) -> None:
        """One line."""
        self.console.print(printable(message))

    def _show_warning(self, message: str) -> None:
        self.console.print(Text.assemble(("warning: ", "yellow"), printable(message)))

    def close(self) -> None:
        """End the last stage."""
        self._end_stage()

    def _show_stage(self, name: str, total: int | None) -> None:
        self.console.print(printable(name))

    def _show_advance(self, steps: int) -> None:
        now = time.monotonic()
        if self._total is None or self._done >= self._total or now - self._last_line < LINE_EVERY:
            return
        self._last_line = now
        left = (now - self._began) / self._done * (self._total - self._done)
        self.console.print(
            printable(f"{self._name}: {self._done} of {self._total}, {duration(left)} left")
        )

    def _end_stage(self) -> None:
        if self._name is not None and self.verbose:
            took = duration(time.monotonic() - self._began)
            self.console.print(printable(f"{self._name}: done in {took}"))
        self._name = None


class Output:
    """One command's output. Leaving it takes the bars away, whatever happened.

    as_json: the result is one JSON object, and standard error stays silent unless verbose.
    piped: standard output carries a file, so the result goes to standard error (and, as JSON,
    alone).
    """

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool, piped: bool = False) -> None:
        self.as_json = as_json
        self.verbose = verbose
        self._stream = sys.stderr if piped else sys.stdout
        silent = quiet or (as_json and (piped or not verbose))
        self.progress = Reporter() if silent else _reporter(sys.stderr, verbose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.close()

    def show(self, result: Any, render: Callable[[Any], RenderableType]) -> None:
        """Print a result dataclass: as JSON, or as what `render` makes of it."""
        self.progress.close()
        if self.as_json:
            self._stream.write(json_text(result, warnings=self.progress.warnings) + "\n")
        else:
            _print(render(result), self._stream)


def _print(renderable: RenderableType, stream: TextIO) -> None:
    console = console_for(stream)
    if stream.isatty():
        console.print(renderable)
        return
    # Tables fill their last column with spaces, which nobody wants in a file.
    with console.capture() as captured:
        console.print(renderable)
    stream.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _reporter(stream: TextIO, verbose: bool) -> Reporter:
    if not stream.isatty():
        return Lines(stream, verbose=verbose)
    from sepme_cli.render.bars import Bars

    return Bars(stream, verbose=verbose)
