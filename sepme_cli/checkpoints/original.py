"""Where the weights from before any patch come from: the base's own file, or the undo journal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.base import Base
from patch_spec.header import Header, TensorEntry
from patch_spec.stack import StackRecord
from sepme_cli.checkpoints.dtypes import numpy_dtype
from sepme_cli.checkpoints.headers import RECORD
from sepme_cli.checkpoints.journal import Journal, open_undo
from sepme_cli.checkpoints.reader import Checkpoint, detect_in, open_checkpoint
from sepme_cli.checkpoints.targets import Reader, Target, base_of, find_targets
from sepme_cli.errors import MismatchError
from sepme_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class Original:
    """A checkpoint's targets before any patch, known to be the base that its record names.

    base: what a patch made from it says of it. header, header_bytes: those of the base's file.
    """

    path: Path
    base: Base
    header: Header
    header_bytes: bytes = field(repr=False)
    targets: Mapping[str, Target] = field(repr=False)
    read_entry: Reader = field(repr=False)

    def entry(self, name: str, copy: int) -> TensorEntry:
        """Where copy 0 (the weight) or 1 (its EMA twin) of a target is; MismatchError if not."""
        target = self.targets.get(name)
        if target is None or copy >= len(target.copies):
            raise MismatchError(
                f"{self.path} lacks {'the EMA twin of ' if copy else ''}{name}, "
                "which the checkpoint has",
                file=self.path,
            )
        return target.copies[copy]

    def read(self, name: str, copy: int) -> npt.NDArray[Any]:
        """The values of a copy of a target, in the dtype it is stored in here."""
        return self.read_entry(self.entry(name, copy))


@contextmanager
def open_base(path: Path, record: StackRecord, progress: Progress = SILENT) -> Iterator[Original]:
    """The base's file as the original of a checkpoint with this stack record.

    Raises as `open_checkpoint` does, and MismatchError if it is not that base.
    """
    with open_checkpoint(path, progress) as checkpoint:
        if checkpoint.stack is not None:
            raise MismatchError(
                f"{path} is itself patched and so is nobody's base",
                file=path,
                expected="a checkpoint as it was before any patch",
                found=", ".join(entry.concept for entry in checkpoint.stack.entries),
            )
        yield _of_checkpoint(checkpoint, record)


@contextmanager
def open_undo_journal(path: Path, record: StackRecord) -> Iterator[Original]:
    """An undo journal as the original of a checkpoint with this stack record.

    Raises MalformedError, SystemFailure, and MismatchError if it belongs to another base, or
    keeps a state that was itself patched.
    """
    with open_undo(path) as journal:
        if RECORD in journal.header.metadata:
            raise MismatchError(f"{path} keeps a state that was patched already", file=path)
        yield _of_journal(journal, record)


def _of_checkpoint(checkpoint: Checkpoint, record: StackRecord) -> Original:
    return _verified(
        Original(
            checkpoint.path,
            checkpoint.base(),
            checkpoint.header,
            checkpoint.header_bytes,
            checkpoint.by_name,
            checkpoint.read_entry,
        ),
        record,
    )


def _of_journal(journal: Journal, record: StackRecord) -> Original:
    family, layout = detect_in(journal.header, journal.path)
    targets = find_targets(journal.header, layout, journal.path)
    kept = {entry.name for entry in journal.touched}
    for target in targets:
        if missing := {copy.name for copy in target.copies} - kept:
            raise MismatchError(f"{journal.path} lacks {missing.pop()}", file=journal.path)

    def read(entry: TensorEntry) -> npt.NDArray[Any]:
        values = np.frombuffer(journal.read_bytes(entry.name), numpy_dtype(entry.dtype))
        return values.reshape(entry.shape)

    return _verified(
        Original(
            journal.path,
            base_of(family, targets, read, journal.path, {}),
            journal.header,
            journal.header_bytes,
            {target.name: target for target in targets},
            read,
        ),
        record,
    )


def _verified(original: Original, record: StackRecord) -> Original:
    if original.base.digest != record.base:
        raise MismatchError(
            f"{original.path} is not the base that this checkpoint was patched from",
            file=original.path,
            expected=record.base,
            found=original.base.digest,
        )
    return original
