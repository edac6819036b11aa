"""The errors a user can meet. Each knows its exit status; `sepme_cli.app` catches them once."""

from typing import ClassVar

from sepme_cli.exit_status import ExitStatus


class SepmeError(Exception):
    """Base of all errors that a user can act on.

    Attributes:
        message: What is wrong, and what to do about it.
        file: The file or place that it is about, as text; None if it is about none.
        expected: One side of a failed comparison, in words, or None.
        found: The other side.
        kind: Name of the kind of error, as in `--json`.
        status: Exit status of the command line (`sepme --help` lists them).
    """

    kind: ClassVar[str]
    status: ClassVar[ExitStatus]

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)


class UsageError(SepmeError):
    """Arguments contradict each other, or ask for something impossible. Exit status 2."""

    kind, status = "usage", ExitStatus.USAGE


class RefusedError(SepmeError):
    """The answer is no: already applied, not applied, nothing left to erase. Exit status 1."""

    kind, status = "refused", ExitStatus.NO


class MalformedError(SepmeError):
    """A file is truncated, hostile, not finite, or not a file of its kind. Exit status 3."""

    kind, status = "malformed", ExitStatus.MALFORMED


class UnsupportedError(SepmeError):
    """A file is well formed, and of a kind that sepme does not support. Exit status 3."""

    kind, status = "unsupported", ExitStatus.MALFORMED


class MismatchError(SepmeError):
    """A patch, a checkpoint or a base do not belong together. Exit status 4."""

    kind, status = "mismatch", ExitStatus.MISMATCH


class SystemFailure(SepmeError):
    """The system failed: not found, no permission, no space, output exists. Exit status 5."""

    kind, status = "system", ExitStatus.SYSTEM
