"""What commands that make a new file have in common: where it goes, and when it was made."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import only_writer, write_file
from sepme_cli.errors import UsageError
from sepme_cli.progress import SILENT, Progress


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
