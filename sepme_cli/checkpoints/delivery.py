"""Where a written checkpoint goes: to a file, to a stream, or over the checkpoint it came from."""

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from patch_spec.stack import StackRecord
from patch_spec.undo import UndoRecord
from sepme_cli.checkpoints.boundary import writing
from sepme_cli.checkpoints.files import check_writable, only_writer, remove, resolved
from sepme_cli.checkpoints.journal import (
    State,
    open_undo,
    undo_path,
    write_undo,
)
from sepme_cli.checkpoints.patches import PatchFile, keep_patches, kept_patches
from sepme_cli.checkpoints.pending import undo_interrupted
from sepme_cli.checkpoints.reader import Checkpoint
from sepme_cli.checkpoints.writer import Rewrite, write_copy, write_in_place, write_stream
from sepme_cli.errors import MalformedError, SepmeError, UsageError
from sepme_cli.progress import Progress


@dataclass(frozen=True)
class Destination:
    """Where to write.

    output: a file or a stream; None with in_place, or where nothing is to be written.
    force: an existing file may be replaced.
    """

    output: Path | BinaryIO | None
    in_place: bool
    force: bool

    def check(self, *, needed: bool) -> None:
        """UsageError unless exactly one way to write is named, or none where none is needed."""
        ways = (self.output is not None) + self.in_place
        if ways > 1 or (needed and not ways):
            raise UsageError("name an output, or write in place: one of the two")
        if isinstance(self.output, Path) and not is_special(self.output):
            check_writable(self.output, 0, force=self.force)

    def name(self, model: Path) -> str | None:
        """How results call it: the file's path, "-" for a stream, None for nowhere."""
        if self.in_place:
            return str(model)
        if self.output is None:
            return None
        return str(self.output) if isinstance(self.output, Path) else "-"

    @contextmanager
    def held(self, model: Path, progress: Progress) -> Iterator[None]:
        """The destination is ours alone meanwhile, so that what is read stays true.

        An in-place write of it that was cut short is undone first.
        """
        path = model if self.in_place else self.output
        if not isinstance(path, Path) or is_special(path):
            yield
            return
        with only_writer(path):
            if resolved(path) == resolved(model):
                undo_interrupted(model, progress)
            yield

    def write(self, rewrite: Rewrite, progress: Progress) -> None:
        """Write to the output, which is not in place."""
        if not isinstance(self.output, Path):
            assert self.output is not None  # `check` has seen to it
            write_stream(rewrite, self.output, progress)
        elif is_special(self.output):
            with writing(self.output), self.output.open("wb") as stream:
                write_stream(rewrite, stream, progress)
        else:
            write_copy(rewrite, self.output, force=self.force, progress=progress)


@dataclass(frozen=True)
class Kept:
    """What stays beside a checkpoint that is written in place.

    record: what is in it afterwards, None for nothing. patches: those at hand of what is in it.
    """

    record: StackRecord | None
    patches: Sequence[PatchFile]


def is_special(path: Path) -> bool:
    """Whether the path is a pipe or a device, which is written as it comes."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def write_over(rewrite: Rewrite, kept: Kept, progress: Progress) -> None:
    """Write over `rewrite.source`, with its undo journal and its patches beside it.

    Where the new header does not fit into the old one's place the file is written anew, whole.
    The caller is its only writer. What stays beside it is written before and removed after, so
    that whatever happens in between it is there for what needs it.
    """
    source = rewrite.source
    before = Kept(source.stack, kept_patches(source.path))
    try:
        if kept.record is not None:
            _keep_undo(source, kept.record, rewrite.header_bytes)
            keep_patches(source.path, (*kept.patches, *before.patches))
        if rewrite.fits_in_place:
            write_in_place(rewrite, progress)
        else:
            write_copy(rewrite, source.path, force=True, progress=progress)
    except BaseException:
        with suppress(SepmeError):
            _settle(source, before, source.header_bytes, was=kept.record)
        raise
    _settle(source, kept, rewrite.header_bytes, was=source.stack)


def _settle(
    source: Checkpoint, kept: Kept, header_bytes: bytes, *, was: StackRecord | None
) -> None:
    """Leave beside the checkpoint what belongs to the state it is in, and nothing else."""
    keep_patches(source.path, kept.patches)
    if not _has_undo(source.path, kept.record or was):
        return
    if kept.record is None:
        remove(undo_path(source.path))
    elif source.stack is not None:
        # Where it is None the weights in the file may be the new ones, and the journal is right.
        _keep_undo(source, kept.record, header_bytes)


def _keep_undo(source: Checkpoint, record: StackRecord, header_bytes: bytes) -> None:
    """The journal of a checkpoint that will have this record and header."""
    undo = undo_path(source.path)
    coming = UndoRecord(record.base, sha256(header_bytes).hexdigest())
    if source.stack is None:
        write_undo(undo, _state(source), coming)
    elif _has_undo(source.path, source.stack):
        with open_undo(undo) as journal:
            if journal.record != coming:
                write_undo(undo, journal.state, coming)


def _has_undo(path: Path, record: StackRecord | None) -> bool:
    """Whether the journal beside a checkpoint is its own, and not one of another file."""
    undo = undo_path(path)
    if record is None or not undo.exists():
        return False
    try:
        with open_undo(undo) as journal:
            return journal.record.base == record.base
    except MalformedError:
        return False


def _state(checkpoint: Checkpoint) -> State:
    names = {copy.name for target in checkpoint.targets for copy in target.copies}
    touched = [entry for entry in checkpoint.header.tensors if entry.name in names]
    start = checkpoint.header.data_start
    return State(checkpoint.file.fileno(), start, checkpoint.header_bytes, touched)
