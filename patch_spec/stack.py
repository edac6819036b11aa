"""The stack record: which increments a patched checkpoint has in it, and on which base."""

from dataclasses import dataclass
from typing import Any, Self, cast

from patch_spec import limits
from patch_spec.base import FAMILIES, Family
from patch_spec.errors import FormatError
from patch_spec.records import Fields, as_digest, dump_record, load_record

FORMAT = "sepme-stack"


@dataclass(frozen=True)
class StackEntry:
    """One increment in a checkpoint, and how often it was added (1.0 is once)."""

    digest: str
    concept: str
    slug: str
    scale: float

    def to_json(self) -> dict[str, Any]:
        """The record's entry."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """An entry of a record; FormatError, rules J3 to J8 and S2."""
        fields = Fields(value, ("digest", "concept", "slug", "scale"), where)
        scale = fields.number("scale")
        if scale == 0:
            raise FormatError(
                "S2", "an increment that was added no times is not there", where=where
            )
        return cls(
            fields.digest("digest"),
            fields.text("concept", limits.CONCEPT_BYTES),
            fields.slug("slug"),
            scale,
        )


@dataclass(frozen=True)
class StackRecord:
    """What `__metadata__["sepme"]` of a patched checkpoint says.

    base: the digest of the base. entries: in the order of their digests, in which they were
    summed. tool: what wrote the checkpoint. patches: SHA-256 of the patch files, in order.
    """

    base: str
    family: Family
    entries: tuple[StackEntry, ...]
    tool: str
    patches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.entries, key=lambda entry: entry.digest))
        object.__setattr__(self, "entries", ordered)
        object.__setattr__(self, "patches", tuple(sorted(self.patches)))

    def to_metadata(self) -> str:
        """The record's canonical JSON; FormatError if the record breaks a rule."""
        text = self._text()
        StackRecord.from_metadata(text)
        return text

    @classmethod
    def from_metadata(cls, text: str) -> Self:
        """A record from its canonical JSON; FormatError, rules J1 to J9, S1 and S2."""
        fields = Fields(
            load_record(text.encode(), FORMAT),
            ("base", "family", "increments", "patches", "tool"),
            "stack",
        )
        entries = fields.sequence("increments", limits.STACK_ENTRIES, least=1)
        patches = fields.sequence("patches", limits.STACK_ENTRIES)
        record = cls(
            fields.digest("base"),
            cast(Family, fields.choice("family", FAMILIES)),
            tuple(
                StackEntry.from_json(entry, f"stack.increments[{index}]")
                for index, entry in enumerate(entries)
            ),
            fields.word("tool"),
            tuple(as_digest(patch, "stack.patches") for patch in patches),
        )
        digests = [entry.digest for entry in record.entries]
        unique = len(set(digests)) == len(digests) and len(set(patches)) == len(patches)
        if not unique or record._text() != text:
            raise FormatError(
                "S1", "increments and patches must be in the order of their digests, each once"
            )
        return record

    def _text(self) -> str:
        members = {
            "base": self.base,
            "family": self.family,
            "increments": [entry.to_json() for entry in self.entries],
            "patches": list(self.patches),
            "tool": self.tool,
        }
        return dump_record(FORMAT, members).decode()
