"""Files as a careful program leaves them: whole or not at all, one writer at a time.

A new file is written under a temporary name in the same folder, synced, renamed, and the folder
synced. Its temporaries have names that are recognised, and swept by the next writer.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile

from sepme_cli.checkpoints.disk import system
from sepme_cli.checkpoints.disk.failures import reading, writing
from sepme_cli.checkpoints.disk.interrupts import interruptible, uninterrupted
from sepme_cli.errors import MalformedError, RefusedError, SystemFailure
from sepme_cli.progress import SILENT, Progress

BLOCK = 4096
"""Of file systems, on machines of today; a page of memory too."""
COPY_BYTES = 8 * 2**20
"""How much is copied by hand at a time, and reported."""
UNDO = ".sepme-undo"
PENDING = ".sepme-pending"
"""What the names of a checkpoint's journals end in."""
_TEMPORARY = ".sepme-tmp"
_HUBS_CACHE = re.compile(r"(?:models|datasets|spaces)--.+/(?:blobs|snapshots)")
"""Where a cache of the hub's client keeps files, in the folder of a repository."""
AROUND_TEMPORARY = len("..4294967295.old") + len(_TEMPORARY)
"""Bytes that the longest name of a temporary has more than the name of its file."""


def resolved(path: Path) -> Path:
    """The file behind a symbolic link: links stay, what they point to is replaced."""
    return Path(os.path.realpath(path))


def check_not_shared(path: Path) -> None:
    """RefusedError for what lies in a cache of the hub's client, by whatever name it goes.

    Files there are named by what is in them, and other models and programs share them.
    """
    real = resolved(path)
    if any(_HUBS_CACHE.fullmatch(f"{one.parent.name}/{one.name}") for one in real.parents):
        raise RefusedError(
            f"{path} lies in the hub's cache, which other models and programs share: write to a "
            "file of your own with -o",
            file=path,
            expected="a file of your own",
            found=real,
        )


def companion(path: Path, ending: str) -> Path:
    """The file beside another that is named after it, and ends so."""
    return path.with_name(shortened(path, len(ending)) + ending)


def temporary(path: Path, ending: str = _TEMPORARY) -> Path:
    """Where this process makes what will be `path`."""
    return path.with_name(f".{shortened(path, AROUND_TEMPORARY)}.{os.getpid()}{ending}")


def shortened(path: Path, more: int) -> str:
    """The name of a file, to which `more` bytes are to be added.

    Where the file system allows no name so long, its end gives way to a digest of all of it.
    """
    name, longest = os.fsencode(path.name), system.longest_name(path.parent) - more
    if len(name) <= longest:
        return path.name
    digest = f"~{sha256(name).hexdigest()[:16]}"
    return name[: longest - len(digest)].decode(errors="ignore") + digest


def check_own(path: Path, beside: Path) -> None:
    """SystemFailure if a file that sepme keeps beside another was put there by somebody else.

    Where others may write, a link could have us write to whatever it points to, and a journal
    could have us write whatever it says: links are not followed, and a file counts only if it is
    this user's or that of the owner of `beside`.
    """
    with writing(path), suppress(FileNotFoundError):
        status = path.lstat()
        link = stat.S_ISLNK(status.st_mode)
        if link or status.st_uid not in (system.user(), beside.stat().st_uid):
            raise SystemFailure(
                f"{path} is not a file of your own: check what it is, and remove it",
                file=path,
                expected="a file of your own, which sepme keeps there",
                found="a link" if link else f"a file of user {status.st_uid}",
            )


@contextmanager
def only_writer(path: Path, progress: Progress = SILENT) -> Iterator[None]:
    """Nobody else writes `path` meanwhile; SystemFailure ("busy") if somebody does.

    The lock goes with the process that holds it, however that ends; it is a file beside `path`
    because `path` itself is replaced while it is held. Where there are no locks, that is said.
    """
    path = resolved(path)
    lock = path.with_name(f".{shortened(path, len('..sepme-lock'))}.sepme-lock")
    with uninterrupted():
        with writing(path):
            descriptor = _lock(lock, path)
        try:
            with interruptible():
                if descriptor is None:
                    progress.warn(
                        f"{path.parent}: there are no locks on this file system, so see to it "
                        "that nothing else writes the same file"
                    )
                yield
        finally:
            if descriptor is not None:
                system.close_and_remove(descriptor, lock)


def _lock(lock: Path, path: Path) -> int | None:
    """An open file that is locked; None where there are no locks."""
    while True:
        descriptor = system.open_file(lock, os.O_RDWR | os.O_CREAT | system.NOT_THROUGH_LINKS)
        try:
            if not system.lock(descriptor):
                if _has_locks(path.parent):
                    raise BlockingIOError
                system.close_and_remove(descriptor, lock)
                return None
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


def _has_locks(folder: Path) -> bool:
    """Whether a file that nobody else has can be locked: Windows, and SMB, refuse what another
    holds as others refuse all locks."""
    with TemporaryFile(dir=folder) as file:
        return system.lock(file.fileno())


