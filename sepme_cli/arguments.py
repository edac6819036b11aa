"""What callers may say shorter: a path as text, and one thing where several may be."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from sepme_cli.errors import UsageError
from sepme_cli.places import HubPlace, Place, parse_output, parse_place

FilePath = str | PathLike[str]
PlaceLike = FilePath | HubPlace
"""Where a model or a patch is; text is understood as on the command line."""
Words = str | Sequence[str]
Files = FilePath | Sequence[FilePath]
Places = PlaceLike | Sequence[PlaceLike]

One = TypeVar("One", bound=str | PathLike[str] | HubPlace | BinaryIO)
Other = TypeVar("Other")


def several(said: One | Sequence[One]) -> tuple[One, ...]:
    """What is said, as a tuple: one word, path, place or stream is one of them."""
    if isinstance(said, str | PathLike | HubPlace) or hasattr(said, "read"):
        return (cast(One, said),)
    return tuple(said)


def as_path(said: FilePath | Other) -> Path | Other:
    """What names a file as a path; anything else, a stream or None, as it is."""
    return Path(said) if isinstance(said, str | PathLike) else said


def as_paths(said: Files) -> tuple[Path, ...]:
    """Every file that is named."""
    return tuple(as_path(one) for one in several(said))


def as_place(said: PlaceLike | Other) -> Place | Other:
    """What names a model or a patch as a place; anything else, a stream or None, as it is.

    Only text can name the hub: a path says already that it is one. Raises UsageError for an
    "hf://…" that makes no sense.
    """
    return parse_place(said) if isinstance(said, str) else as_path(said)


def as_places(said: Places) -> tuple[Place, ...]:
    """Every place that is named."""
    return tuple(as_place(one) for one in several(said))


def as_output(said: PlaceLike | Other) -> Place | Other:
    """As `as_place`, for what is written: it goes to the hub only where text says "hf://"."""
    return parse_output(said) if isinstance(said, str) else as_path(said)


def check_known(said: Mapping[str, object], allowed: type) -> None:
    """TypeError, as Python raises it, for a keyword that `allowed`, a TypedDict, does not have."""
    for name in said:
        if name not in allowed.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")


def scales_in(text: str) -> dict[str, float]:
    """How much of each concept, as a text field says it: a line "Monet: 0.5" each, 1 if left out.

    Raises UsageError, with the line, for a concept that is there twice.
    """
    found: dict[str, float] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, said = line.rpartition(":")
        try:
            scale = float(said) if colon else 1.0
        except ValueError:
            colon, scale = "", 1.0
        name = name.strip() if colon else line
        if name in found:
            raise UsageError(f"{name!r} is named twice", expected="a line each", found=line)
        found[name] = scale
    return found
