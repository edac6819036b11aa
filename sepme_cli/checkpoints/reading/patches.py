"""Patch files as they come in: read, checked, told apart by their digest."""

import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from patch_spec.container import patch_bytes, read_patch
from patch_spec.errors import FormatError
from patch_spec.header import read_header
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from patch_spec.stack import StackEntry
from sepme_cli.arguments import PlaceLike, Words, as_place, several
from sepme_cli.checkpoints.disk.failures import reading, writing
from sepme_cli.checkpoints.disk.files import (
    check_own,
    companion,
    resolved,
    sync_folder,
    write_file,
)
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.reading.kinds import kind_of
from sepme_cli.checkpoints.reading.unsupported import telling
from sepme_cli.errors import MalformedError, RefusedError, UsageError
from sepme_cli.increments import Scaled
from sepme_cli.places import HubPlace

PatchSource = PlaceLike | BinaryIO
"""A patch's file, here or on the hub, or a stream that is read from where it stands to its end."""
Patches = PatchSource | Sequence[PatchSource]
Scale = float | Mapping[str, float]
"""How much of each increment: 1 is all. Or of each concept (or slug) that is named, and all of the
others."""


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
    """Raises MalformedError for what is no valid patch, SystemFailure if it cannot be read, and
    UsageError for a hub's repository without the file's name."""
    place = as_place(source)
    if not isinstance(place, Path | HubPlace):
        with reading("standard input"):
            return _read("standard input", place)
    if isinstance(place, HubPlace):
        _ = place.file
    path = local(place)
    with reading(place), telling_patch(path, place), path.open("rb") as file:
        return _read(str(place), file)


@contextmanager
def telling_patch(path: Path, name: object) -> Iterator[None]:
    """As `telling`, of a file that should be a patch; a model in its place is told, too."""
    try:
        with telling(path, "a patch", name):
            yield
    except MalformedError as error:
        if path.suffix == ".sepme" or not _is_safetensors(path):
            raise
        raise MalformedError(
            f"{name} is a safetensors file and not a patch: name the model first, then the "
            "patches; sepme import makes a patch from a LoRA",
            file=name,
            expected="a patch",
            found="a safetensors file without a patch's manifest",
        ) from error


def _is_safetensors(path: Path) -> bool:
    """Whether a file has a safetensors header, and nothing that says it is a patch."""
    if kind_of(path) != "checkpoint" or not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            read_header(file, path.stat().st_size)
        except FormatError:
            return False
    return True


def read_patch_files(sources: Patches) -> tuple[PatchFile, ...]:
    """One or several, in order; raises as `read_patch_file` does."""
    return tuple(map(read_patch_file, several(sources)))


def select(files: Iterable[PatchFile], only: Words = ()) -> tuple[Increment, ...]:
    """The increments in the files, each once; of the concepts `only` if that names any.

    only: concepts or slugs. Raises RefusedError for one that no file has.
    """
    every = {part.digest: part for file in files for part in file.patch.increments}.values()
    wanted = several(only)
    if not wanted:
        return tuple(every)
    _check_known(every, wanted)
    return tuple(part for part in every if any(named(part, name) for name in wanted))


def with_scales(parts: Collection[Increment], scale: Scale) -> tuple[Scaled, ...]:
    """The increments, each with its scale.

    Raises UsageError for a scale that is no number, or for a mask neither 0 nor 1, and RefusedError
    for a concept that is not among them.
    """
    by_concept = scale if isinstance(scale, Mapping) else {}
    usual = 1.0 if isinstance(scale, Mapping) else scale
    for value in (usual, *by_concept.values()):
        if not math.isfinite(value):
            raise UsageError("a scale must be a number", found=value)
    _check_known(parts, by_concept)
    terms = tuple(
        (part, next((value for name, value in by_concept.items() if named(part, name)), usual))
        for part in parts
    )
    for part, value in terms:
        if part.kind == "mask" and value not in (0, 1):
            raise UsageError(
                f"{part.concept} is erased by weights that become zero, of which there is no more "
                "and no less: leave out the scale, or choose other increments with --only",
                expected="1",
                found=value,
            )
    return terms


def _check_known(parts: Collection[Increment], names: Iterable[str]) -> None:
    if unknown := [name for name in names if not any(named(part, name) for part in parts)]:
        raise RefusedError(
            f"none of the patches erases {', '.join(map(repr, unknown))}",
            expected="one of " + ", ".join(sorted(part.concept for part in parts)),
            found=", ".join(unknown),
        )


def named(part: Increment | StackEntry, name: str) -> bool:
    """Whether `name` is the increment's concept, in any case, or its slug."""
    return name.strip().casefold() in (part.concept.casefold(), part.slug)


def kept_folder(path: Path) -> Path:
    """Where in-place commands keep the patches that are in a checkpoint, beside it."""
    return companion(resolved(path), ".sepme-applied")


def kept_patches(path: Path) -> tuple[PatchFile, ...]:
    """The patches kept beside a checkpoint, in the order of their digests."""
    folder = kept_folder(path)
    check_own(folder, path)
    return tuple(read_patch_file(file) for file in sorted(folder.glob("*.sepme")))


def keep_patches(path: Path, files: Iterable[PatchFile]) -> None:
    """Keep these patches, and no others. The caller is the only writer of the checkpoint."""
    folder = kept_folder(path)
    check_own(folder, path)
    wanted = {file.digest: file for file in files}
    with writing(folder):
        for left in folder.glob(".*.sepme-tmp"):  # by a writer who was killed
            left.unlink()
        present = {file.stem: file for file in folder.glob("*.sepme")}
        if wanted and not folder.exists():
            folder.mkdir()
            sync_folder(folder)
        for digest in wanted.keys() - present.keys():
            write_file(folder / f"{digest}.sepme", patch_bytes(wanted[digest].patch))
        for digest in present.keys() - wanted.keys():
            present[digest].unlink()
        if not wanted and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class _HashingReader(io.RawIOBase):
    """A stream that knows the SHA-256 of what was read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        return data


def _read(name: str, stream: BinaryIO) -> PatchFile:
    hashed = _HashingReader(stream)
    patch = read_patch(cast(BinaryIO, hashed))
    return PatchFile(name, hashed.digest.hexdigest(), patch)
