"""The journal of a write in place: what it takes to finish it, or to undo it.

``NAME.sepme-pending`` is beside a checkpoint only while that is written: of each of its files that
is, the header and the tensors concerned as they are, and as they will be. Whoever finds one later
puts the files back. It is a safetensors file of ours alone; SPEC.md knows nothing of it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
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
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import (
    BLOCK,
    PENDING,
    companion,
    copy_all,
    new_file,
    read_exactly,
    resolved,
    write_all,
)
from sepme_cli.checkpoints.disk.resizing import collapse, find_hole, insert
from sepme_cli.checkpoints.structure.headers import same_but_record
from sepme_cli.errors import MalformedError
from sepme_cli.progress import Progress

Side = Literal["old", "new"]

_HEADER = "header"
_FILES = "sepme_pending"


@dataclass(frozen=True)
class Change:
    """One file of a checkpoint that is written in place.

    header: its present one. new_header: the first bytes it will have, up to the data section: as
    long as the present ones, or whole pages longer or shorter. touched: tensors that are written;
    they keep their places. values: makes their new bytes, in order.
    """

    path: Path
    header: Header
    new_header: bytes
    touched: Sequence[TensorEntry]
    values: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class PendingFile:
    """What a journal holds of one file.

    starts: where the data section begins, before and after. size: of the data section.
    """

    path: Path
    number: int
    touched: tuple[TensorEntry, ...] = field(repr=False)
    starts: Mapping[Side, int]
    size: int
    journal: "Pending" = field(repr=False)

    def put(self, side: Side, target: BinaryIO) -> None:
        """Write one side into the file: its tensors, then the header that tells of them."""
        descriptor = target.fileno()
        self._shrink(descriptor)
        small = min(self.starts.values())
        for entry in self.touched:
            self.journal.copy(self._name(side, entry.name), descriptor, small + entry.begin)
        os.fsync(descriptor)
        if self.starts[side] > small:
            insert(descriptor, self._room)
        write_all(descriptor, self.journal.read(self._name(side, _HEADER)), 0)
        os.fsync(descriptor)

    def belongs_to(self, target: BinaryIO) -> bool:
        """Whether the file is the one that was being written: each byte is the old or the new.

        Where the header's length changes, its bytes are not looked at: they may be neither.
        """
        descriptor, small = target.fileno(), min(self.starts.values())
        size = os.fstat(descriptor).st_size
        if size not in (small + self.size, small + self._room + self.size):
            return False
        gap = self._gap(descriptor) if self._room and size > small + self.size else None
        places = [(entry.name, small + entry.begin, entry.nbytes) for entry in self.touched]
        if not self._room:
            places.append((_HEADER, 0, small))
        return all(
            self._is_either(name, _read_around(descriptor, begin, count, gap, self._room))
            for name, begin, count in places
        )

    @property
    def _room(self) -> int:
        """By how much the header grows or shrinks."""
        return abs(self.starts["new"] - self.starts["old"])

    def _shrink(self, descriptor: int) -> None:
        """Leave the file with the shorter header's room, wherever the resizing was cut short."""
        small = min(self.starts.values())
        if self._room and os.fstat(descriptor).st_size > small + self.size:
            collapse(descriptor, self._gap(descriptor), self._room)

    def _gap(self, descriptor: int) -> int:
        """Where the pages are, in a file that has them, that one without has not.

        Where the shifting stopped there is a hole as long as they are. Otherwise they are at the
        beginning, with the header in them or some of it.
        """
        hole = find_hole(descriptor)
        return hole[0] if hole is not None and hole[1] == self._room else 0

    def _name(self, side: Side, name: str) -> str:
        return _member(self.number, side, name)

    def _is_either(self, name: str, found: bytes) -> bool:
        old, new, now = (
            np.frombuffer(data, np.uint8)
            for data in (
                self.journal.read(self._name("old", name)),
                self.journal.read(self._name("new", name)),
                found,
            )
        )
        return len(now) == len(old) == len(new) and bool(((now == old) | (now == new)).all())


