"""What a patch or a checkpoint holds, from its header alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from patch_spec.container import read_manifest
from patch_spec.manifest import Manifest
from patch_spec.stack import StackEntry
from sepme_cli.arguments import as_place
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.journals.undo import open_undo, undo_path
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.kinds import kind_of
from sepme_cli.checkpoints.reading.patches import PatchSource, telling_patch
from sepme_cli.checkpoints.structure.layout import EMA
from sepme_cli.places import HubPlace
from sepme_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint, as `inspect` shows it.

    Attributes:
        file: Its path.
        bytes: Its size.
        family: Name of its family, such as "sd1".
        title: The family in words.
        layout: "single-file", "diffusers", or that of a UNet alone.
        dtype: Type of the weights that patches change, or "mixed".
        width: Width of the text embedding.
        targets: Number of weights that patches change.
        tensors: Number of all tensors.
        ema: Whether it has EMA copies of the targets.
        text_encoders: Names of the text encoders in it.
        applied: Increments that are applied.
        base: Digest of its base, or None if it is not patched.
        tool: Program that patched it, or None.
        undo: Undo journal beside it, or None.
        metadata: Its metadata.
        pooled: Width of the pooled text that the model reads beside the rows, or None.
        layers: Number of further weights that the applied increments change, which read more than
            the text.
        files: Files with tensors, for a folder.
        kind: "checkpoint".
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
    pooled: int | None = None
    layers: int = 0
    files: tuple[str, ...] = ()
    kind: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True)
class PatchInfo:
    """A patch, as `inspect` shows it.

    Attributes:
        file: Its path.
        bytes: Its size; None for a stream.
        manifest: Its manifest, as the format describes it.
        kind: "patch".
    """

    file: str
    bytes: int | None
    manifest: Mapping[str, Any]
    kind: Literal["patch"] = "patch"


@dataclass(frozen=True)
class UndoInfo:
    """An undo journal, as `inspect` shows it.

    Attributes:
        file: Its path.
        bytes: Its size.
        base: Digest of the base that it restores.
        tensors: Number of tensors in it.
        kind: "undo".
    """

    file: str
    bytes: int
    base: str
    tensors: int
    kind: Literal["undo"] = "undo"


InspectResult = CheckpointInfo | PatchInfo | UndoInfo
"""Result of `inspect`, by the kind of the file."""


def inspect(file: PatchSource, *, progress: Progress = SILENT) -> InspectResult:
    """Show what a file contains. Only its header is read.

    Args:
        file: Checkpoint, patch or undo journal: a file, a folder, or a place on the hub; or a
            binary stream with a patch.
        progress: Receives progress and warnings.

    Returns:
        A `CheckpointInfo`, a `PatchInfo` or an `UndoInfo`.

    Raises:
        MalformedError: The file is damaged or hostile.
        UnsupportedError: The file is of a kind that is not supported.
        SystemFailure: The file cannot be read.
    """
    place = as_place(file)
    if not isinstance(place, Path | HubPlace):
        with reading("standard input"):
            return _patch("standard input", None, read_manifest(place))
    file = local(place, progress)
    kind = kind_of(file)
    if kind == "checkpoint":
        with open_checkpoint(file, progress) as checkpoint:
            return _checkpoint(checkpoint)
    if kind == "undo":
        with open_undo(file) as journal:
            size = file.stat().st_size
            return UndoInfo(str(file), size, journal.record.base, len(journal.touched))
    with reading(file), telling_patch(file, file):
        return _patch(str(file), file.stat().st_size, read_manifest(file))


def _patch(name: str, size: int | None, manifest: Manifest) -> PatchInfo:
    return PatchInfo(name, size, manifest.to_json())


def _checkpoint(checkpoint: Checkpoint) -> CheckpointInfo:
    stack, names = checkpoint.stack, [spec.name for spec in checkpoint.family.text_encoders]
    encoders = tuple(name for name in names if checkpoint.network(name) is not None)
    files = checkpoint.all_files()
    journals = [undo_path(file.path) for file in checkpoint.patched_files]
    return CheckpointInfo(
        file=str(checkpoint.path),
        bytes=sum(os.fstat(file.file.fileno()).st_size for file in files),
        family=checkpoint.family.name,
        title=checkpoint.family.title,
        layout=checkpoint.arrangement,
        dtype=checkpoint.dtype,
        width=checkpoint.width,
        targets=len(checkpoint.targets),
        tensors=sum(len(file.header.tensors) for file in files),
        ema=any(EMA in copy.name for target in checkpoint.targets for copy in target.copies),
        text_encoders=encoders,
        applied=stack.entries if stack is not None else (),
        base=stack.base if stack is not None else None,
        tool=stack.tool if stack is not None else None,
        undo=str(journals[0]) if all(path.exists() for path in journals) else None,
        metadata=dict(checkpoint.metadata),
        pooled=checkpoint.widths.get("pooled"),
        layers=len(stack.layers) if stack is not None else 0,
        files=tuple(file.place for file in files) if checkpoint.folder is not None else (),
    )
