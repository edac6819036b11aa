"""Where a written checkpoint goes: to a file, to a stream, or over the checkpoint it came from."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sepme_cli.checkpoints.disk.failures import reading, writing
from sepme_cli.checkpoints.disk.files import (
    check_not_shared,
    check_own,
    check_writable,
    only_writer,
    resolved,
)
from sepme_cli.checkpoints.disk.interrupts import uninterrupted
from sepme_cli.checkpoints.disk.output import check_other, check_output
from sepme_cli.checkpoints.disk.system import replaces_open_files
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.journals.in_place import undo_interrupted
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.copies import unpatched_copies
from sepme_cli.checkpoints.reading.gguf import SUFFIX, GgufFile
from sepme_cli.checkpoints.reading.opening import PICKLED
from sepme_cli.checkpoints.reading.patches import keep_patches, kept_folder, kept_patches
from sepme_cli.checkpoints.reading.tensors import WeightsFile
from sepme_cli.checkpoints.structure.headers import RECORD
from sepme_cli.checkpoints.writing.companions import Companions, keep_undo, put_away, settle
from sepme_cli.checkpoints.writing.folder import check_new_folder, write_folder
from sepme_cli.checkpoints.writing.writer import Rewrite, write_copy, write_in_place, write_stream
from sepme_cli.errors import RefusedError, SepmeError, UsageError
from sepme_cli.places import HubPlace, Place
from sepme_cli.progress import Progress


@dataclass(frozen=True)
class Destination:
    """Where what becomes of a model is written.

    output: a file or a stream; None with in_place, or where nothing is to be written. force: an
    existing file may be replaced. dry: look for all that would go wrong, and write nothing. read:
    what else the result is made from, as callers name it.
    Raises UsageError unless exactly one way to write is named, or none where none is needed, and
    for a model on the hub in place: its cache is everybody's.
    """

    model: Place
    output: Path | BinaryIO | None
    in_place: bool
    force: bool
    dry: bool = False
    read: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        ways = (self.output is not None) + self.in_place
        if ways > 1 or not (ways or self.dry):
            raise UsageError("name an output or write in place: exactly one of the two")
        if self.in_place and isinstance(self.model, HubPlace):
            raise UsageError(
                f"{self.model}: a model on the hub cannot be written in place, and its cache on "
                "this machine is shared with other programs; write to a new file with -o",
                expected="a model of your own, or -o",
                found=self.model,
            )

    @property
    def path(self) -> Path | None:
        """The file or folder that is written; None for a stream, and for nowhere."""
        path = self.model if self.in_place else self.output
        return path if isinstance(path, Path) and not is_special(path) else None

    @property
    def name(self) -> str | None:
        """How results call it: the file's path, "-" for a stream, None for nowhere."""
        if self.in_place:
            return str(self.model)
        if self.output is None:
            return None
        return str(self.output) if isinstance(self.output, Path) else "-"

    @contextmanager
    def opened(self, progress: Progress) -> Iterator["Target"]:
        """The model, open, and what writes to here. Nobody else writes here meanwhile, so that
        what is read stays true; what a run that was killed has left is undone and put away first.

        Raises what opening a checkpoint raises, and what writing would raise as far as it can be
        told before anything is read: UsageError, RefusedError, SystemFailure.
        """
        model = local(self.model, progress, whole=not self.dry)
        self._check(model)
        held = nullcontext() if self.dry else self._held(model, progress)
        with held, open_checkpoint(model, progress) as checkpoint:
            self._check_against(checkpoint)
            if self.in_place and not self.dry:
                put_away(checkpoint)
            yield Target(self, checkpoint, progress)

    def _check(self, model: Path) -> None:
        if self.in_place:
            check_not_shared(model)
            if not replaces_open_files():
                raise UsageError(
                    f"{model}: this system cannot replace a file that is open, so a model cannot "
                    "be written over itself; write to another file with -o",
                    expected="another file",
                    found=model,
                )
        if not isinstance(self.output, Path) or is_special(self.output):
            return
        if model.is_dir():
            check_new_folder(self.output, model, force=self.force)
            return
        check_suffix(self.output)
        instead = "write to another file"
        if model.suffix.lower() != SUFFIX:
            instead += ", or --in-place, which keeps an undo journal"
        check_other(self.output, model, instead)
        check_output(self.output, self.read, force=self.force)

    def _check_against(self, checkpoint: Checkpoint) -> None:
        """Whether a checkpoint of this shape can be written so; UsageError, RefusedError."""
        streams = not isinstance(self.output, Path) or is_special(self.output)
        if isinstance(self.output, Path) and not streams and checkpoint.folder is None:
            check_same_format(self.output, checkpoint.files[0])
        if checkpoint.folder is not None and self.output is not None and streams:
            raise UsageError("a model's folder cannot be written to a stream; name a folder")
        if not self.in_place:
            return
        for file in checkpoint.files:
            check_in_place(checkpoint, file)

    @contextmanager
    def _held(self, model: Path, progress: Progress) -> Iterator[None]:
        """The destination is ours alone; an in-place write of it that was cut short is undone."""
        path = self.path
        if path is None:
            yield
            return
        with only_writer(path, progress):
            if resolved(path) == resolved(model):
                undo_interrupted(model, progress)
            yield


