"""Writing in place so that being cut short does no harm.

``NAME.sepme-pending`` is beside a checkpoint only while that is written: its header and the
tensors concerned as they are, and as they will be. Whoever finds one later puts the file back.
It is a safetensors file of ours alone; SPEC.md knows nothing of it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from patch_spec.header import (
    PREFIX_BYTES,
    Header,
    TensorEntry,
    encode_header,
    parse_header,
    read_header,
)
from sepme_cli.checkpoints.boundary import reading, writing
from sepme_cli.checkpoints.files import (
    copy_all,
    new_file,
    only_writer,
    read_exactly,
    remove,
    resolved,
    write_all,
)
from sepme_cli.errors import MalformedError, RefusedError
from sepme_cli.progress import Progress

Side = Literal["old", "new"]

_HEADER = "header"


@dataclass(frozen=True)
class Pending:
    """An open pending journal.

    header: the checkpoint's old one. touched: its tensors that are written. own: the journal's.
    """

    path: Path
    header: Header
    touched: tuple[TensorEntry, ...] = field(repr=False)
    own: Header = field(repr=False)
    file: BinaryIO = field(repr=False, compare=False)

    def read(self, side: Side, name: str) -> bytes:
        """A tensor's bytes, or the header's, before or after."""
        entry = self.own.by_name[f"{side}.{name}"]
        return read_exactly(self.file.fileno(), entry.nbytes, self.own.data_start + entry.begin)

    def put(self, side: Side, target: BinaryIO) -> None:
        """Write one side into the checkpoint: the tensors, then the header that tells of them."""
        for entry in self.touched:
            kept = self.own.by_name[f"{side}.{entry.name}"]
            copy_all(
                self.file.fileno(),
                self.own.data_start + kept.begin,
                target.fileno(),
                self.header.data_start + entry.begin,
                entry.nbytes,
                self.path,
            )
        os.fsync(target.fileno())
        write_all(target.fileno(), self.read(side, _HEADER), 0)
        os.fsync(target.fileno())

    def belongs_to(self, target: BinaryIO) -> bool:
        """Whether the file is the one that was being written: each byte is the old or the new."""
        size = target.seek(0, os.SEEK_END)
        if size != self.header.data_start + self.header.data_length:
            return False
        places = [(_HEADER, 0, self.header.data_start)]
        places += [
            (entry.name, self.header.data_start + entry.begin, entry.nbytes)
            for entry in self.touched
        ]
        return all(
            self._is_either(name, read_exactly(target.fileno(), count, offset))
            for name, offset, count in places
        )

    def _is_either(self, name: str, found: bytes) -> bool:
        old, new, now = (
            np.frombuffer(data, np.uint8)
            for data in (self.read("old", name), self.read("new", name), found)
        )
        return bool(((now == old) | (now == new)).all())


def pending_path(path: Path) -> Path:
    """The pending journal of a checkpoint."""
    path = resolved(path)
    return path.with_name(f"{path.name}.sepme-pending")


def write_over_in_place(
    path: Path,
    header: Header,
    new_header: bytes,
    touched: Sequence[TensorEntry],
    values: Callable[[TensorEntry], bytes],
    progress: Progress,
) -> None:
    """Overwrite tensors and the header of a checkpoint; both keep their places and sizes.

    header: the present one. values: a tensor's new bytes; asked for one at a time, and all before
    anything is touched. If anything fails the file is put back; if the process dies, the next
    command does that. The caller is the file's only writer.
    """
    journal = pending_path(path)
    with writing(path), path.open("r+b", buffering=0) as file:
        progress.stage(f"writing {path.name} in place", len(touched))
        _write_journal(journal, file.fileno(), header, new_header, touched, values, progress)
        try:
            with _open(journal) as pending:
                pending.put("new", file)
        except BaseException:
            with _open(journal) as pending:
                pending.put("old", file)
            remove(journal)
            raise
    remove(journal)


def undo_if_interrupted(path: Path, progress: Progress) -> None:
    """Put a checkpoint back whose in-place write was cut short, and say so; else do nothing.

    Raises SystemFailure ("busy") while that write is going on.
    """
    if pending_path(path).exists():
        with only_writer(path):
            undo_interrupted(path, progress)


def undo_interrupted(path: Path, progress: Progress) -> None:
    """As `undo_if_interrupted`, for the file's only writer.

    Raises RefusedError if another file lies there now, MalformedError for a journal that is none.
    """
    journal = pending_path(path)
    if not journal.exists() or not path.exists():
        return
    with _open(journal) as pending, writing(path), path.open("r+b", buffering=0) as file:
        if not pending.belongs_to(file):
            raise RefusedError(
                f"{journal} tells of an in-place write that was cut short, but {path} is another "
                "file now; remove the journal if that is as it should be",
                file=path,
            )
        pending.put("old", file)
    remove(journal)
    progress.warn(f"{path}: writing it in place had been interrupted; it is as it was before")


def _write_journal(
    path: Path,
    source: int,
    header: Header,
    new_header: bytes,
    touched: Sequence[TensorEntry],
    values: Callable[[TensorEntry], bytes],
    progress: Progress,
) -> None:
    old_header = read_exactly(source, header.data_start, 0)
    sizes = [(_HEADER, len(old_header)), *((entry.name, entry.nbytes) for entry in touched)]
    entries, position = [], 0
    for side in ("old", "new"):
        for name, size in sizes:
            entries.append(TensorEntry(f"{side}.{name}", "U8", (size,), position, position + size))
            position += size
    first = encode_header({}, entries)
    with new_file(path, len(first) + position, force=True) as descriptor:
        write_all(descriptor, first + old_header, 0)
        offset = len(first) + len(old_header)
        for entry in touched:
            begin = header.data_start + entry.begin
            copy_all(source, begin, descriptor, offset, entry.nbytes, path)
            offset += entry.nbytes
        write_all(descriptor, new_header, offset)
        offset += len(new_header)
        for entry in touched:
            write_all(descriptor, values(entry), offset)
            offset += entry.nbytes
            progress.advance()


@contextmanager
def _open(path: Path) -> Iterator[Pending]:
    with reading(path):
        file = path.open("rb", buffering=0)
    with file:
        with reading(path):
            pending = _parsed(path, file)
        yield pending


def _parsed(path: Path, file: BinaryIO) -> Pending:
    own = read_header(file, path.stat().st_size)
    old = {name.removeprefix("old.") for name in own.by_name if name.startswith("old.")}
    new = {name.removeprefix("new.") for name in own.by_name if name.startswith("new.")}
    if _HEADER not in old or old != new:
        raise MalformedError(f"{path} is no journal of an in-place write", file=path)
    entry = own.by_name[f"old.{_HEADER}"]
    text = read_exactly(file.fileno(), entry.nbytes, own.data_start + entry.begin)
    header = parse_header(text[:PREFIX_BYTES], text[PREFIX_BYTES:], None)
    touched = tuple(header.by_name[name] for name in sorted(old - {_HEADER}))
    return Pending(path, header, touched, own, file)
