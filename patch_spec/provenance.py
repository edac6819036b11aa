"""How an increment was made, and what was measured on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from patch_spec import limits
from patch_spec.records import Fields, as_number
from patch_spec.text import check_text

Setting = int | float | str | bool | None


@dataclass(frozen=True)
class Method:
    """How an increment was made. settings: every hyper-parameter, the seed among them."""

    name: str
    settings: Mapping[str, Setting]

    def to_json(self) -> dict[str, Any]:
        """The increment's `method`."""
        return {"name": self.name, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """A method from an increment's `method`."""
        fields = Fields(value, ("name", "settings"), where)
        settings = fields.mapping("settings", limits.SETTINGS)
        return cls(
            fields.word("name"),
            {
                check_text(name, limits.WORD_BYTES, where=where): _setting(
                    setting, f"{where}.settings.{name}"
                )
                for name, setting in settings.items()
            },
        )


@dataclass(frozen=True)
class Measured:
    """What was measured while an increment was made; None for what was not.

    correlation_start, correlation_end: of the concept's representation with the original's,
    normalised. leakage: the largest relative change of a prompt it is separable from.
    separability: how much of the concept lies outside the protected span, 0 to 1.
    steps: of the optimisation. stopped: why it ended.
    """

    correlation_start: float | None = None
    correlation_end: float | None = None
    leakage: float | None = None
    separability: float | None = None
    steps: int | None = None
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The increment's `measured`."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """What was measured, from an increment's `measured`."""
        fields = Fields(value, tuple(cls.__dataclass_fields__), where)
        return cls(
            correlation_start=fields.optional("correlation_start", fields.number),
            correlation_end=fields.optional("correlation_end", fields.number),
            leakage=fields.optional("leakage", fields.number),
            separability=fields.optional("separability", fields.number),
            steps=fields.optional("steps", fields.count),
            stopped=fields.optional("stopped", fields.word),
        )


def _setting(value: Any, where: str) -> Setting:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(value, limits.PROMPT_BYTES, least=0, where=where)
    return as_number(value, where)
