"""The checkpoint that a patch was made from, told by fingerprints."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from patch_spec import limits
from patch_spec.digest import base_digest
from patch_spec.errors import FormatError
from patch_spec.records import Fields, as_digest, as_integer
from patch_spec.text import check_text

Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl", "sdxl-refiner")

_TARGET = re.compile(r"(?:[a-z0-9_]+\.)+attn2\.to_[kv]\.weight")


@dataclass(frozen=True)
class Base:
    """The checkpoint that a patch was made from.

    width: d, of the text embedding. text_encoders: a stream's name ("clip_l") to its fingerprint.
    targets: a target's name in diffusers naming to its fingerprint; shapes: to its [out, d].
    """

    family: Family
    width: int
    text_encoders: Mapping[str, str]
    targets: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def digest(self) -> str:
        """The base's digest; see `base_digest`."""
        return base_digest(self)

    def identity(self) -> dict[str, Any]:
        """What the digest covers: a checkpoint without text encoders can be the same base."""
        return {
            "family": self.family,
            "width": self.width,
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
        fields = Fields(value, ("family", "width", "text_encoders", "targets"), "base")
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
        )


def _target(name: str) -> str:
    if len(name) > limits.TARGET_BYTES or not _TARGET.fullmatch(name):
        raise FormatError(
            "P1",
            "a target must be a cross-attention key or value projection in diffusers naming",
            where="base.targets",
            expected="….attn2.to_k.weight or ….attn2.to_v.weight",
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
