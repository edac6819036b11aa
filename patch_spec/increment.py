"""One concept's increment: what is said of it, its factors, and its digest.

Round trip: `Summary.from_json(s.to_json(), where) == s`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, Self, cast

import numpy.typing as npt

from patch_spec import limits
from patch_spec.digest import increment_digest
from patch_spec.grid import Float16, Float32
from patch_spec.mask import Gaps, Masked
from patch_spec.provenance import Measurements, Method
from patch_spec.records import Fields, as_integer
from patch_spec.streams import Stream, network_of, stream_of

Kind = Literal["additive", "lora", "mask", "operator"]
KINDS: tuple[Kind, ...] = ("additive", "lora", "mask", "operator")

_COMMON = ("concept", "slug", "digest", "kind", "rank", "prompts", "method", "measured")


@dataclass(frozen=True)
class Factors:
    """What an increment does to one stream: of an additive increment or an operator.

    basis: float32 [r, d] on the grid, d the stream's width. shift: float32 [d, r] on the grid, of
    an operator only, whose scale is 2**exponent; else None and 0.
    """

    basis: Float32
    shift: Float32 | None = None
    exponent: int = 0


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that a manifest says of an increment but its digest.

    prompts: what stands for the concept. rank: r, of the stream `tokens`; 0 for an increment that
    leaves it alone. exponents: by target or layer, of an additive increment or a lora. masks: by
    layer, of a mask. shift_exponent: of an operator, else 0. pooled_rank, pooled_exponent: the same
    two of the stream `pooled`; the rank is 0 for an increment that leaves it alone, and for a lora,
    whose rank is that of all its targets.
    """

    concept: str
    slug: str
    kind: Kind
    rank: int
    prompts: tuple[str, ...]
    method: Method
    measured: Measurements
    exponents: Mapping[str, int]
    shift_exponent: int = 0
    pooled_rank: int = 0
    pooled_exponent: int = 0
    masks: Mapping[str, Masked] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that the increment changes, in order: of a lora or a mask alone."""
        changed = (*self.exponents, *self.masks)
        return tuple(sorted(name for name in changed if network_of(name) is not None))

    def describe(self) -> dict[str, Any]:
        """The manifest's entry without its digest."""
        operator = self.kind == "operator"
        scale: dict[str, Any] = {"exponents": dict(self.exponents)}
        if operator:
            scale = {"shift_exponent": self.shift_exponent}
        elif self.kind == "mask":
            scale = {"masks": {layer: mask.to_json() for layer, mask in self.masks.items()}}
        if self.pooled_rank:
            pooled = {"shift_exponent": self.pooled_exponent} if operator else {}
            scale["pooled"] = {"rank": self.pooled_rank, **pooled}
        return {
            "concept": self.concept,
            "slug": self.slug,
            "kind": self.kind,
            "rank": self.rank,
            "prompts": list(self.prompts),
            "method": self.method.to_json(),
            "measured": self.measured.to_json(),
            **scale,
        }


