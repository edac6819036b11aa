"""What lies beside a checkpoint that is written in place: its undo journals and its patches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from patch_spec.header import TensorEntry
from patch_spec.stack import StackRecord
from patch_spec.undo import UndoRecord
from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import UNDO, check_own, remove, resolved, sweep
from sepme_cli.checkpoints.journals.undo import Kept, State, open_undo, undo_path, write_undo
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import PatchFile, keep_patches, kept_patches
from sepme_cli.checkpoints.reading.tensors import WeightsFile
from sepme_cli.checkpoints.structure.headers import RECORD
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
    for path in {checkpoint.path, *_written_to(checkpoint)}:
        with writing(path):
            sweep(resolved(path))
    for file in _may_have_undo(checkpoint):
        undo = undo_path(file.path)
        if RECORD not in file.header.metadata and undo.exists() and _is_spare(undo, file):
            remove(undo)
    if checkpoint.stack is not None:
        inside = {entry.digest for entry in checkpoint.stack.entries}
        kept = kept_patches(checkpoint.path)
        keep_patches(checkpoint.path, [file for file in kept if inside & file.digests])
    elif not any(undo_path(file.path).exists() for file in _may_have_undo(checkpoint)):
        keep_patches(checkpoint.path, ())


def settle(
    checkpoint: Checkpoint,
    companions: Companions,
    files: Sequence[tuple[WeightsFile, bytes, bool]],
    *,
    was: StackRecord | None,
) -> None:
    """Leave beside the checkpoint what belongs to the state it is in, and nothing else.

    files: with their headers, and whether the stack record is in those.
    """
    keep_patches(checkpoint.path, companions.patches)
    for file, header_bytes, has_record in files:
        if not _has_undo(file.path, companions.record or was):
            continue
        if companions.record is None or not has_record:
            remove(undo_path(file.path))
        elif RECORD in file.header.metadata:
            # Where it is not there the weights may be the new ones, and the journal is right.
            keep_undo(checkpoint, file, companions.record, header_bytes)


def keep_undo(
    checkpoint: Checkpoint,
    file: WeightsFile,
    record: StackRecord,
    header_bytes: bytes,
    touched: Iterable[TensorEntry] = (),
) -> None:
    """The journal of a file that will have this record and header.

    touched: tensors that are overwritten now, beside those of targets.
    """
    undo = undo_path(file.path)
    check_own(undo, file.path)
    coming = UndoRecord(record.base, sha256(header_bytes).hexdigest())
    now = _state(checkpoint, file, touched)
    if RECORD not in file.header.metadata:
        write_undo(undo, now, coming)
    elif _has_undo(file.path, checkpoint.stack):
        with open_undo(undo) as journal:
            state = journal.state.with_more(now)
            if journal.record != coming or len(state.kept) > len(journal.touched):
                write_undo(undo, state, coming)


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


def _written_to(checkpoint: Checkpoint) -> Iterator[Path]:
    """The files that a patch may have written to."""
    yield from (file.path for file in checkpoint.target_files)
    for folder in _text_encoders(checkpoint).values():
        yield from sorted(folder.glob("*.safetensors"))


def _may_have_undo(checkpoint: Checkpoint) -> tuple[WeightsFile, ...]:
    """Those beside which a journal may lie; of text encoders, which are not opened without need,
    those beside which one does."""
    found = list(checkpoint.target_files)
    for name, folder in _text_encoders(checkpoint).items():
        if any(folder.glob(f"*{UNDO}")):
            found += checkpoint.networks.files(name)
    return tuple(found)


def _text_encoders(checkpoint: Checkpoint) -> dict[str, Path]:
    """The folders of text encoders by their names."""
    whole = checkpoint.folder
    found = () if whole is None else checkpoint.family.text_encoders
    return {one.name: place for one in found if whole and (place := whole.network(one.folder))}


def _is_spare(undo: Path, file: WeightsFile) -> bool:
    """Whether a journal keeps just what its file holds."""
    try:
        with open_undo(undo) as journal:
            return journal.header_bytes == file.header_bytes and all(
                journal.read_bytes(entry.name)
                == file.read_range(entry.begin, entry.end, entry.name)
                for entry in journal.touched
            )
    except MalformedError:
        return False


def _state(checkpoint: Checkpoint, file: WeightsFile, touched: Iterable[TensorEntry]) -> State:
    names = {
        *(copy.name for target in checkpoint.targets for copy in target.copies),
        *(entry.name for entry in touched),
    }
    start, descriptor = file.header.data_start, file.file.fileno()
    kept = [
        Kept(entry, descriptor, start + entry.begin)
        for entry in file.header.tensors
        if entry.name in names
    ]
    return State(file.header_bytes, kept)
