"""What a patch says: frozen values, their JSON, and back.

Round trip: `Manifest.from_text(m.to_text()) == m`. Parsing checks what can be seen in one field
(rules J1 to J9, P1, P2); the rules that tie the parts together are in `validate`.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from patch_spec import limits
from patch_spec.base import Base
from patch_spec.errors import FormatError
from patch_spec.increment import Increment, Summary
from patch_spec.records import Fields, dump_record, load_record

FORMAT = "sepme-patch"

_FIELDS = ("base", "increments", "separable_from", "protected", "tool", "created", "recipe")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a patch says, without its factors.

    separable_from: prompts that no increment changes the keys and values of ("" is the blank),
    beside those of the other increments. protected: prompts that all were made to change little.
    tool: what wrote it, "sepme 0.1.0". created: "2024-01-31T00:00:00Z", only where the maker
    fixed the time. recipe: the SHA-256 of the recipe it was made by.
    """

    base: Base
    increments: tuple[Summary, ...]
    separable_from: tuple[str, ...]
    protected: tuple[str, ...]
    tool: str
    created: str | None = None
    recipe: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest without its `format` and `version`."""
        return {
            "base": self.base.to_json(),
            "increments": [summary.to_json() for summary in self.increments],
            "separable_from": list(self.separable_from),
            "protected": list(self.protected),
            "tool": self.tool,
            "created": self.created,
            "recipe": self.recipe,
        }

    def to_text(self) -> str:
        """The canonical JSON that `__metadata__` holds under `sepme`."""
        return dump_record(FORMAT, self.to_json()).decode()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """A manifest from its canonical JSON; FormatError, rules J1 to J9, P1 and P2."""
        fields = Fields(load_record(text.encode(), FORMAT), _FIELDS, "manifest")
        entries = fields.sequence("increments", limits.INCREMENTS, least=1)
        return cls(
            base=Base.from_json(fields.members["base"]),
            increments=tuple(
                Summary.from_json(entry, f"increments[{index}]")
                for index, entry in enumerate(entries)
            ),
            separable_from=fields.prompts("separable_from", limits.KEPT_PROMPTS),
            protected=fields.prompts("protected", limits.KEPT_PROMPTS),
            tool=fields.word("tool"),
            created=fields.optional("created", lambda name: _moment(fields, name)),
            recipe=fields.optional("recipe", fields.digest),
        )


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A base and the increments made from it, which are kept in the order of their slugs.

    The rest is as of a `Manifest`.
    """

    base: Base
    increments: tuple[Increment, ...]
    separable_from: tuple[str, ...] = ()
    protected: tuple[str, ...] = ()
    tool: str
    created: str | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.increments, key=lambda increment: increment.slug))
        object.__setattr__(self, "increments", ordered)

    @property
    def manifest(self) -> Manifest:
        """All that the patch says, without its factors."""
        return Manifest(
            base=self.base,
            increments=tuple(increment.summary() for increment in self.increments),
            separable_from=self.separable_from,
            protected=self.protected,
            tool=self.tool,
            created=self.created,
            recipe=self.recipe,
        )


def _moment(fields: Fields, name: str) -> str:
    text = fields.word(name)
    try:
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        moment = None
    # strptime also takes 2024-1-1; only one spelling of a moment is canonical.
    if moment is None or moment.strftime("%Y-%m-%dT%H:%M:%SZ") != text:
        raise FormatError(
            "J5",
            "not a time in UTC",
            where=fields.place(name),
            expected="YYYY-MM-DDTHH:MM:SSZ",
            found=ascii(text),
        )
    return text
