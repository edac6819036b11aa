"""Writing a model's folder that differs from another in some of its files."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import (
    AROUND_TEMPORARY,
    check_writable,
    copy_all,
    new_file,
    resolved,
    shortened,
    sync_folder,
    temporary,
    warn_of_mode,
)
from sepme_cli.checkpoints.disk.interrupts import interruptible, uninterrupted
from sepme_cli.checkpoints.disk.kernel import exchange
from sepme_cli.checkpoints.disk.system import set_mode
from sepme_cli.checkpoints.reading.copies import unpatched_copies
from sepme_cli.checkpoints.structure.folders import ModelFolder, model_files, model_folder
from sepme_cli.checkpoints.writing.writer import Rewrite, write_copy
from sepme_cli.errors import SepmeError, SystemFailure, UsageError
from sepme_cli.progress import SILENT, Progress

_ASIDE = ".old.sepme-tmp"


def check_new_folder(output: Path, model: Path, *, force: bool, size: int = 0) -> None:
    """SystemFailure if the folder cannot be written, as far as can be told; see `check_writable`.

    force: another model's folder there may be replaced, and nothing else. size: bytes of what is
    written anew. Raises UsageError where one of the two folders lies in the other.
    """
    output, model = resolved(output), resolved(model)
    if output == model or output in model.parents or model in output.parents:
        raise UsageError(
            "the output must lie outside the model's folder, and not around it",
            expected="another folder",
            found=output,
        )
    replaces = output.is_dir() and force
    if replaces and not _is_model(output):
        raise SystemFailure(
            f"{output}: --force replaces only a model's folder; remove this one yourself",
            file=output,
        )
    with writing(output):
        total = size + sum(path.stat().st_size for path, _ in model_files(model))
    if output.exists() and not replaces:
        raise SystemFailure(
            f"{output}: this folder exists already; --force overwrites it", file=output
        )
    # A folder needs the space and the rights that a file beside it would need.
    check_writable(temporary(output), total, force=True)


def _is_model(path: Path) -> bool:
    try:
        model_folder(path)
    except SepmeError:
        return False
    return True


def write_folder(
    folder: ModelFolder,
    rewrites: Sequence[Rewrite],
    output: Path,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Write a copy of the folder with some of its files rewritten; it appears whole or not at all.

    Left out, with a warning, are further copies of the UNet's weights (see `unpatched_copies`),
    in which what was taken out would live on. The caller is the output's only writer.
    Raises SystemFailure, and what making the tensors raises.
    """
    output = resolved(output)
    made = temporary(output)
    with uninterrupted(), writing(output):
        _sweep(output)
        check_new_folder(output, folder.path, force=force)
        try:
            made.mkdir()
            with interruptible():
                _fill(made, folder, rewrites, progress)
            _put(made, output)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def _fill(
    target: Path, folder: ModelFolder, rewrites: Sequence[Rewrite], progress: Progress
) -> None:
    rewritten = {rewrite.source.place: rewrite for rewrite in rewrites}
    unpatched = set(unpatched_copies(folder))
    for path, place in folder.files():
        if path in unpatched:
            progress.warn(f"{path} holds, or may hold, a copy of the UNet's weights: left out")
            continue
        rewrite = rewritten.get(place)
        copy = target / (rewrite.source.written_place if rewrite else place)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if rewrite is not None:
            write_copy(rewrite, copy, progress=progress)
        else:
            _copy(path, copy, progress)
    for parent, _, _ in os.walk(target, topdown=False):
        sync_folder(Path(parent) / "any")


def _copy(path: Path, copy: Path, progress: Progress) -> None:
    size = path.stat().st_size
    with path.open("rb") as source, new_file(copy, size) as target:
        copy_all(source.fileno(), 0, target, 0, size, path)
        if not set_mode(target, path.stat().st_mode & 0o777):
            warn_of_mode(copy, progress)


def _put(made: Path, output: Path) -> None:
    """Rename a finished folder to its name, in exchange for the one that has it."""
    if not output.exists():
        made.rename(output)
        sync_folder(output)
        return
    aside = made
    if not _exchange(made, output):
        aside = temporary(output, _ASIDE)
        output.rename(aside)
        made.rename(output)
    # Only then: the files could be gone for good before the new names are there for good.
    sync_folder(output)
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system cannot."""
    try:
        exchange(one, other)
    except OSError:
        return False
    return True


def _sweep(output: Path) -> None:
    """Remove folders that a writer who was killed has left.

    Killed between two renames, it has left nothing else: the old folder then gets its name back.
    """
    name = shortened(output, AROUND_TEMPORARY)
    for path in output.parent.glob(f".{name}.*{_ASIDE}"):
        if not output.exists():
            path.rename(output)
            sync_folder(output)
    for path in output.parent.glob(f".{name}.*.sepme-tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