@dataclass(frozen=True)
class Target:
    """A checkpoint that is open, and the destination that is held for it."""

    destination: Destination
    checkpoint: Checkpoint
    progress: Progress

    def write(self, rewrites: Sequence[Rewrite], companions: Companions) -> None:
        """Write all of the checkpoint to where it goes, or look whether it could be.

        companions: what stays beside it in place.
        """
        if self.destination.in_place:
            for rewrite in rewrites:
                check_in_place(self.checkpoint, rewrite.source)
        if self.destination.dry:
            self._check_space(rewrites)
            for rewrite in rewrites:
                rewrite.rehearse(self.progress)
        elif self.destination.in_place:
            write_over(self.checkpoint, rewrites, companions, self.progress)
        else:
            self._write_new(rewrites)

    def _write_new(self, rewrites: Sequence[Rewrite]) -> None:
        output, force = self.destination.output, self.destination.force
        assert output is not None  # without one it is dry or in place
        if not isinstance(output, Path):
            write_stream(rewrites[0], output, self.progress)
        elif is_special(output):
            with writing(output), output.open("wb") as stream:
                write_stream(rewrites[0], stream, self.progress)
        elif self.checkpoint.folder is not None:
            folder = self.checkpoint.folder
            write_folder(folder, rewrites, output, force=force, progress=self.progress)
        else:
            write_copy(rewrites[0], output, force=force, progress=self.progress)

    def _check_space(self, rewrites: Sequence[Rewrite]) -> None:
        """SystemFailure if what is to be written does not fit on the disk."""
        to = self.destination
        output = self.checkpoint.path if to.in_place else to.output
        if not isinstance(output, Path) or is_special(output):
            return
        size = sum(rewrite.file_size for rewrite in rewrites)
        if self.checkpoint.folder is None:
            check_writable(output, size, force=to.force or to.in_place)
        elif not to.in_place:
            check_new_folder(output, self.checkpoint.path, force=to.force, size=size)


def check_in_place(checkpoint: Checkpoint, file: WeightsFile) -> None:
    """UsageError, RefusedError for a file of a checkpoint that cannot be written over."""
    if file.path.suffix.lower() in PICKLED:
        raise UsageError(
            f"{file.path}: a pickle cannot be written in place; write to a safetensors file with -o"
        )
    if isinstance(file, GgufFile):
        raise UsageError(
            f"{file.path}: a GGUF file has no room for the record of what is in it, so it cannot "
            "be written in place; write to another file with -o"
        )
    check_not_shared(file.path)
    if checkpoint.folder is not None and file.path.is_symlink():
        raise RefusedError(
            f"{file.path} is a link, as in a download cache, and other models may share what it "
            "points to; write to another folder with -o",
            file=file.path,
            expected="a file of the folder's own",
            found=f"a link to {os.readlink(file.path)}",
        )