def keep_writers_out(descriptor: int, path: Path) -> None:
    """Nobody writes an open file in place until it is closed; SystemFailure ("busy") if one does.

    Any number of readers may. Where a file system has no locks there is none.
    """
    _keep_out(descriptor, path, "writing", shared=True)


def keep_readers_out(descriptor: int, path: Path) -> None:
    """Nobody reads an open file until it is closed; SystemFailure ("busy") if somebody does."""
    _keep_out(descriptor, path, "reading", shared=False)


def let_writers_in(descriptor: int) -> None:
    """Take `keep_writers_out` back, for the one who is going to write."""
    system.unlock(descriptor)


def _keep_out(descriptor: int, path: Path, doing: str, *, shared: bool) -> None:
    try:
        system.lock(descriptor, shared=shared)
    except BlockingIOError:
        raise _busy(path, doing) from None


def _busy(path: Path, doing: str) -> SystemFailure:
    return SystemFailure(
        f"{path}: busy, another sepme is {doing} it; try again when it is done", file=path
    )


def check_writable(path: Path, size: int, *, force: bool) -> None:
    """SystemFailure if a file of `size` bytes cannot be written to `path`, as far as can be told.

    force: an existing file may be replaced. Raises as `check_not_shared`, too.
    """
    check_not_shared(path)
    path = resolved(path)
    with writing(path):
        if path.is_dir():
            raise SystemFailure(f"{path}: this is a folder; name a file", file=path)
        if not force and path.exists():
            raise SystemFailure(f"{path} exists already; --force overwrites it", file=path)
        if not os.access(path.parent, os.F_OK):
            raise SystemFailure(
                f"{path}: there is no folder {path.parent}; make it first", file=path
            )
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied", path.parent)
    free = system.free_bytes(path.parent)
    if free is not None and free < size:
        raise SystemFailure(
            f"{path}: too little space on the disk; nothing was written",
            file=path,
            expected=f"{size} bytes free",
            found=f"{free} bytes",
        )


@contextmanager
def new_file(
    path: Path, size: int, *, force: bool = False, progress: Progress = SILENT
) -> Iterator[int]:
    """A descriptor to write `path` through; the file appears whole when the block is over.

    size: bytes that will be written, looked for on the disk first. The caller is the
    `only_writer`. If the block raises, or the system does (SystemFailure), nothing is left.
    """
    path = resolved(path)
    check_writable(path, size, force=force)
    made = temporary(path)
    with uninterrupted(), writing(path):
        sweep(path)
        descriptor = system.open_file(made, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            try:
                with interruptible():
                    _copy_owner(path, descriptor, progress)
                    yield descriptor
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            check_writable(path, 0, force=force)
            os.replace(made, path)
        except BaseException:
            with suppress(OSError):
                made.unlink()
            raise
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make what was made, renamed or removed beside `path` last."""
    system.sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file for good."""
    with uninterrupted(), writing(path):
        path.unlink(missing_ok=True)
        sync_folder(path)


def write_file(
    path: Path, data: bytes, *, force: bool = False, progress: Progress = SILENT
) -> None:
    """A small file, whole or not at all; see `new_file`. The caller is the `only_writer`."""
    with new_file(path, len(data), force=force, progress=progress) as descriptor:
        write_all(descriptor, data, 0)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`; a single write may take less."""
    view = memoryview(data).cast("B")
    while view:
        written = system.write_at(descriptor, view, offset)
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
    if copied := system.copy_within(source, source_offset, target, target_offset, count):
        return copied
    with reading(path):
        data = system.read_at(source, min(count, COPY_BYTES), source_offset)
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


def _copy_owner(path: Path, descriptor: int, progress: Progress) -> None:
    """A replaced file keeps its mode, and its owner where that is allowed."""
    with suppress(FileNotFoundError):
        if not system.copy_owner(descriptor, path.stat()):
            warn_of_mode(path, progress)


def warn_of_mode(path: Path, progress: Progress) -> None:
    """Say that a file there does not have the mode that it should have."""
    progress.warn(
        f"{path.parent}: this file system does not let sepme set who may read a file, so check "
        "the permissions of the files that it writes there"
    )


def sweep(path: Path) -> None:
    """Remove temporaries, of `path` and its journals, that a writer who was killed has left.

    The caller is its only writer.
    """
    ours = (path, companion(path, UNDO), companion(path, PENDING))
    names = (re.escape(shortened(file, AROUND_TEMPORARY)) for file in ours)
    stale = re.compile(rf"\.({'|'.join(names)})\.\d+{re.escape(_TEMPORARY)}")
    for name in os.listdir(path.parent):
        if stale.fullmatch(name):
            with suppress(FileNotFoundError):
                (path.parent / name).unlink()


def read_exactly(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes at `offset` of an open file, fewer only where the file ends."""
    parts = []
    while count > 0 and (part := system.read_at(descriptor, count, offset)):
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
