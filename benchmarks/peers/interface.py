"""What a peer is told and what it hands back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from benchmarks import canvas
from patch_spec.increment import Increment
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.prompts import Kind


@dataclass(frozen=True)
class Request:
    """What every peer is told: the model (fp32), the concepts to erase, and what must stay.

    names: bare words. kinds: what each of them is; without, what the emoji canvas says.
    protect: the words that must stay, Protected() for none; None for all else of the emoji canvas.
    general: captions of anything at all, for the methods whose papers keep a set of such.
    synonyms: other names of a concept, for the method whose paper asks a language model for them.
    """

    model: StableDiffusion
    names: tuple[str, ...]
    kinds: tuple[Kind, ...] = ()
    protect: Protected | None = None
    general: Sequence[str] = ()
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def retained(self) -> Protected:
        return canvas.everything_but(*self.names) if self.protect is None else self.protect

    def kind_of(self, name: str) -> Kind:
        """What one of the concepts is."""
        if not self.kinds:
            return canvas.kind_of(name)
        return dict(zip(self.names, self.kinds, strict=True))[name]

    @property
    def words(self) -> tuple[str, ...]:
        """The concepts as sepme is told them: "style:ink"."""
        return tuple(f"{self.kind_of(name)}:{name}" for name in self.names)


@dataclass(frozen=True)
class Edit:
    """An edited model.

    weights: parameter of the UNet -> its new value. stored: bytes that must be kept for the edit
    to be applied. parts: concept -> parameter -> what erasing it adds, float64, where the edit is
    a sum of such; increments: ours, which the format adds. Both empty where weights are
    overwritten.
    """

    weights: Mapping[str, Tensor]
    stored: int
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    increments: tuple[Increment, ...] = ()


class Peer(Protocol):
    """A method with its settings. grid: the values that tuning tries, by setting."""

    grid: ClassVar[Mapping[str, tuple[Any, ...]]]

    def edit(self, request: Request) -> Edit: ...


def overwritten(weights: Mapping[str, Tensor]) -> Edit:
    """An edit that replaces whole tensors, kept in fp16 as the checkpoint keeps them."""
    return Edit(
        {name: value.half() for name, value in weights.items()},
        stored=sum(2 * value.numel() for value in weights.values()),
    )


def through(model: StableDiffusion, operator: Tensor) -> Edit:
    """The edit W' = W T of every target, for one operator T [d, d] on text embeddings."""
    return overwritten(
        {name: weight.double() @ operator for name, weight in model.denoiser.stored_weights()}
    )


def identity(width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64)
