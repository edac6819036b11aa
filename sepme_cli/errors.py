"""The errors a user can meet. Each knows its exit status; `sepme_cli.app` catches them once."""

from typing import ClassVar

from sepme_cli.exit_status import ExitStatus


class SepmeError(Exception):
    """Something a user can act on.

    message: what is wrong and what to do. file: the file or place that it is about. expected,
    found: the two sides of a failed comparison, in words.
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
    """The command line contradicts itself or asks for what cannot be."""

    kind, status = "usage", ExitStatus.USAGE


class RefusedError(SepmeError):
    """The answer is no: already applied, not in there, nothing left to erase."""

    kind, status = "refused", ExitStatus.NO


class MalformedError(SepmeError):
    """A file is truncated, hostile, holds values that are not finite, or is no such file at all."""

    kind, status = "malformed", ExitStatus.MALFORMED


class UnsupportedError(SepmeError):
    """A file is well formed, and of a kind that sepme does not work on."""

    kind, status = "unsupported", ExitStatus.MALFORMED


class MismatchError(SepmeError):
    """A patch and a checkpoint, or a checkpoint and its base, do not belong together."""

    kind, status = "mismatch", ExitStatus.MISMATCH


class SystemFailure(SepmeError):
    """The system failed us: not found, no permission, no space, an output already there."""

    kind, status = "system", ExitStatus.SYSTEM
