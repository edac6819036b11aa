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
class Collateral:
    """How far the keys and values of what took no part in an erasure move, as shares of what they
    are.

    captions: how many were looked at. median, p95: of them. worst: the words that move furthest.
    """

    captions: int
    median: float
    p95: float
    worst: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The `collateral` of an increment's `measured`."""
        return {**vars(self), "worst": dict(self.worst)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Collateral from the `collateral` of an increment's `measured`."""
        fields = Fields(value, tuple(cls.__dataclass_fields__), where)
        place = fields.place("worst")
        return cls(
            captions=fields.count("captions"),
            median=fields.number("median"),
            p95=fields.number("p95"),
            worst={
                check_text(word, limits.CONCEPT_BYTES, where=place): float(as_number(far, place))
                for word, far in fields.mapping("worst", limits.WORST).items()
            },
        )


@dataclass(frozen=True)
class Measurements:
    """What was measured while an increment was made; None for what was not.

    correlation_start, correlation_end: of the concept's representation with the original's,
    normalised. leakage: the largest relative change of a prompt it is separable from.
    separability: how much of the concept lies outside the protected span, 0 to 1.
    steps: of the optimisation. stopped: why it ended. collateral: of this increment alone.
    """

    correlation_start: float | None = None
    correlation_end: float | None = None
    leakage: float | None = None
    separability: float | None = None
    steps: int | None = None
    stopped: str | None = None
    collateral: Collateral | None = None

    def to_json(self) -> dict[str, Any]:
        """The increment's `measured`; `collateral` is there only where it was measured."""
        fields = {name: value for name, value in vars(self).items() if name != "collateral"}
        beside = {} if self.collateral is None else {"collateral": self.collateral.to_json()}
        return {**fields, **beside}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """What was measured, from an increment's `measured`."""
        told = isinstance(value, dict) and "collateral" in value
        names = [name for name in cls.__dataclass_fields__ if told or name != "collateral"]
        fields = Fields(value, names, where)
        return cls(
            correlation_start=fields.optional("correlation_start", fields.number),
            correlation_end=fields.optional("correlation_end", fields.number),
            leakage=fields.optional("leakage", fields.number),
            separability=fields.optional("separability", fields.number),
            steps=fields.optional("steps", fields.count),
            stopped=fields.optional("stopped", fields.word),
            collateral=Collateral.from_json(
                fields.members["collateral"], fields.place("collateral")
            )
            if told
            else None,
        )


def _setting(value: Any, where: str) -> Setting:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(value, limits.PROMPT_BYTES, least=0, where=where)
    return as_number(value, where)
