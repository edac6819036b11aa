"""How work tells what it is doing. The core never prints: it reports to one of these."""

from collections.abc import Iterable


class Progress:
    """Does nothing. Subclass it to show something."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; total is its number of steps where that is known."""

    def advance(self, steps: int = 1) -> None:
        """The stage has come on by that many steps."""

    def say(self, message: str) -> None:
        """Something worth knowing that is no warning."""

    def warn(self, message: str) -> None:
        """Something the user should look at."""

    def warn_all(self, messages: Iterable[str]) -> None:
        """Several such things."""
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
