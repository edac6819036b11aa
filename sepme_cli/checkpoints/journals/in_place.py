"""Writing in place so that being cut short does no harm.

The old bytes and the new ones are in a journal beside the checkpoint before any of it is touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import check_own, keep_readers_out, only_writer, remove
from sepme_cli.checkpoints.disk.interrupts import uninterrupted
from sepme_cli.checkpoints.journals.pending import (
    Change,
    Side,
    open_pending,
    pending_path,
    write_pending,
)
from sepme_cli.errors import RefusedError, SepmeError, SystemFailure
from sepme_cli.progress import Progress


def write_over_in_place(checkpoint: Path, changes: Sequence[Change], progress: Progress) -> None:
    """Overwrite tensors and headers of a checkpoint's files.

    The new bytes are asked for, some at a time, before anything is touched. If anything fails the
    files are put back; if the process dies, the next command does that. The caller is the
    checkpoint's only writer. Raises SystemFailure ("busy") while somebody reads the files.
    """
    journal = pending_path(checkpoint)
    check_own(journal, checkpoint)
    progress.stage(
        f"writing {checkpoint.name} in place", sum(len(change.touched) for change in changes)
    )
    with uninterrupted(), writing(checkpoint), ExitStack() as stack:
        files = [stack.enter_context(_opened(change.path)) for change in changes]
        try:
            write_pending(journal, changes, files, progress)
            _put(journal, "new", files)
        except BaseException as error:
            if journal.exists():
                _put_back(checkpoint, journal, files, error)
                remove(journal)
            raise
        remove(journal)


def undo_if_interrupted(path: Path, progress: Progress) -> None:
    """Put a checkpoint back whose in-place write was cut short, and say so; else do nothing.

    Raises SystemFailure ("busy") while that write is going on, or somebody reads the files.
    """
    if pending_path(path).exists():
        with only_writer(path, progress):
            undo_interrupted(path, progress)


def undo_interrupted(path: Path, progress: Progress) -> None:
    """As `undo_if_interrupted`, for the checkpoint's only writer.

    Raises RefusedError if another file lies there now, MalformedError for a journal that is none.
    """
    journal = pending_path(path)
    if not journal.exists() or not path.exists():
        return
    check_own(journal, path)
    with uninterrupted(), open_pending(journal) as pending, writing(path), ExitStack() as stack:
        opened = [(part, stack.enter_context(_opened(part.path))) for part in pending.files()]
        for part, file in opened:
            if not part.belongs_to(file):
                raise RefusedError(
                    f"{journal} belongs to an interrupted in-place write, but {part.path} is "
                    "another file now; remove the journal if you replaced that file on purpose",
                    file=part.path,
                )
        for part, file in opened:
            part.put("old", file)
        remove(journal)
    progress.warn(f"{path}: an in-place write was interrupted; the file is restored")


def _put_back(
    checkpoint: Path, journal: Path, files: Sequence[BinaryIO], because: BaseException
) -> None:
    try:
        _put(journal, "old", files)
    except (OSError, SepmeError) as error:
        reason = because.strerror if isinstance(because, OSError) else str(because)
        raise SystemFailure(
            f"{checkpoint}: {reason or 'interrupted'}; the file is half written and could not be "
            f"restored. Keep {journal.name} where it is: the next command restores the file, "
            "once the system lets sepme write again",
            file=checkpoint,
        ) from error


def _put(journal: Path, side: Side, files: Sequence[BinaryIO]) -> None:
    with open_pending(journal) as pending:
        for part, file in zip(pending.files(), files, strict=True):
            part.put(side, file)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("r+b", buffering=0) as file:
        keep_readers_out(file.fileno(), path)
        yield file
