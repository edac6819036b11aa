"""What commands that make a new file have in common: where it goes, and when it was made."""

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import check_writable, only_writer, resolved, write_file
from sepme_cli.errors import UsageError
from sepme_cli.progress import SILENT, Progress

_BESIDE_A_MODEL = frozenset({".sepme", ".png", ".sig"})
"""What sepme makes that may lie in a model's folder, and is no part of the model."""


def check_output(output: object, read: Iterable[object], *, force: bool) -> None:
    """Whether a command's output can be written, as far as can be told before; streams can be.

    read: what the result is made from; only what names a file on this machine is looked at. force:
    an existing file may be replaced.
    Raises UsageError where one of those would be overwritten, by whatever name it goes: what
    is made from it could not be made again, nor taken back. Raises as `check_writable`, too.
    """
    if not isinstance(output, Path):
        return
    for path in read:
        if isinstance(path, str | PathLike):
            check_other(output, Path(path))
    check_writable(output, 0, force=force)


def check_other(output: Path, read: Path, instead: str = "write to another file") -> None:
    """UsageError where the output is a file that is read, or one that a model's folder holds.

    instead: what to do.
    """
    with writing(output):
        if not output.exists() or not read.exists():
            return
        inside = output.suffix.lower() not in _BESIDE_A_MODEL and resolved(output).is_relative_to(
            resolved(read)
        )
        if inside or output.samefile(read):
            what = f"a part of {read}" if resolved(output) != resolved(read) and inside else read
            raise UsageError(
                f"{output}: this is {what}, which the result is computed from and which would be "
                f"lost: {instead}",
                expected="another file",
                found=output,
            )


def write_output(
    target: Path | BinaryIO, data: bytes, *, force: bool, progress: Progress = SILENT
) -> None:
    """Write a whole file, or to a stream. force: an existing file may be replaced."""
    if isinstance(target, Path):
        with only_writer(target, progress):
            write_file(target, data, force=force, progress=progress)
    else:
        with writing(Path("-")):
            target.write(data)
            target.flush()


def output_name(target: Path | BinaryIO) -> str:
    """How results call it: the file's path, or "-" for a stream."""
    return str(target) if isinstance(target, Path) else "-"


def moment_of_making() -> str | None:
    """No clock in a file, unless the maker fixed it (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return None
    try:
        return datetime.fromtimestamp(int(epoch), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            "SOURCE_DATE_EPOCH is not a time", expected="seconds since 1970", found=epoch
        ) from error
