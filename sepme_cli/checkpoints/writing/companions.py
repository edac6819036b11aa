"""What lies beside a checkpoint that is written in place: its undo journals and its patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from patch_spec.stack import StackRecord
from patch_spec.undo import UndoRecord
from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import check_own, read_exactly, remove, resolved, sweep
from sepme_cli.checkpoints.journals.undo import State, open_undo, undo_path, write_undo
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import PatchFile, keep_patches, kept_patches
from sepme_cli.checkpoints.reading.tensors import WeightsFile
from sepme_cli.errors import MalformedError


@dataclass(frozen=True)
class Companions:
    """What stays beside a checkpoint that is written in place.

    record: what is in it afterwards, None for nothing. patches: those at hand of what is in it.
    """

    record: StackRecord | None
    patches: Sequence[PatchFile]


def put_away(checkpoint: Checkpoint) -> None:
    """Remove what lies beside a checkpoint and does not belong to the state it is in.

    Temporaries; undo journals that keep what the files hold anyway; patches that are not in it.
    The caller is its only writer.
    """
    for path in {checkpoint.path, *(file.path for file in checkpoint.target_files)}:
        with writing(path):
            sweep(resolved(path))
    if checkpoint.stack is not None:
        inside = {entry.digest for entry in checkpoint.stack.entries}
        kept = kept_patches(checkpoint.path)
        keep_patches(checkpoint.path, [file for file in kept if inside & file.digests])
        return
    journals = [(file, undo_path(file.path)) for file in checkpoint.target_files]
    for file, undo in journals:
        if undo.exists() and _is_spare(undo, _state(checkpoint, file)):
            remove(undo)
    if not any(undo.exists() for _, undo in journals):
        keep_patches(checkpoint.path, ())


def settle(
    checkpoint: Checkpoint,
    companions: Companions,
    headers: Sequence[tuple[WeightsFile, bytes]],
    *,
    was: StackRecord | None,
) -> None:
    """Leave beside the checkpoint what belongs to the state it is in, and nothing else."""
    keep_patches(checkpoint.path, companions.patches)
    for file, header_bytes in headers:
        if not _has_undo(file.path, companions.record or was):
            continue
        if companions.record is None:
            remove(undo_path(file.path))
        elif checkpoint.stack is not None:
            # Where it is None the weights may be the new ones, and the journal is right.
            keep_undo(checkpoint, file, companions.record, header_bytes)


def keep_undo(
    checkpoint: Checkpoint, file: WeightsFile, record: StackRecord, header_bytes: bytes
) -> None:
    """The journal of a file that will have this record and header."""
    undo = undo_path(file.path)
    check_own(undo, file.path)
    coming = UndoRecord(record.base, sha256(header_bytes).hexdigest())
    if checkpoint.stack is None:
        write_undo(undo, _state(checkpoint, file), coming)
    elif _has_undo(file.path, checkpoint.stack):
        with open_undo(undo) as journal:
            if journal.record != coming:
                write_undo(undo, journal.state, coming)


def _has_undo(path: Path, record: StackRecord | None) -> bool:
    """Whether the journal beside a file is its own, and not one of another file."""
    undo = undo_path(path)
    if record is None or not undo.exists():
        return False
    try:
        with open_undo(undo) as journal:
            return journal.record.base == record.base
    except MalformedError:
        return False


def _is_spare(undo: Path, state: State) -> bool:
    """Whether a journal keeps just what its file holds."""
    try:
        with open_undo(undo) as journal:
            kept = {entry.name: entry for entry in journal.touched}
            return journal.header_bytes == state.header_bytes and all(
                entry.name in kept
                and journal.read_bytes(entry.name)
                == read_exactly(state.descriptor, entry.nbytes, state.data_start + entry.begin)
                for entry in state.touched
            )
    except MalformedError:
        return False


def _state(checkpoint: Checkpoint, file: WeightsFile) -> State:
    names = {copy.name for target in checkpoint.targets for copy in target.copies}
    touched = [entry for entry in file.header.tensors if entry.name in names]
    return State(file.file.fileno(), file.header.data_start, file.header_bytes, touched)
