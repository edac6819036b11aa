"""Files as a careful program leaves them: whole or not at all, one writer at a time.

A new file is written under a temporary name in the same folder, synced, renamed, and the folder
synced. Its temporaries have names that are recognised, and swept by the next writer.
"""

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import reading, writing
from sepme_cli.checkpoints.disk.interrupts import interruptible, uninterrupted
from sepme_cli.errors import MalformedError, SystemFailure

BLOCK = 4096
"""Of file systems, on machines of today; a page of memory too."""
COPY_BYTES = 8 * 2**20
"""How much is copied by hand at a time, and reported."""


def resolved(path: Path) -> Path:
    """The file behind a symbolic link: links stay, what they point to is replaced."""
    return Path(os.path.realpath(path))


def check_own(path: Path, beside: Path) -> None:
    """SystemFailure if a file that sepme keeps beside another was put there by somebody else.

    Where others may write, a link could have us write to whatever it points to, and a journal
    could have us write whatever it says: links are not followed, and a file counts only if it is
    this user's or that of the owner of `beside`.
    """
    with writing(path), suppress(FileNotFoundError):
        status = path.lstat()
        link = stat.S_ISLNK(status.st_mode)
        if link or status.st_uid not in (os.geteuid(), beside.stat().st_uid):
            raise SystemFailure(
                f"{path} was put there by somebody else: see what it is, and remove it",
                file=path,
                expected="a file of your own, which sepme keeps there",
                found="a link" if link else f"a file of user {status.st_uid}",
            )


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Nobody else writes `path` meanwhile; SystemFailure ("busy") if somebody does.

    The lock goes with the process that holds it, however that ends; it is a file beside `path`
    because `path` itself is replaced while it is held.
    """
    path = resolved(path)
    lock = path.with_name(f".{path.name}.sepme-lock")
    with uninterrupted():
        with writing(path):
            descriptor = _lock(lock, path)
        try:
            with interruptible():
                yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)


def _lock(lock: Path, path: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(lock, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between our open and our lock.
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise _busy(path, "writing") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def keep_writers_out(descriptor: int, path: Path) -> None:
    """Nobody writes an open file in place until it is closed; SystemFailure ("busy") if one does.

    Any number of readers may. Where a file system has no locks there is none.
    """
    _flock(descriptor, fcntl.LOCK_SH, path, "writing")


def keep_readers_out(descriptor: int, path: Path) -> None:
    """Nobody reads an open file until it is closed; SystemFailure ("busy") if somebody does."""
    _flock(descriptor, fcntl.LOCK_EX, path, "reading")


def let_writers_in(descriptor: int) -> None:
    """Take `keep_writers_out` back, for the one who is going to write."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _flock(descriptor: int, how: int, path: Path, doing: str) -> None:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path, doing) from None
    except OSError:
        return


def _busy(path: Path, doing: str) -> SystemFailure:
    return SystemFailure(
        f"{path}: busy, another sepme is {doing} it; try again when it is done", file=path
    )


def check_writable(path: Path, size: int, *, force: bool) -> None:
    """SystemFailure if a file of `size` bytes cannot be written to `path`, as far as can be told.

    force: an existing file may be replaced.
    """
    path = resolved(path)
    with writing(path):
        if path.is_dir():
            raise SystemFailure(f"{path}: this is a folder; name a file", file=path)
        if not force and path.exists():
            raise SystemFailure(
                f"{path}: there is such a file already; --force overwrites it", file=path
            )
        if not os.access(path.parent, os.F_OK):
            raise FileNotFoundError(errno.ENOENT, "the folder does not exist", path.parent)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied", path.parent)
        space = os.statvfs(path.parent)
    free = space.f_bavail * space.f_frsize
    if free < size:
        raise SystemFailure(
            f"{path}: too little space on the disk; nothing was written",
            file=path,
            expected=f"{size} bytes free",
            found=f"{free} bytes",
        )


@contextmanager
def new_file(path: Path, size: int, *, force: bool = False) -> Iterator[int]:
    """A descriptor to write `path` through; the file appears whole when the block is over.

    size: bytes that will be written, looked for on the disk first. The caller is the
    `only_writer`. If the block raises, or the system does (SystemFailure), nothing is left.
    """
    path = resolved(path)
    check_writable(path, size, force=force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.sepme-tmp")
    with uninterrupted(), writing(path):
        sweep(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        try:
            with interruptible():
                _copy_owner(path, descriptor)
                yield descriptor
                os.fsync(descriptor)
            check_writable(path, 0, force=force)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make what was made, renamed or removed beside `path` last."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files and know nothing of it for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file for good."""
    with uninterrupted(), writing(path):
        path.unlink(missing_ok=True)
        sync_folder(path)


def write_file(path: Path, data: bytes, *, force: bool = False) -> None:
    """A small file, whole or not at all; see `new_file`. The caller is the `only_writer`."""
    with new_file(path, len(data), force=force) as descriptor:
        write_all(descriptor, data, 0)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`; a single write may take less."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def copy_range(
    source: int, source_offset: int, target: int, target_offset: int, count: int, path: Path
) -> int:
    """Copy up to `count` bytes within the kernel where it can; returns how many.

    path: of the source. Zero only where the source has ended. File systems that share blocks copy
    nothing of whole ones, if they begin in the same place of a block in both files.
    """
    before = -source_offset % BLOCK
    if before and (source_offset - target_offset) % BLOCK == 0:
        count = min(count, before)
    with suppress(OSError):
        copied = os.copy_file_range(source, target, count, source_offset, target_offset)
        if copied:
            return copied
    with reading(path):
        data = os.pread(source, min(count, COPY_BYTES), source_offset)
    write_all(target, data, target_offset)
    return len(data)


def copy_all(
    source: int, source_offset: int, target: int, target_offset: int, count: int, path: Path
) -> None:
    """Copy `count` bytes; MalformedError about `path` if the source ends before."""
    done = 0
    while done < count:
        copied = copy_range(
            source, source_offset + done, target, target_offset + done, count - done, path
        )
        if not copied:
            raise MalformedError(
                f"{path}: the file has become shorter; something else is writing to it", file=path
            )
        done += copied


def _copy_owner(path: Path, descriptor: int) -> None:
    """A replaced file keeps its mode, and its owner where that is allowed."""
    with suppress(FileNotFoundError):
        status = path.stat()
        with suppress(PermissionError):
            os.fchown(descriptor, status.st_uid, status.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def sweep(path: Path) -> None:
    """Remove temporaries, of `path` and its journals, that a writer who was killed has left.

    The caller is its only writer.
    """
    stale = re.compile(re.escape(f".{path.name}") + r"(\.sepme-(undo|pending))?\.\d+\.sepme-tmp")
    for name in os.listdir(path.parent):
        if stale.fullmatch(name):
            with suppress(FileNotFoundError):
                (path.parent / name).unlink()


def read_exactly(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes at `offset` of an open file, fewer only where the file ends."""
    parts = []
    while count > 0 and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
