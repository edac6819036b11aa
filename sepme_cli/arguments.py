"""What callers may say shorter: a path as text, and one thing where several may be."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

FilePath = str | PathLike[str]
Words = str | Sequence[str]
Files = FilePath | Sequence[FilePath]

One = TypeVar("One", bound=str | PathLike[str] | BinaryIO)
Other = TypeVar("Other", bound=BinaryIO | None)


def several(said: One | Sequence[One]) -> tuple[One, ...]:
    """What is said, as a tuple: one word, path or stream is one of them."""
    if isinstance(said, str | PathLike) or hasattr(said, "read"):
        return (cast(One, said),)
    return tuple(said)


def as_path(said: FilePath | Other) -> Path | Other:
    """What names a file as a path; a stream, or None, as it is."""
    return Path(said) if isinstance(said, str | PathLike) else said


def as_paths(said: Files) -> tuple[Path, ...]:
    """Every file that is named."""
    return tuple(map(Path, several(said)))
