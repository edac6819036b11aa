"""Concepts and words as users name them."""

import re
import unicodedata
from dataclasses import dataclass
from typing import cast

from patch_spec import limits
from patch_spec.text import clean_text, slugify
from sepme_cli.erasure.prompts import AsKind

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


@dataclass(frozen=True)
class Item:
    """One concept to take out.

    aliases: other names of the same concept. prompts: further phrases that ask for it, its name
    in them. like: what it should act like instead; None leaves that to the method.
    """

    name: str
    kind: AsKind = "any"
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    like: str | None = None

    @classmethod
    def parse(cls, word: str, kind: AsKind = "any", like: str | None = None) -> "Item":
        """A concept as the command line names it; see `parse_word`, for like as well."""
        name, kind = parse_word(word, kind)
        return cls(name, kind, like=None if like is None else parse_word(like, kind)[0])

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases."""
        return (self.name, *self.aliases)

    @property
    def slug(self) -> str:
        """What its increment is called in a patch."""
        return slugify(self.name)