@dataclass(frozen=True)
class Pending:
    """An open pending journal. own: its header. folder: that its files are named from."""

    path: Path
    folder: Path
    own: Header = field(repr=False)
    file: BinaryIO = field(repr=False, compare=False)

    def read(self, name: str) -> bytes:
        """The bytes of one of its tensors."""
        entry = self.own.by_name[name]
        return read_exactly(self.file.fileno(), entry.nbytes, self.own.data_start + entry.begin)

    def copy(self, name: str, target: int, offset: int) -> None:
        """Copy one of its tensors to an open file."""
        entry = self.own.by_name[name]
        begin = self.own.data_start + entry.begin
        copy_all(self.file.fileno(), begin, target, offset, entry.nbytes, self.path)

    def files(self) -> list[PendingFile]:
        """What it holds, file by file; MalformedError if it is no journal of ours."""
        names = json.loads(self.own.metadata.get(_FILES, "null"))
        if not isinstance(names, list) or not all(map(self._is_ours, names)):
            raise self.malformed()
        return [self._file(number, self.folder / name) for number, name in enumerate(names)]

    def _is_ours(self, name: object) -> bool:
        """Whether a name leads to the checkpoint, or to a file in its folder, and by no link.

        A journal may come with a download, and whoever made it chose what it says.
        """
        if not isinstance(name, str):
            return False
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            return False
        if companion(self.folder / path.parts[0], PENDING) != self.path:
            return False
        return resolved(self.folder / path) == self.folder / path

    def _header(self, number: int, side: Side) -> Header:
        text = self.read(_member(number, side, _HEADER))
        return parse_header(text[:PREFIX_BYTES], text[PREFIX_BYTES:], None)

    @cached_property
    def _members(self) -> Mapping[tuple[str, str], Set[str]]:
        """The names of its tensors without number and side, by these."""
        found: dict[tuple[str, str], set[str]] = {}
        for name in self.own.by_name:
            number, _, rest = name.partition(".")
            side, _, own = rest.partition(".")
            found.setdefault((number, side), set()).add(own)
        return found

    def malformed(self) -> MalformedError:
        return MalformedError(f"{self.path} is not a journal of an in-place write", file=self.path)

    def _file(self, number: int, path: Path) -> PendingFile:
        starts: dict[Side, int] = {}
        sides: list[Side] = ["old", "new"]
        names = []
        for side in sides:
            names.append(self._members.get((str(number), side), frozenset()))
            if _HEADER not in names[-1]:
                raise self.malformed()
            starts[side] = self.own.by_name[_member(number, side, _HEADER)].nbytes
        if (starts["old"] - starts["new"]) % BLOCK:
            raise self.malformed()
        header, coming = (self._header(number, side) for side in sides)
        # Only the record ever changes: a journal that says more is damaged, or not ours.
        if names[0] != names[1] or not same_but_record(header, coming):
            raise self.malformed()
        if not names[0] - {_HEADER} <= header.by_name.keys():
            raise self.malformed()
        touched = tuple(header.by_name[name] for name in sorted(names[0] - {_HEADER}))
        return PendingFile(path, number, touched, starts, header.data_length, self)


def pending_path(path: Path) -> Path:
    """The pending journal of a checkpoint, a file or a folder."""
    return companion(resolved(path), PENDING)


def write_pending(
    journal: Path, changes: Sequence[Change], files: Sequence[BinaryIO], progress: Progress
) -> None:
    """Write the journal of some changes, whole and synced. files: those that change, open."""
    folder = journal.parent
    names = [_relative(resolved(change.path), folder) for change in changes]
    entries, size = _entries(changes)
    first = encode_header({_FILES: json.dumps(names)}, entries)
    with new_file(journal, len(first) + size, force=True) as descriptor:
        write_all(descriptor, first, 0)
        offset = len(first)
        for change, file in zip(changes, files, strict=True):
            offset = _write_old(change, file.fileno(), descriptor, offset, journal)
            write_all(descriptor, change.new_header, offset)
            offset += len(change.new_header)
            for data in change.values():
                write_all(descriptor, data, offset)
                offset += len(data)
                progress.advance()


def _write_old(change: Change, source: int, target: int, offset: int, journal: Path) -> int:
    """The present header and tensors, into the journal; returns where the next bytes go."""
    start = change.header.data_start
    ranges = [(0, start)]
    ranges += [(start + entry.begin, entry.nbytes) for entry in change.touched]
    for begin, count in ranges:
        copy_all(source, begin, target, offset, count, journal)
        offset += count
    return offset


def _entries(changes: Sequence[Change]) -> tuple[list[TensorEntry], int]:
    """Where everything is in the journal, in the order it is written, and how long it all is."""
    entries, position = [], 0
    for number, change in enumerate(changes):
        touched = [(entry.name, entry.nbytes) for entry in change.touched]
        sides: list[tuple[Side, int]] = [
            ("old", change.header.data_start),
            ("new", len(change.new_header)),
        ]
        for side, header in sides:
            for name, count in [(_HEADER, header), *touched]:
                member = _member(number, side, name)
                entries.append(TensorEntry(member, "U8", (count,), position, position + count))
                position += count
    return entries, position


def _member(number: int, side: Side, name: str) -> str:
    return f"{number}.{side}.{name}"


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _read_around(descriptor: int, begin: int, count: int, gap: int | None, room: int) -> bytes:
    """Bytes of a file as they would be without the `room` bytes at `gap`."""
    if gap is None or begin + count <= gap:
        return read_exactly(descriptor, count, begin)
    before = max(0, gap - begin)
    head = read_exactly(descriptor, before, begin)
    return head + read_exactly(descriptor, count - before, begin + before + room)


@contextmanager
def open_pending(path: Path) -> Iterator[Pending]:
    """Open a pending journal. Raises MalformedError or SystemFailure."""
    with reading(path):
        file = path.open("rb", buffering=0)
    with file:
        with reading(path):
            pending = Pending(path, path.parent, read_header(file, path.stat().st_size), file)
            try:
                pending.files()
            except (ValueError, RecursionError) as error:
                raise pending.malformed() from error
        yield pending
