"""Making room at the beginning of a file, and taking it away, without moving what follows.

Linux can put whole pages before a file's data on ext4 and XFS by changing where its extents lie.
Cut short by a power failure, some extents are moved and some are not: the file then has its new
size, and a hole as large as the pages at the place that was reached. That is how it is put right.
"""

import errno
import os
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import reading, writing
from sepme_cli.checkpoints.disk.files import BLOCK, temporary, write_all
from sepme_cli.checkpoints.disk.interrupts import uninterrupted
from sepme_cli.checkpoints.disk.kernel import fallocate
from sepme_cli.checkpoints.disk.system import first_hole, open_file

_COLLAPSE_RANGE = 0x08
_INSERT_RANGE = 0x20
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM})


def can_resize(path: Path) -> bool:
    """Whether pages can be put before a file's data: it has no holes, and the system can do it.

    Tried on a small file beside it, since no system says what it can do. Raises SystemFailure.
    """
    trial = temporary(path)
    with reading(path), path.open("rb") as file:
        if find_hole(file.fileno()) is not None:
            return False
    with uninterrupted(), writing(path):
        descriptor = open_file(trial, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            write_all(descriptor, bytes(2 * BLOCK), 0)
            insert(descriptor, BLOCK)
            collapse(descriptor, 0, BLOCK)
        except OSError as error:
            # A full disk is no answer: writing the file anew would fail too, and say why.
            if error.errno not in _CANNOT:
                raise
            return False
        finally:
            os.close(descriptor)
            trial.unlink()
    return True


def insert(descriptor: int, count: int) -> None:
    """Put `count` bytes, whole pages, before an open file's data; what they hold is a hole."""
    fallocate(descriptor, _INSERT_RANGE, 0, count)


def collapse(descriptor: int, offset: int, count: int) -> None:
    """Take `count` bytes at `offset`, whole pages both, out of an open file."""
    fallocate(descriptor, _COLLAPSE_RANGE, offset, count)


def find_hole(descriptor: int) -> tuple[int, int] | None:
    """Where an open file's first hole begins and how long it is; None if it has none."""
    size = os.fstat(descriptor).st_size
    begin = first_hole(descriptor, size) if size else 0
    if begin >= size:
        return None
    try:
        return begin, os.lseek(descriptor, begin, os.SEEK_DATA) - begin
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return begin, size - begin
