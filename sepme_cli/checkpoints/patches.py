"""Patch files as they come in: read, checked, told apart by their digest."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from patch_spec.container import patch_bytes, read_patch
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from patch_spec.stack import StackEntry
from sepme_cli.checkpoints.boundary import reading, writing
from sepme_cli.checkpoints.files import new_file, resolved, sync_folder, write_all
from sepme_cli.errors import RefusedError

PatchSource = Path | BinaryIO
"""A patch's file, or a stream that is read from where it stands to its end."""


@dataclass(frozen=True)
class PatchFile:
    """A patch and where it came from. digest: SHA-256 of its bytes."""

    name: str
    digest: str
    patch: Patch = field(repr=False)

    @property
    def digests(self) -> set[str]:
        """Of its increments."""
        return {part.digest for part in self.patch.increments}


def read_patch_file(source: PatchSource) -> PatchFile:
    """Raises MalformedError for what is no valid patch, SystemFailure if it cannot be read."""
    name = str(source) if isinstance(source, Path) else "standard input"
    with reading(name):
        if not isinstance(source, Path):
            return _read(name, source)
        with source.open("rb") as file:
            return _read(name, file)


def select(files: Iterable[PatchFile], only: Sequence[str] = ()) -> tuple[Increment, ...]:
    """The increments in the files, each once; of the concepts `only` if that names any.

    only: concepts or slugs. Raises RefusedError for one that no file has.
    """
    every = {part.digest: part for file in files for part in file.patch.increments}
    if not only:
        return tuple(every.values())
    if unknown := [name for name in only if not any(named(part, name) for part in every.values())]:
        raise RefusedError(
            f"no patch given takes out {', '.join(map(repr, unknown))}",
            expected="one of " + ", ".join(sorted(part.concept for part in every.values())),
            found=", ".join(unknown),
        )
    return tuple(part for part in every.values() if any(named(part, name) for name in only))


def named(part: Increment | StackEntry, name: str) -> bool:
    """Whether `name` is the increment's concept, in any case, or its slug."""
    return name.strip().casefold() in (part.concept.casefold(), part.slug)


def kept_folder(path: Path) -> Path:
    """Where in-place commands keep the patches that are in a checkpoint, beside it."""
    path = resolved(path)
    return path.with_name(f"{path.name}.sepme-applied")


def kept_patches(path: Path) -> tuple[PatchFile, ...]:
    """The patches kept beside a checkpoint, in the order of their digests."""
    return tuple(read_patch_file(file) for file in sorted(kept_folder(path).glob("*.sepme")))


def keep_patches(path: Path, files: Iterable[PatchFile]) -> None:
    """Keep these patches, and no others. The caller is the only writer of the checkpoint."""
    folder = kept_folder(path)
    wanted = {file.digest: file for file in files}
    with writing(folder):
        for left in folder.glob(".*.sepme-tmp"):  # by a writer who was killed
            left.unlink()
        present = {file.stem: file for file in folder.glob("*.sepme")}
        if wanted and not folder.exists():
            folder.mkdir()
            sync_folder(folder)
        for digest in wanted.keys() - present.keys():
            data = patch_bytes(wanted[digest].patch)
            with new_file(folder / f"{digest}.sepme", len(data)) as descriptor:
                write_all(descriptor, data, 0)
        for digest in present.keys() - wanted.keys():
            present[digest].unlink()
        if not wanted and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class _Hashed(io.RawIOBase):
    """A stream that knows the SHA-256 of what was read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        return data


def _read(name: str, stream: BinaryIO) -> PatchFile:
    hashed = _Hashed(stream)
    patch = read_patch(cast(BinaryIO, hashed))
    return PatchFile(name, hashed.digest.hexdigest(), patch)
