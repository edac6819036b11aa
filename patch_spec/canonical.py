"""Canonical JSON (RFC 8785) and a strict reader of JSON: one value, one text."""

import json
import math
from typing import Any, NoReturn

import rfc8785

from patch_spec.errors import FormatError


def canonical_json(value: Any, *, rule: str = "J6") -> bytes:
    """The RFC 8785 text of `value`, in UTF-8.

    Raises FormatError `rule` for what has none: integers beyond 2**53 - 1, NaN, infinities, lone
    surrogates, values that are not JSON.
    """
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise FormatError(rule, f"no canonical JSON exists for this: {error}") from error


def parse_json_strict(text: bytes, *, syntax: str = "J1", duplicate: str = "J1") -> Any:
    """The value of a JSON text.

    Raises FormatError `syntax` for what is not UTF-8 or not JSON, for a byte order mark, NaN and
    infinities (also by overflow, 1e999), and lone surrogates; `duplicate` for a key that an
    object has twice, at any depth.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, value in pairs:
            if key in members:
                raise FormatError(duplicate, "an object has a key twice", where=ascii(key)[:80])
            members[key] = value
        return members

    def constant(name: str) -> NoReturn:
        raise FormatError(syntax, f"{name} is not JSON")

    def integer(digits: str) -> int | float:
        # To most parsers a float; Python's 0 would lose the sign.
        return -0.0 if digits == "-0" else int(digits)

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise FormatError(syntax, f"the number {digits[:40]} is too large")
        return value

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=number,
            parse_int=integer if b"-0" in text else int,
        )
        if b"\\u" in text:
            # Only an escape can smuggle in half of a surrogate pair; encoding finds it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FormatError(syntax, f"not a JSON text: {error}") from error
    return value
