"""Where bytes come in: what the format and the system complain of becomes a SepmeError here."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from patch_spec.errors import FormatError
from sepme_cli.checkpoints.disk.system import replaces_open_files
from sepme_cli.errors import MalformedError, SystemFailure
from sepme_cli.places import Place


@contextmanager
def reading(file: str | Place) -> Iterator[None]:
    """Whatever goes wrong inside is about `file`: MalformedError or SystemFailure."""
    try:
        yield
    except FormatError as error:
        raise MalformedError(
            f"{file}: {error}", file=file, expected=error.expected, found=error.found
        ) from error
    except OSError as error:
        raise system_failure(error, file) from error


@contextmanager
def writing(file: str | Place) -> Iterator[None]:
    """Whatever the system refuses inside is about writing `file`: SystemFailure."""
    try:
        yield
    except OSError as error:
        raise system_failure(error, file) from error


def system_failure(error: OSError, file: str | Place) -> SystemFailure:
    """An OSError in words that say what to do."""
    advice = {
        errno.ENOSPC: "the disk is full; nothing was left behind. Free some space",
        errno.EDQUOT: "the disk quota is used up; nothing was left behind",
        errno.EFBIG: "the system does not allow a file of this size; nothing was left behind",
        errno.EIO: "the disk reports an error; check it, and keep a copy of what is on it",
        errno.EACCES: "permission denied"
        if replaces_open_files()
        else "permission denied, or a program has it open",
        errno.EPERM: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.ENOENT: "not found",
        errno.EISDIR: "this is a folder",
        errno.EPIPE: "the program that reads the output has ended",
    }
    reason = advice.get(error.errno or 0, error.strerror or str(error))
    return SystemFailure(f"{file}: {reason}", file=file)
