"""The stack record: which increments a patched checkpoint has in it, and on which base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

from patch_spec import limits
from patch_spec.base import FAMILIES, Family, check_layer
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
    summed. tool: what wrote the checkpoint. patches: SHA-256 of the patch files, in order. layers:
    those that the increments change, to the fingerprints that they have in the base.
    """

    base: str
    family: Family
    entries: tuple[StackEntry, ...]
    tool: str
    patches: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict, hash=False)

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
        """A record from its canonical JSON; FormatError, rules J1 to J9, P1, S1 and S2."""
        members = load_record(text.encode(), FORMAT)
        known = ("base", "family", "increments", "patches", "tool")
        fields = Fields(members, (*known, *(["layers"] if "layers" in members else [])), "stack")
        layers = fields.mapping("layers", limits.LAYERS, least=1) if "layers" in members else {}
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
            {
                check_layer(name, "stack.layers"): as_digest(fingerprint, f"stack.layers.{name}")
                for name, fingerprint in layers.items()
            },
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
            **({"layers": dict(self.layers)} if self.layers else {}),
        }
        return dump_record(FORMAT, members).decode()
