"""Taking a valid patch apart, changing one thing, and putting it together again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patch_spec.canonical import canonical_json
from patch_spec.cases.examples import small_patch
from patch_spec.container import assemble
from patch_spec.header import PREFIX_BYTES
from patch_spec.increment import Increment
from patch_spec.manifest import Patch

Members = dict[str, Any]
Change = Callable[[Members], object]


@dataclass(frozen=True)
class Invalid:
    """A file that breaks a rule, and `about`: what is wrong with it, in a few words with dashes.

    kind: "patch", "stack" (a checkpoint with a stack record), "undo" (a journal) or "weights".
    What has to break several rules names the one that comes first in reading.
    """

    rule: str
    about: str
    data: bytes
    kind: str = "patch"


def put(*path: str | int, to: Any) -> Change:
    """A change that sets the member at `path`."""

    def change(members: Any) -> None:
        for step in path[:-1]:
            members = members[step]
        members[path[-1]] = to

    return change


def drop(*path: str | int) -> Change:
    """A change that takes the member at `path` out."""

    def change(members: Any) -> None:
        for step in path[:-1]:
            members = members[step]
        del members[path[-1]]

    return change


def raw(text: bytes, data: bytes = b"") -> bytes:
    """A file with this header text, padded to eight bytes."""
    text = text.ljust(len(text) + -len(text) % PREFIX_BYTES)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text + data


def parts(file: bytes) -> tuple[Members, bytes]:
    """The members of a file's header, and its data section."""
    start = PREFIX_BYTES + int.from_bytes(file[:PREFIX_BYTES], "little")
    members: Members = json.loads(file[PREFIX_BYTES:start])
    return members, file[start:]


def with_header(change: Change, *increments: Increment, of: Patch | None = None) -> bytes:
    """A small patch, or another, the members of its header changed."""
    members, data = parts(assemble(of or small_patch(*increments)))
    change(members)
    return raw(canonical_json(members), data)


def with_text(
    change: Callable[[str], str], *increments: Increment, of: Patch | None = None
) -> bytes:
    """A small patch, or another, the text of its manifest changed."""

    def change_text(members: Members) -> None:
        metadata = members["__metadata__"]
        metadata["sepme"] = change(metadata["sepme"])

    return with_header(change_text, *increments, of=of)


def with_manifest(change: Change, *increments: Increment, of: Patch | None = None) -> bytes:
    """A small patch, or another, the members of its manifest changed and written canonically."""

    def change_members(text: str) -> str:
        members = json.loads(text)
        change(members)
        return canonical_json(members).decode()

    return with_text(change_members, *increments, of=of)
