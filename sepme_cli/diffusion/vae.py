"""The VAE of a checkpoint: images as latents, and back."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.loading import load_vae


@dataclass(frozen=True)
class VAE:
    """Loaded when it is first used. It overflows in fp16, and then computes in fp32."""

    checkpoint: Checkpoint = field(repr=False)
    machine: Machine

    @property
    def network(self) -> AutoencoderKL:
        """diffusers' model of it; UnsupportedError where the checkpoint does not hold all of it."""
        return self.machine.use(self._network)

    @cached_property
    def _network(self) -> AutoencoderKL:
        fits = self.machine.dtype != torch.float16
        return load_vae(self.checkpoint, self.machine.dtype if fits else torch.float32)

    @property
    def is_there(self) -> bool:
        """Whether the checkpoint holds one."""
        return self.checkpoint.network("vae") is not None

    @cached_property
    def reduction(self) -> int:
        """How many pixels a latent pixel is wide; 8 in every published model."""
        return int(2 ** (len(self._network.config.block_out_channels) - 1)) if self.is_there else 8

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 32) -> Tensor:
        """Latents [n, c, h, w] as images [n, 3, H, W] in [0, 1], fp32, on the CPU."""
        vae = self.network
        unscaled = latents / vae.config.scaling_factor
        if shift := vae.config.shift_factor:
            unscaled = unscaled + shift
        scaled = unscaled.to(vae.dtype)
        drawn = [vae.decode(part).sample for part in scaled.split(self.machine.at_once(batch))]
        return (torch.cat(drawn).float() / 2 + 0.5).clamp(0, 1).cpu()

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 32) -> Tensor:
        """Images [n, 3, H, W] in [0, 1] as latents [n, c, h, w], at their distribution's mean, in
        the dtype that the denoiser computes in."""
        vae = self.network
        inputs = (images * 2 - 1).to(self.machine.device, vae.dtype)
        parts = inputs.split(self.machine.at_once(batch))
        means = [vae.encode(part).latent_dist.mean for part in parts]
        found = torch.cat(means)
        if shift := vae.config.shift_factor:
            found = found - shift
        return (found * vae.config.scaling_factor).to(self.machine.dtype)
