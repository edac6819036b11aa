"""How things are put into words: results and errors as JSON, text from anywhere, units."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from sepme_cli.errors import SepmeError


def to_json(value: Any) -> Any:
    """A result as what json can write: dataclasses as objects with the names of their fields.

    A number that is not finite becomes null, for JSON has no word for it.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_text(result: Any, *, warnings: Sequence[str] = ()) -> str:
    """The JSON object of a result, with every warning of the run; ASCII, so it always prints."""
    return json.dumps({**to_json(result), "warnings": list(warnings)}, allow_nan=False, indent=2)


def error_json(error: SepmeError) -> str:
    """The JSON object of an error."""
    fields = {name: getattr(error, name) for name in ("message", "file", "expected", "found")}
    return json.dumps({"error": {"kind": error.kind, **fields}}, indent=2)


def error_text(error: SepmeError) -> Text:
    """The message, and below it what it does not say itself: the file, and the comparison."""
    sides = (error.expected, error.found)
    compared = any(side is not None and side not in error.message for side in sides)
    below = (
        ("file", error.file if error.file and error.file not in error.message else None),
        ("expected", error.expected if compared else None),
        ("found", error.found if compared else None),
    )
    lines = [f"  {name + ':':10}{value}" for name, value in below if value is not None]
    return printable("\n".join([error.message, *lines]))


def printable(text: str) -> Text:
    """Text from anywhere, harmless to a terminal: what cannot be printed is shown escaped."""
    return Text("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


def duration(seconds: float) -> str:
    """0.8 s, 12 s, 3 min 20 s, 1 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count: int) -> str:
    """512 bytes, 412 KiB, 2.0 GiB."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 999.5:
            return (
                f"{amount:.0f} {unit}"
                if amount >= 9.95 or unit == "bytes"
                else f"{amount:.1f} {unit}"
            )
        amount /= 1024
    return f"{amount:.1f} GiB"
