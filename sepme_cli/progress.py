"""How work tells what it is doing. The core never prints: it reports to one of these."""

from collections.abc import Iterable


class Progress:
    """Receives reports about progress. This class ignores them; subclass it to show them."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage of the work begins.

        Args:
            name: What it does, such as "reading the checkpoint".
            total: Number of steps that `advance` will count, or None if unknown.
        """

    def advance(self, steps: int = 1) -> None:
        """The stage has advanced.

        Args:
            steps: Number of steps since the last call.
        """

    def say(self, message: str) -> None:
        """Information that is not a warning.

        Args:
            message: One line of text.
        """

    def warn(self, message: str) -> None:
        """Something that the user should look at. Results carry all warnings, too.

        Args:
            message: One line of text.
        """

    def warn_all(self, messages: Iterable[str]) -> None:
        """Several warnings.

        Args:
            messages: One line of text each.
        """
        for message in messages:
            self.warn(message)


SILENT = Progress()


class Collector(Progress):
    """Passes everything on to another one, and keeps the warnings for the result: each once."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._warnings: dict[str, None] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that there were, in order."""
        return tuple(self._warnings)

    def stage(self, name: str, total: int | None = None) -> None:
        self._shown.stage(name, total)

    def advance(self, steps: int = 1) -> None:
        self._shown.advance(steps)

    def say(self, message: str) -> None:
        self._shown.say(message)

    def warn(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings[message] = None
            self._shown.warn(message)
