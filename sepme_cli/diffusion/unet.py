"""The UNet of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.denoiser import Denoiser
from sepme_cli.diffusion.loading import load_unet
from sepme_cli.diffusion.schedule import NoiseSchedule
from sepme_cli.errors import UnsupportedError

_LARGEST_SIDE = 1024
"""Of a latent; beyond it a configuration speaks of something else."""


@dataclass(frozen=True)
class UNet(Denoiser):
    """What predicts noise.

    schedule: of that noise.
    """

    schedule: NoiseSchedule

    @property
    def network(self) -> UNet2DConditionModel:
        """diffusers' model of it; UnsupportedError where the checkpoint does not hold all of it."""
        return self.machine.use(self._network)

    @cached_property
    def _network(self) -> UNet2DConditionModel:
        return load_unet(self.checkpoint, self.machine.dtype)

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self._network.config.out_channels

    @property
    def side(self) -> int:
        """Of the latents that it was trained on: what its configuration says, else its family."""
        network = self.checkpoint.network("denoiser")
        configured = (network.config or {}).get("sample_size") if network is not None else None
        if isinstance(configured, int) and 0 < configured <= _LARGEST_SIDE:
            return configured
        family = self.checkpoint.family
        if family.velocity_side is not None and self.schedule.prediction == "velocity":
            return family.velocity_side
        return family.latent_side

    def predict(self, noisy: Tensor, steps: Tensor | float, asked: Conditioning) -> Tensor:
        """eps(x_t, c) [n, c, h, w] for noisy x_t [n, c, h, w] and t in 0 to 999."""
        added = None if asked.pooled is None else self._added(noisy, asked.pooled)
        inputs = torch.cat([noisy, *self._beside(noisy)], 1)
        told = {} if added is None else {"added_cond_kwargs": added}
        predicted: Tensor = self.network(inputs, steps, asked.states, **told).sample
        return self.schedule.epsilon(predicted, noisy, steps)

    def _added(self, noisy: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """What XL embeds beside the time step: sizes, crops, and the pooled text."""
        side = [size * self.vae.reduction for size in noisy.shape[-2:]]
        aesthetics = self.checkpoint.family.aesthetics
        sizes = [*side, 0, 0, *(side if aesthetics is None else [aesthetics])]
        times = torch.tensor([sizes], dtype=pooled.dtype, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": times.expand(len(noisy), -1)}

    def _beside(self, noisy: Tensor) -> Sequence[Tensor]:
        """What inpainting and editing models see beside x_t: all is masked, nothing is given."""
        count = self.network.config.in_channels - noisy.shape[1]
        if count == 0:
            return ()
        blank = torch.zeros_like(noisy)
        if count == noisy.shape[1]:
            return (blank,)
        if count == noisy.shape[1] + 1:
            return (torch.ones_like(noisy[:, :1]), self._grey.expand_as(noisy))
        raise UnsupportedError(
            f"{self.checkpoint.path}: the UNet wants {count} channels beside the noise, which "
            "sepme does not know to fill; --method closed-form needs no image",
            file=self.checkpoint.path,
            expected="none, or those of an inpainting or editing model",
            found=count,
        )

    @cached_property
    def _grey(self) -> Tensor:
        """The latent [1, c, 1, 1] of a grey image, which is what a masked one is."""
        if not self.vae.is_there:
            return self.machine.put(torch.zeros(1, self.channels, 1, 1))
        side = 8 * self.vae.reduction
        grey = self.vae.encode(torch.full((1, 3, side, side), 0.5))
        return grey.mean((2, 3), keepdim=True)
