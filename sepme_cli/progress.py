"""How work tells what it is doing. The core never prints: it reports to one of these."""


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


SILENT = Progress()
