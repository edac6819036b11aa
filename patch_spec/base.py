"""The checkpoint that a patch was made from, told by fingerprints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from patch_spec import limits
from patch_spec.digest import base_digest
from patch_spec.errors import FormatError
from patch_spec.records import Fields, as_digest, as_integer
from patch_spec.streams import Stream, stream_of
from patch_spec.text import check_text

Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux", "wan"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux", "wan")

_FIELDS = ("family", "width", "text_encoders", "targets")


@dataclass(frozen=True)
class Base:
    """The checkpoint that a patch was made from.

    width: d, of the rows of the stream `tokens`. text_encoders: a text encoder's name ("clip_l")
    to its fingerprint. targets: a target's name in diffusers naming to its fingerprint; shapes: to
    its [out, d], d the width of the stream that it reads. pooled: the width of the stream
    `pooled`, None where the denoiser reads none.
    """

    family: Family
    width: int
    text_encoders: Mapping[str, str]
    targets: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    pooled: int | None = None

    @property
    def widths(self) -> dict[Stream, int]:
        """How wide each stream is that the denoiser reads."""
        widths: dict[Stream, int] = {"tokens": self.width}
        return widths if self.pooled is None else {**widths, "pooled": self.pooled}

    @property
    def digest(self) -> str:
        """The base's digest; see `base_digest`."""
        return base_digest(self)

    def identity(self) -> dict[str, Any]:
        """What the digest covers: a checkpoint without text encoders can be the same base."""
        pooled = {} if self.pooled is None else {"pooled": self.pooled}
        return {
            "family": self.family,
            "width": self.width,
            **pooled,
            "targets": {
                name: {"fingerprint": fingerprint, "shape": list(self.shapes[name])}
                for name, fingerprint in self.targets.items()
            },
        }

    def to_json(self) -> dict[str, Any]:
        """The manifest's `base`."""
        return {**self.identity(), "text_encoders": dict(self.text_encoders)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """A base from the manifest's `base`."""
        pools = isinstance(value, dict) and "pooled" in value
        fields = Fields(value, (*_FIELDS, "pooled") if pools else _FIELDS, "base")
        encoders = fields.mapping("text_encoders", limits.TEXT_ENCODERS)
        targets = {
            _target(name): Fields(target, ("fingerprint", "shape"), f"base.targets.{name}")
            for name, target in fields.mapping("targets", limits.TARGETS).items()
        }
        return cls(
            family=cast(Family, fields.choice("family", FAMILIES)),
            width=fields.integer("width", 1, limits.WIDTH),
            text_encoders={
                check_text(name, limits.WORD_BYTES, where="base.text_encoders"): as_digest(
                    fingerprint, f"base.text_encoders.{name}"
                )
                for name, fingerprint in encoders.items()
            },
            targets={name: target.digest("fingerprint") for name, target in targets.items()},
            shapes={name: _shape(target) for name, target in targets.items()},
            pooled=fields.integer("pooled", 1, limits.WIDTH) if pools else None,
        )


def _target(name: str) -> str:
    if len(name) > limits.TARGET_BYTES or stream_of(name) is None:
        raise FormatError(
            "P1",
            "a target must be a weight that reads text alone, in diffusers naming",
            where="base.targets",
            expected="….attn2.to_k.weight, ….attn2.to_v.weight, context_embedder.weight, …",
            found=ascii(name)[:80],
        )
    return name


def _shape(target: Fields) -> tuple[int, int]:
    where = target.place("shape")
    out, width = target.sequence("shape", 2, least=2)
    return (
        as_integer(out, 1, limits.OUT, where),
        as_integer(width, 1, limits.WIDTH, where),
    )
