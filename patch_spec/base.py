"""The checkpoint that a patch was made from, told by fingerprints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

from patch_spec import limits
from patch_spec.digest import base_digest
from patch_spec.errors import FormatError
from patch_spec.records import Fields, as_digest, as_integer
from patch_spec.streams import Stream, network_of, stream_of
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
    `pooled`, None where the denoiser reads none. layers, layer_shapes: the same of the layers that
    increments of the patch change, [out, in].
    """

    family: Family
    width: int
    text_encoders: Mapping[str, str]
    targets: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    pooled: int | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    layer_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

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
        """What the digest covers: a checkpoint without text encoders can be the same base, and
        patches that change different layers are for one."""
        pooled = {} if self.pooled is None else {"pooled": self.pooled}
        return {
            "family": self.family,
            "width": self.width,
            **pooled,
            "targets": _described(self.targets, self.shapes),
        }

    def to_json(self) -> dict[str, Any]:
        """The manifest's `base`."""
        layers = {"layers": _described(self.layers, self.layer_shapes)} if self.layers else {}
        return {**self.identity(), **layers, "text_encoders": dict(self.text_encoders)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """A base from the manifest's `base`."""
        found = [name for name in ("pooled", "layers") if isinstance(value, dict) and name in value]
        fields = Fields(value, (*_FIELDS, *found), "base")
        encoders = fields.mapping("text_encoders", limits.TEXT_ENCODERS)
        targets = {
            _target(name): Fields(target, ("fingerprint", "shape"), f"base.targets.{name}")
            for name, target in fields.mapping("targets", limits.TARGETS).items()
        }
        layers = {
            check_layer(name, "base.layers"): Fields(
                layer, ("fingerprint", "shape"), f"base.layers.{name}"
            )
            for name, layer in (
                fields.mapping("layers", limits.LAYERS, least=1) if "layers" in found else {}
            ).items()
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
            shapes={
                name: _shape(target, limits.OUT, limits.WIDTH) for name, target in targets.items()
            },
            pooled=fields.integer("pooled", 1, limits.WIDTH) if "pooled" in found else None,
            layers={name: layer.digest("fingerprint") for name, layer in layers.items()},
            layer_shapes={
                name: _shape(layer, limits.LAYER_SIDE, limits.LAYER_SIDE)
                for name, layer in layers.items()
            },
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


def check_layer(name: str, where: str) -> str:
    """The name, which a layer can have; FormatError P1."""
    if len(name) > limits.TARGET_BYTES or network_of(name) is None:
        raise FormatError(
            "P1",
            "a layer must be another weight of the denoiser, in diffusers naming, or of a text "
            "encoder of CLIP's kind, in transformers'",
            where=where,
            expected="….attn.to_q.weight, clip_l.encoder.layers.0.mlp.fc1.weight, …",
            found=ascii(name)[:80],
        )
    return name


def _shape(target: Fields, most_rows: int, most_columns: int) -> tuple[int, int]:
    where = target.place("shape")
    out, width = target.sequence("shape", 2, least=2)
    return as_integer(out, 1, most_rows, where), as_integer(width, 1, most_columns, where)


def _described(
    fingerprints: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, Any]]:
    return {
        name: {"fingerprint": fingerprint, "shape": list(shapes[name])}
        for name, fingerprint in fingerprints.items()
    }