@dataclass(frozen=True, kw_only=True)
class Summary(Description):
    """An increment as the manifest alone tells it, without its factors."""

    digest: str

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {**self.describe(), "digest": self.digest}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """A summary from the manifest's entry; where: what errors call it."""
        kind = value.get("kind") if isinstance(value, dict) else None
        operator, mask = kind == "operator", kind == "mask"
        scale = "shift_exponent" if operator else "masks" if mask else "exponents"
        pools = isinstance(value, dict) and "pooled" in value and not mask
        fields = Fields(value, (*_COMMON, scale, *(["pooled"] if pools else [])), where)
        pooled = _pooled(fields, operator) if pools else (0, 0)
        return cls(
            concept=fields.text("concept", limits.CONCEPT_BYTES),
            slug=fields.slug("slug"),
            kind=cast(Kind, fields.choice("kind", KINDS)),
            rank=fields.integer("rank", 0 if pools or mask else 1, 0 if mask else limits.RANK),
            prompts=fields.prompts("prompts", limits.PROMPTS, least=1, shortest=1),
            method=Method.from_json(fields.members["method"], fields.place("method")),
            measured=Measurements.from_json(fields.members["measured"], fields.place("measured")),
            exponents={} if operator or mask else _exponents(fields),
            shift_exponent=_exponent(fields.members[scale], fields.place(scale)) if operator else 0,
            pooled_rank=pooled[0],
            pooled_exponent=pooled[1],
            masks=_masks(fields) if mask else {},
            digest=fields.digest("digest"),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Increment(Description):
    """What one concept's erasure does to the base.

    basis: float32 [rank, d] on the grid. An additive increment has `up`, float16 [out, rank] by
    target, and `exponents` for the same targets: dW = up @ basis * 2**exponent. An operator has
    `shift`, float32 [d, rank] on the grid: dW = W @ shift @ basis * 2**shift_exponent. Of a lora
    every target, which may also be a layer, has a basis of its own, `down`, float32 [rank, d] on
    the grid: dW = up @ down * 2**exponent; its `basis`, what all targets share, has no rows.
    pooled_basis, pooled_shift: what targets that read the stream `pooled` have in their place.
    A mask has `gaps`, uint8 [n] by layer, for the same layers as `masks`: which weights it makes
    zero. It adds nothing.
    Two increments are equal if their slugs and their digests are.
    """

    basis: Float32
    up: Mapping[str, Float16]
    shift: Float32 | None = None
    down: Mapping[str, Float32] = field(default_factory=dict)
    pooled_basis: Float32 | None = None
    pooled_shift: Float32 | None = None
    gaps: Mapping[str, Gaps] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """The increment's digest; see `increment_digest`."""
        return increment_digest(self)

    @property
    def factors(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by the names they have in a patch, without the slug."""
        factors: dict[str, npt.NDArray[Any]] = {}
        for prefix, found in (("", self.on("tokens")), ("pooled.", self.on("pooled"))):
            if found is not None:
                factors[f"{prefix}basis"] = found.basis
                if found.shift is not None:
                    factors[f"{prefix}shift"] = found.shift
        factors |= {f"mask.{layer}": gaps for layer, gaps in self.gaps.items()}
        factors |= {f"down.{target}": down for target, down in self.down.items()}
        return factors | {f"up.{target}": up for target, up in self.up.items()}

    def on(self, stream: Stream) -> Factors | None:
        """What the increment does to a stream; None where it leaves it alone, and of a lora or a
        mask."""
        if self.kind == "lora":
            return None
        if stream == "tokens":
            return Factors(self.basis, self.shift, self.shift_exponent) if self.rank else None
        if self.pooled_basis is None:
            return None
        return Factors(self.pooled_basis, self.pooled_shift, self.pooled_exponent)

    def acts_on(self, target: str) -> bool:
        """Whether the increment changes a target. An operator mentions none: it changes all that
        read its streams."""
        if self.kind != "operator":
            return target in self.up or target in self.gaps
        stream = stream_of(target)
        return stream is not None and self.on(stream) is not None

    def basis_of(self, target: str) -> Float32:
        """The rows [rank, d] that dW of a target which the increment adds to is made of."""
        if self.kind == "lora":
            return self.down[target]
        stream = stream_of(target)
        found = None if stream is None else self.on(stream)
        assert found is not None  # it acts on the target
        return found.basis

    def identity(self) -> dict[str, Any]:
        """What the digest covers. Not the slug: a new file name makes no new increment."""
        description = self.describe()
        del description["slug"]
        tensors = {
            name: {"shape": list(array.shape), "sha256": _array_digest(array)}
            for name, array in self.factors.items()
        }
        return {"increment": description, "tensors": tensors}

    def summary(self) -> Summary:
        """The increment as the manifest tells it."""
        return Summary(
            **{name: getattr(self, name) for name in Description.__dataclass_fields__},
            digest=self.digest,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Increment):
            return NotImplemented
        return (self.slug, self.digest) == (other.slug, other.digest)

    def __hash__(self) -> int:
        return hash((self.slug, self.digest))


def _array_digest(array: npt.NDArray[Any]) -> str:
    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return sha256(little_endian.tobytes(order="C")).hexdigest()


def _pooled(fields: Fields, operator: bool) -> tuple[int, int]:
    """The rank and the exponent of the stream `pooled`."""
    names = ("rank", "shift_exponent") if operator else ("rank",)
    own = Fields(fields.members["pooled"], names, fields.place("pooled"))
    where = own.place("shift_exponent")
    exponent = _exponent(own.members["shift_exponent"], where) if operator else 0
    return own.integer("rank", 1, limits.RANK), exponent


def _exponents(fields: Fields) -> dict[str, int]:
    where = fields.place("exponents")
    return {
        target: _exponent(value, where)
        for target, value in fields.mapping("exponents", limits.LAYERS, least=1).items()
    }


def _masks(fields: Fields) -> dict[str, Masked]:
    where = fields.place("masks")
    return {
        layer: Masked.from_json(value, f"{where}.{layer}")
        for layer, value in fields.mapping("masks", limits.LAYERS, least=1).items()
    }


def _exponent(value: Any, where: str) -> int:
    return as_integer(value, -limits.EXPONENT, limits.EXPONENT, where)
