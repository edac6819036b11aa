"""The undo journal: what a checkpoint was before the first patch was written into it in place.

``NAME.sepme-undo`` stays beside the checkpoint, in the format that SPEC.md describes: the header
and the weights of the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from patch_spec.header import Header, TensorEntry, encode_header, read_header
from patch_spec.undo import HEADER_TENSOR, METADATA_KEY, UndoRecord, original_header, undo_record
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import (
    UNDO,
    companion,
    copy_all,
    new_file,
    read_exactly,
    resolved,
    write_all,
)


@dataclass(frozen=True)
class Kept:
    """A tensor that a journal keeps, and where its bytes begin in an open file."""

    entry: TensorEntry
    descriptor: int
    begin: int


@dataclass(frozen=True)
class State:
    """What a journal keeps: a checkpoint's header, and the tensors that patches touch."""

    header_bytes: bytes
    kept: Sequence[Kept]

    def with_more(self, other: "State") -> "State":
        """The same, and those tensors of another state that it lacks."""
        names = {one.entry.name for one in self.kept}
        more = [one for one in other.kept if one.entry.name not in names]
        return State(self.header_bytes, [*self.kept, *more])


@dataclass(frozen=True)
class Journal:
    """An open journal; close it, or use it as a context manager.

    record: what it belongs to. header, header_bytes: the checkpoint's, as they were. touched: its
    tensors that are kept here, as that header has them. own: the journal's header.
    """

    path: Path
    record: UndoRecord
    header: Header
    header_bytes: bytes = field(repr=False)
    touched: tuple[TensorEntry, ...] = field(repr=False)
    own: Header = field(repr=False)
    file: BinaryIO = field(repr=False, compare=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    @property
    def state(self) -> State:
        """What it keeps, to be kept in another journal."""
        start, file = self.own.data_start, self.file.fileno()
        entries = (self.own.by_name[entry.name] for entry in self.touched)
        return State(
            self.header_bytes, [Kept(entry, file, start + entry.begin) for entry in entries]
        )

    def read_bytes(self, name: str) -> bytes:
        """The bytes that a touched tensor had."""
        with reading(self.path):
            return _read(self.file, self.own, name)


def undo_path(path: Path) -> Path:
    """The undo journal of a checkpoint."""
    return companion(resolved(path), UNDO)


def write_undo(path: Path, state: State, record: UndoRecord) -> None:
    """Write an undo journal, whole and synced, over an older one, by the checkpoint's writer."""
    position = len(state.header_bytes)
    entries = [TensorEntry(HEADER_TENSOR, "U8", (position,), 0, position)]
    for kept in state.kept:
        entry = kept.entry
        end = position + entry.nbytes
        entries.append(TensorEntry(entry.name, entry.dtype, entry.shape, position, end))
        position = end
    first = encode_header({METADATA_KEY: record.to_metadata()}, entries) + state.header_bytes
    with new_file(path, len(first) + position, force=True) as descriptor:
        write_all(descriptor, first, 0)
        offset = len(first)
        for kept in state.kept:
            count = kept.entry.nbytes
            copy_all(kept.descriptor, kept.begin, descriptor, offset, count, path)
            offset += count


def open_undo(path: Path) -> Journal:
    """Open an undo journal. Raises MalformedError or SystemFailure."""
    with reading(path):
        file = path.open("rb", buffering=0)
        try:
            own = read_header(file, path.stat().st_size)
            record = undo_record(own)
            header_bytes = _read(file, own, HEADER_TENSOR)
            header = original_header(own, header_bytes)
            names = (entry.name for entry in own.tensors if entry.name != HEADER_TENSOR)
            touched = tuple(header.by_name[name] for name in names)
            return Journal(path, record, header, header_bytes, touched, own, file)
        except BaseException:
            file.close()
            raise


def _read(file: BinaryIO, own: Header, name: str) -> bytes:
    entry = own.by_name[name]
    return read_exactly(file.fileno(), entry.nbytes, own.data_start + entry.begin)
