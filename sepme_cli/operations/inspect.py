"""What a patch or a checkpoint holds, from its header alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from patch_spec.container import read_manifest
from patch_spec.manifest import Manifest
from patch_spec.stack import StackEntry
from sepme_cli.checkpoints.boundary import reading
from sepme_cli.checkpoints.journal import open_undo, undo_path
from sepme_cli.checkpoints.kinds import kind_of
from sepme_cli.checkpoints.reader import Checkpoint, open_checkpoint
from sepme_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint. dtype: of the targets, or "mixed". targets: weights that patches change.

    width: of the text embedding. ema: whether there are twins of the targets. text_encoders: the
    streams that are in the file. applied: what patches are in it; base: the digest of what it was
    before, tool: what patched it, None if nothing did. undo: the undo journal beside it, if any.
    """

    file: str
    bytes: int
    family: str
    title: str
    layout: str
    dtype: str
    width: int
    targets: int
    tensors: int
    ema: bool
    text_encoders: tuple[str, ...]
    applied: tuple[StackEntry, ...]
    base: str | None
    tool: str | None
    undo: str | None
    metadata: Mapping[str, str]
    kind: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True)
class PatchInfo:
    """A patch. bytes: of the file, None for a stream. manifest: as SPEC.md describes it."""

    file: str
    bytes: int | None
    manifest: Mapping[str, Any]
    kind: Literal["patch"] = "patch"


@dataclass(frozen=True)
class UndoInfo:
    """An undo journal. base: the digest of the base it goes back to. tensors: that it keeps."""

    file: str
    bytes: int
    base: str
    tensors: int
    kind: Literal["undo"] = "undo"


InspectResult = CheckpointInfo | PatchInfo | UndoInfo


def inspect(file: Path | BinaryIO, *, progress: Progress = SILENT) -> InspectResult:
    """What a file holds. A stream must be a patch.

    Raises MalformedError, UnsupportedError and SystemFailure.
    """
    if not isinstance(file, Path):
        with reading("standard input"):
            return _patch("standard input", None, read_manifest(file))
    kind = kind_of(file)
    if kind == "checkpoint":
        with open_checkpoint(file, progress) as checkpoint:
            return _checkpoint(checkpoint)
    if kind == "undo":
        with open_undo(file) as journal:
            size = file.stat().st_size
            return UndoInfo(str(file), size, journal.record.base, len(journal.touched))
    with reading(file):
        return _patch(str(file), file.stat().st_size, read_manifest(file))


def _patch(name: str, size: int | None, manifest: Manifest) -> PatchInfo:
    return PatchInfo(name, size, manifest.to_json())


def _checkpoint(checkpoint: Checkpoint) -> CheckpointInfo:
    undo, stack = undo_path(checkpoint.path), checkpoint.stack
    names = [entry.name for entry in checkpoint.header.tensors]
    return CheckpointInfo(
        file=str(checkpoint.path),
        bytes=os.fstat(checkpoint.file.fileno()).st_size,
        family=checkpoint.family.name,
        title=checkpoint.family.title,
        layout="single-file",
        dtype=checkpoint.dtype,
        width=checkpoint.width,
        targets=len(checkpoint.targets),
        tensors=len(names),
        ema=any(len(target.copies) > 1 for target in checkpoint.targets),
        text_encoders=tuple(
            stream.name
            for stream in checkpoint.family.streams
            if any(name.startswith(stream.prefix) for name in names)
        ),
        applied=stack.entries if stack is not None else (),
        base=stack.base if stack is not None else None,
        tool=stack.tool if stack is not None else None,
        undo=str(undo) if undo.exists() else None,
        metadata=dict(checkpoint.metadata),
    )
