"""Reading the JSON records of the format: manifest, stack record, undo record (rules J1 to J9).

Every reader here takes a field by name and returns it typed, or raises a FormatError that says
which field is wrong; nothing is converted, guessed or left out.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from patch_spec import limits
from patch_spec.canonical import canonical_json, parse_json_strict
from patch_spec.errors import FormatError
from patch_spec.text import SLUG, check_text

T = TypeVar("T")

_DIGEST = re.compile(r"[0-9a-f]{64}")


def load_record(text: bytes, name: str) -> dict[str, Any]:
    """The members of a record, without its `format` and `version`.

    name: what `format` must say. Raises FormatError, rules J1, J2, J6 and J9.
    """
    record = parse_json_strict(text)
    if not isinstance(record, dict):
        raise FormatError("J1", "a record must be a JSON object", where=name)
    if canonical_json(record) != text:
        raise FormatError("J2", "the record is not canonical JSON (RFC 8785)", where=name)
    found = record.pop("format", None), record.pop("version", None)
    # type(), because in Python True == 1 and 1.0 == 1.
    if found != (name, limits.FORMAT_VERSION) or type(found[1]) is not int:
        raise FormatError(
            "J9",
            "this is a format or a version that this reader does not know; a newer tool may",
            expected=f"{name} {limits.FORMAT_VERSION}",
            found=" ".join(repr(part)[:40] for part in found),
        )
    return record


def dump_record(name: str, members: Mapping[str, Any]) -> bytes:
    """The canonical text of a record, its `format` and `version` put in."""
    return canonical_json({"format": name, "version": limits.FORMAT_VERSION, **members})


class Fields:
    """The members of one JSON object that has exactly the fields `names` (rules J3 to J8)."""

    def __init__(self, value: Any, names: Sequence[str], where: str) -> None:
        self.where = where
        self.members = as_object(value, where)
        if unknown := sorted(set(self.members) - set(names)):
            raise FormatError("J3", "unknown field", where=where, found=ascii(unknown[0])[:80])
        if missing := sorted(set(names) - set(self.members)):
            raise FormatError("J3", "missing field", where=where, expected=missing[0])

    def place(self, name: str) -> str:
        """How errors call the field `name`."""
        return f"{self.where}.{name}"

    def optional(self, name: str, reader: Callable[[str], T]) -> T | None:
        """null, or what `reader` makes of the field."""
        return None if self.members[name] is None else reader(name)

    def choice(self, name: str, options: Sequence[str]) -> str:
        """One of `options`."""
        value = as_text(self.members[name], self.place(name))
        if value not in options:
            raise FormatError(
                "J4",
                "unknown value",
                where=self.place(name),
                expected=" or ".join(options),
                found=ascii(value)[:80],
            )
        return value

    def text(self, name: str, most: int) -> str:
        """A text of 1 to `most` bytes."""
        return check_text(
            as_text(self.members[name], self.place(name)), most, where=self.place(name)
        )

    def word(self, name: str) -> str:
        """A text of 1 to 64 bytes."""
        return self.text(name, limits.WORD_BYTES)

    def slug(self, name: str) -> str:
        """A short name of a concept, which files and tensors are called by."""
        value = self.word(name)
        if not SLUG.fullmatch(value):
            raise FormatError(
                "P2",
                "a slug must be 1 to 64 of a-z, 0-9 and -, and not begin with -",
                where=self.place(name),
                found=ascii(value),
            )
        return value

    def prompts(
        self, name: str, most: int, *, least: int = 0, shortest: int = 0
    ) -> tuple[str, ...]:
        """A list of `least` to `most` texts, each of `shortest` to 2000 bytes."""
        where = self.place(name)
        return tuple(
            check_text(as_text(item, where), limits.PROMPT_BYTES, least=shortest, where=where)
            for item in self.sequence(name, most, least=least)
        )

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return as_integer(self.members[name], low, high, self.place(name))

    def count(self, name: str) -> int:
        """A whole number from 0 to 2**53 - 1."""
        return self.integer(name, 0, limits.SAFE_INTEGER)

    def number(self, name: str) -> float:
        """A number of magnitude at most 2**53 - 1."""
        return float(as_number(self.members[name], self.place(name)))

    def digest(self, name: str) -> str:
        """A SHA-256 in hexadecimal."""
        return as_digest(self.members[name], self.place(name))

    def sequence(self, name: str, most: int, *, least: int = 0) -> list[Any]:
        """A list of `least` to `most` items."""
        value = self.members[name]
        if not isinstance(value, list):
            raise _wrong_type("a list", value, self.place(name))
        _check_count(len(value), least, most, self.place(name))
        return value

    def mapping(self, name: str, most: int, *, least: int = 0) -> dict[str, Any]:
        """An object of `least` to `most` members."""
        value = as_object(self.members[name], self.place(name))
        _check_count(len(value), least, most, self.place(name))
        return value


def as_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, an object."""
    if not isinstance(value, dict):
        raise _wrong_type("an object", value, where)
    return value


def as_text(value: Any, where: str) -> str:
    """`value`, a text."""
    if not isinstance(value, str):
        raise _wrong_type("a text", value, where)
    return value


def as_integer(value: Any, low: int, high: int, where: str) -> int:
    """`value`, a whole number from `low` to `high`."""
    if type(value) is not int:
        raise _wrong_type("a whole number", value, where)
    if not low <= value <= high:
        raise FormatError(
            "J6", "a number is out of range", where=where, expected=f"{low} to {high}", found=value
        )
    return value


def as_number(value: Any, where: str) -> int | float:
    """`value`, a number of magnitude at most 2**53 - 1.

    Beyond it a whole float and an integer have one JSON text and not one value.
    """
    if type(value) is not int and type(value) is not float:
        raise _wrong_type("a number", value, where)
    if not abs(value) <= limits.SAFE_INTEGER:
        raise FormatError(
            "J6", "a number is out of range", where=where, expected="up to 2**53 - 1", found=value
        )
    return value


def as_digest(value: Any, where: str) -> str:
    """`value`, a SHA-256 in hexadecimal."""
    text = as_text(value, where)
    if not _DIGEST.fullmatch(text):
        raise FormatError(
            "J8",
            "a digest must be 64 lower-case hexadecimal digits",
            where=where,
            found=ascii(text)[:80],
        )
    return text


def _check_count(count: int, least: int, most: int, where: str) -> None:
    if not least <= count <= most:
        raise FormatError(
            "J7",
            "the number of entries is out of range",
            where=where,
            expected=f"{least} to {most}",
            found=count,
        )


def _wrong_type(expected: str, value: Any, where: str) -> FormatError:
    return FormatError(
        "J4",
        "a field has the wrong type",
        where=where,
        expected=expected,
        found=ascii(value)[:80],
    )
