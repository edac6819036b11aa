"""How noise is added to latents, and taken away again."""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.structure.families import Prediction
from sepme_cli.diffusion.configs import SCHEDULE


@dataclass(frozen=True)
class Trajectory:
    """The steps of sampling by DDIM (Song et al. 2021, eq. 12, eta 0), from noise to an image.

    times: t of each step, the noisiest first.
    """

    times: tuple[int, ...]
    _ddim: Any

    def step(self, predicted: Tensor, t: int, x: Tensor) -> Tensor:
        """x_t one step nearer to an image [n, c, h, w], as `UNet.predict` has its noise."""
        return self._ddim.step(predicted, t, x).prev_sample


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, for t in 0 to 999.

    prediction: what the UNet was trained to predict; whatever it is, the method and the sampler
    work with eps.
    """

    checkpoint: Checkpoint = field(repr=False)
    prediction: Prediction = "epsilon"

    @cached_property
    def alphas(self) -> Tensor:
        """abar_t [1000], fp32, on the CPU."""
        return self._ddim().alphas_cumprod

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the alphas."""
        return sha256(self.alphas.numpy().tobytes()).hexdigest()

    def _ddim(self) -> Any:
        """By what the model's folder says of betas, else by Stable Diffusion's."""
        folder = self.checkpoint.folder
        said = (folder.config("scheduler", "scheduler_config.json") if folder else None) or {}
        betas = {name: said.get(name, value) for name, value in SCHEDULE.items()}
        return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)

    def trajectory(self, steps: int) -> Trajectory:
        """Sampling in so many steps."""
        ddim = self._ddim()
        ddim.set_timesteps(steps)
        return Trajectory(tuple(ddim.timesteps.tolist()), ddim)

    def levels(self, count: int) -> list[int]:
        """So many t, evenly between no noise and nothing but noise."""
        return torch.linspace(0, len(self.alphas) - 1, count + 2).long()[1:-1].tolist()

    def noised(self, latents: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t of x_0 [n, c, h, w]."""
        return self.alphas[t].sqrt() * latents + (1 - self.alphas[t]).sqrt() * noise

    def epsilon(self, predicted: Tensor, noisy: Tensor, steps: Tensor | int) -> Tensor:
        """eps [n, c, h, w] of what the UNet predicts for x_t.

        Of velocity v (Salimans and Ho 2022, eq. 10 and on):
        eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t.
        """
        if self.prediction == "epsilon":
            return predicted
        kept = self.alphas.to(noisy)[torch.as_tensor(steps).cpu()].reshape(-1, 1, 1, 1)
        return kept.sqrt() * predicted + (1 - kept).sqrt() * noisy