def check_suffix(output: Path) -> None:
    """UsageError for a name that says the file is something that sepme does not write."""
    if output.suffix.lower() in PICKLED:
        raise UsageError(
            f"{output}: sepme writes safetensors files and no pickles",
            expected="a name that ends in .safetensors",
            found=output.suffix,
        )


def check_same_format(output: Path, file: WeightsFile) -> None:
    """UsageError for a name that says GGUF for another file, or another file for GGUF."""
    made = isinstance(file, GgufFile)
    if made != (output.suffix.lower() == SUFFIX):
        raise UsageError(
            f"{output}: what is made of {file.path} is "
            f"{'a GGUF' if made else 'a safetensors'} file, as sepme quantises nothing and undoes "
            "no quantising",
            expected=f"a name that ends in {SUFFIX if made else '.safetensors'}",
            found=output.suffix,
        )


def is_special(path: Path) -> bool:
    """Whether the path is a pipe or a device, which is written as it comes."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def write_over(
    checkpoint: Checkpoint, rewrites: Sequence[Rewrite], companions: Companions, progress: Progress
) -> None:
    """Write over the checkpoint's files, with their undo journals and its patches beside them.

    Where a new header does not fit into the old one's place the file is written anew, whole. The
    caller is its only writer. What stays beside it is written before and removed after, so that
    whatever happens in between it is there for what needs it.
    """
    # Patches that are not in the checkpoint are removed from there: not from a folder elsewhere.
    check_own(kept_folder(checkpoint.path), checkpoint.path)
    before = Companions(checkpoint.stack, kept_patches(checkpoint.path))
    sources = [rewrite.source for rewrite in rewrites]
    old = [(file, file.header_bytes, RECORD in file.header.metadata) for file in sources]
    new = [(rewrite.source, rewrite.header_bytes, rewrite.patched) for rewrite in rewrites]
    if checkpoint.folder is not None and companions.record is not None:
        for path in unpatched_copies(checkpoint.folder, companions.record):
            progress.warn(
                f"{path} holds, or may hold, a copy of the UNet's weights, and stays as it is: "
                "concepts erased from the model are still in that copy"
            )
    for rewrite in rewrites:
        if (names := rewrite.source.path.stat().st_nlink) > 1:
            progress.warn(
                f"{rewrite.source.path} has {names} names (hard links): the file changes under "
                "all of them"
            )
    with uninterrupted():
        try:
            if companions.record is not None:
                for rewrite in rewrites:
                    keep_undo(
                        checkpoint,
                        rewrite.source,
                        companions.record,
                        rewrite.header_bytes,
                        rewrite.touched,
                    )
                keep_patches(checkpoint.path, (*companions.patches, *before.patches))
            _write_over(checkpoint, rewrites, progress)
        except BaseException:
            with suppress(SepmeError):
                if _is_written(checkpoint, rewrites):
                    settle(checkpoint, companions, new, was=checkpoint.stack)
                else:
                    settle(checkpoint, before, old, was=companions.record)
            raise
        settle(checkpoint, companions, new, was=checkpoint.stack)


def _is_written(checkpoint: Checkpoint, rewrites: Sequence[Rewrite]) -> bool:
    """Whether the files are the new ones, and stay so, though something failed after that."""
    if pending_path(checkpoint.path).exists():
        return False
    with reading(checkpoint.path):
        return all(
            rewrite.source.path.open("rb").read(len(rewrite.header_bytes)) == rewrite.header_bytes
            for rewrite in rewrites
        )


def _write_over(checkpoint: Checkpoint, rewrites: Sequence[Rewrite], progress: Progress) -> None:
    if all(rewrite.fits_in_place for rewrite in rewrites):
        write_in_place(checkpoint.path, rewrites, progress)
    elif len(rewrites) == 1:
        write_copy(rewrites[0], rewrites[0].source.path, force=True, progress=progress)
    else:
        raise RefusedError(
            f"{checkpoint.path}: its headers have no room for the record, and this file system "
            "cannot add any; write to another folder with -o",
            file=checkpoint.path,
        )
