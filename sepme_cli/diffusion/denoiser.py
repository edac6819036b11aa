"""What every denoiser has: the weights that a patch may change, and a prediction under guidance."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from patch_spec.streams import Stream, stream_of
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.diffusion.arrays import to_torch
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.vae import VAE
from sepme_cli.diffusion.weights import added_products, replaced_weights


@dataclass(frozen=True)
class Denoiser(ABC):
    """Loaded when it is first used, in the machine's dtype; the file may hold another.

    vae: of the latents that it reads.
    """

    checkpoint: Checkpoint = field(repr=False)
    machine: Machine
    vae: VAE

    @property
    @abstractmethod
    def network(self) -> Any:
        """diffusers' model of it; UnsupportedError where the checkpoint does not hold all of it."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of a latent."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Of the latents that it was trained on."""

    @property
    def patch(self) -> int:
        """What the side of a latent must be a multiple of."""
        return 1

    @property
    def largest_side(self) -> int | None:
        """Of the latents that it can read; None where there is no end."""
        return None

    @abstractmethod
    def predict(self, noisy: Tensor, steps: Tensor | float, asked: Conditioning) -> Tensor:
        """What the schedule steps by [n, c, h, w], for noisy x_t [n, c, h, w]."""

    def guided(
        self, noisy: Tensor, t: float, asked: Conditioning, blank: Conditioning, scale: float
    ) -> Tensor:
        """The same under classifier-free guidance (Ho and Salimans 2022):
        p(blank) + scale (p(c) - p(blank)). asked: of n prompts. blank: of the blank prompt."""
        both = Conditioning.cat([asked, blank.repeated(len(asked))])
        conditional, plain = self.predict(torch.cat([noisy, noisy]), t, both).chunk(2)
        return plain + scale * (conditional - plain)

    @cached_property
    def targets(self) -> Mapping[str, nn.Linear]:
        """The image-independent layers by the name a patch gives their weights."""
        found = ((f"{name}.weight", module) for name, module in self.network.named_modules())
        return {
            name: module
            for name, module in found
            if stream_of(name) is not None and isinstance(module, nn.Linear)
        }

    def stored_weights(self, stream: Stream = "tokens") -> Iterator[tuple[str, Tensor]]:
        """Every target of a stream, its name and W [out, d] as it is stored, fp32; no network is
        loaded."""
        for target in self.checkpoint.targets:
            if stream_of(target.name) == stream:
                yield target.name, to_torch(target.read(), torch.float32)

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The network with some layers' weights replaced, for the length of the block."""
        with replaced_weights(self.network, weights):
            yield

    @contextmanager
    def with_increment(self, up: Mapping[str, Tensor], basis: Tensor) -> Iterator[None]:
        """The network with dW = up @ basis added to each target, differentiable in up.

        up: target name -> [out, r]; basis [r, d].
        """
        with added_products((self.targets[name], basis, factor) for name, factor in up.items()):
            yield
