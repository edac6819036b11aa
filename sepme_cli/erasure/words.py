"""Concepts and words as users name them."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from patch_spec import limits
from patch_spec.errors import FormatError
from patch_spec.text import clean_text, slugify
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.errors import UsageError

_ACCENTS = re.compile("[\u0300-\u036f]")
_JOINTS = re.compile(r"[\s_-]+")


def same_name(name: str) -> str:
    """What two spellings of one name have in common: no case, no accents on Latin letters, and any
    joint for a space. "C++" and "C#" are two names, though their slugs are one."""
    bare = _ACCENTS.sub("", unicodedata.normalize("NFKD", name))
    return _JOINTS.sub(" ", unicodedata.normalize("NFC", bare)).strip().casefold()


def parse_word(word: str, kind: AsKind) -> tuple[str, AsKind]:
    """A word as a user names it and what it is: "style:noto", "object:cat", or a bare word, which
    is of the given kind. Raises FormatError J5 for text that a patch cannot hold."""
    prefix, colon, name = word.partition(":")
    if colon and prefix in ("style", "object"):
        return clean_text(name, limits.CONCEPT_BYTES), cast(AsKind, prefix)
    return clean_text(word, limits.CONCEPT_BYTES), kind


def given_name(text: str, option: str) -> str:
    """A concept's name as the format keeps it. option: where it was given.

    Raises UsageError, with the option, for one that it cannot keep.
    """
    with _given(option):
        return clean_text(text, limits.CONCEPT_BYTES)


def given_word(word: str, kind: AsKind, option: str) -> tuple[str, AsKind]:
    """As `parse_word`, and raises UsageError, with the option, as `given_name` does."""
    with _given(option):
        return parse_word(word, kind)


@contextmanager
def _given(option: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise UsageError(
            f"{option}: {error.message.replace('a text', 'the name', 1)}",
            expected=error.expected or "a name without control characters",
            found=error.found,
        ) from error


@dataclass(frozen=True)
class Item:
    """One concept to take out.

    aliases: other names of the same concept. prompts: further phrases that ask for it, its name
    in them. like: what it should act like instead; None leaves that to the method. weights: of
    aliases that are less certainly the concept, in (0, 1]; others have 1. erase_from: the one thing
    that loses the concept, which is then an attribute ("red" from "apple"); None for everything.
    """

    name: str
    kind: AsKind = "any"
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    like: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    erase_from: str | None = None

    @classmethod
    def parse(
        cls,
        word: str,
        kind: AsKind = "any",
        like: str | None = None,
        erase_from: str | None = None,
    ) -> "Item":
        """A concept as the command line names it; see `given_word`, for like and erase_from as
        well."""
        name, kind = given_word(word, kind, "--concept")
        to, thing = (
            None if said is None else given_word(said, kind, option)[0]
            for said, option in ((like, "--to"), (erase_from, "--from"))
        )
        return cls(name, kind, like=to, erase_from=thing)

    @property
    def label(self) -> str:
        """What its increment goes by: its name, and the one thing that loses it."""
        return self.name if self.erase_from is None else f"{self.name} from {self.erase_from}"

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases."""
        return (self.name, *self.aliases)

    @property
    def slug(self) -> str:
        """What its increment is called in a patch."""
        return slugify(self.label)


def conflict(items: Sequence[Item]) -> tuple[Item, str, str] | None:
    """The first concept that cannot be erased beside the others, why in words, and what is in its
    way; None if all can.

    Two increments for one concept would fight over it, and neither an anchor nor the thing that
    loses an attribute may be erased itself.
    """
    seen: dict[tuple[str, str], str] = {}
    for item in items:
        thing = "" if item.erase_from is None else same_name(item.erase_from)
        for name in dict.fromkeys(map(same_name, item.names)):
            if (name, thing) in seen:
                return item, f"{name!r} is named twice, by two concepts", seen[name, thing]
            seen[name, thing] = item.label
    for item in items:
        own = {same_name(name): item.label for name in item.names}
        gone = own | {name: label for (name, thing), label in seen.items() if not thing}
        if item.like is not None and (erased := gone.get(same_name(item.like))):
            told = f"{item.like!r}, the anchor of {item.label!r}, is erased itself"
            return item, told, erased
        if item.erase_from is None:
            continue
        if erased := gone.get(same_name(item.erase_from)):
            told = f"{item.erase_from!r}, which loses {item.name!r}, is erased itself"
            return item, told, erased
        for name in own:
            if (name, "") in seen:
                told = f"{name!r} is erased from one thing and from everything"
                return item, told, seen[name, ""]
        if len(item.label.encode()) > limits.CONCEPT_BYTES:
            return item, f"{item.label[:60]!r} is too long a name for an increment", item.name
    return None
