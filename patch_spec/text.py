"""Texts that can be compared, printed and used as names: concepts, prompts, slugs."""

import re
import unicodedata
from collections.abc import Container
from hashlib import sha256

from patch_spec import limits
from patch_spec.errors import FormatError

# Control characters, line separators, bidirectional overrides and halves of surrogate pairs. By
# code point and not by Unicode category, which would change with the Unicode version at hand.
FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def check_text(text: str, most: int, *, least: int = 1, where: str) -> str:
    """`text`, if rule J5 allows it: `least` to `most` bytes of UTF-8, NFC, nothing FORBIDDEN."""
    if found := FORBIDDEN.search(text):
        raise FormatError(
            "J5",
            "a text holds a control character",
            where=where,
            found=f"U+{ord(found.group()):04X}",
        )
    if not least <= len(text.encode()) <= most:
        raise FormatError(
            "J5",
            "a text has the wrong length",
            where=where,
            expected=f"{least} to {most} bytes of UTF-8",
            found=len(text.encode()),
        )
    if not unicodedata.is_normalized("NFC", text):
        raise FormatError("J5", "a text is not in Unicode normalisation form C", where=where)
    return text


def clean_text(text: str, most: int = limits.PROMPT_BYTES) -> str:
    """What a user typed as the format keeps it: NFC, outer white space off.

    Raises FormatError J5 for what cannot be kept: nothing left, control characters, too long.
    """
    return check_text(unicodedata.normalize("NFC", text).strip(), most, where="text")


def slugify(concept: str) -> str:
    """A short name of `concept` for files and tensors: "Vincent van Gogh" is vincent-van-gogh.

    A concept without Latin letters or digits gets a name from its digest.
    """
    latin = unicodedata.normalize("NFKD", concept).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", latin).strip("-")[: limits.SLUG_LENGTH].rstrip("-")
    return slug or f"concept-{sha256(concept.encode()).hexdigest()[:8]}"


def unique_slug(concept: str, taken: Container[str]) -> str:
    """`slugify(concept)`, with -2, -3, … where `taken` has it already."""
    slug, number = slugify(concept), 1
    candidate = slug
    while candidate in taken:
        number += 1
        suffix = f"-{number}"
        candidate = slug[: limits.SLUG_LENGTH - len(suffix)] + suffix
    return candidate
