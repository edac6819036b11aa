"""How noise is added to latents, and taken away again."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.structure.families import Prediction
from sepme_cli.diffusion.configs import SCHEDULE

_TIMES = 1000
"""t of nothing but noise, as every family counts."""


@dataclass(frozen=True)
class Trajectory:
    """The steps of sampling, from noise to an image.

    times: t of each step, the noisiest first. scheduler: diffusers' of it.
    """

    times: Sequence[float]
    scheduler: Any

    def step(self, predicted: Tensor, t: float, x: Tensor) -> Tensor:
        """x_t one step nearer to an image [n, c, h, w], as `Denoiser.predict` has its noise or
        velocity."""
        return self.scheduler.step(predicted, t, x).prev_sample


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, for t in 0 to 999.

    prediction: what the UNet was trained to predict; whatever it is, the method and the sampler
    work with eps.
    """

    checkpoint: Checkpoint = field(repr=False)
    prediction: Prediction = "epsilon"
    sampler = "DDIM"  # Song et al. 2021, eq. 12, eta 0

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

    def trajectory(self, steps: int, shape: Sequence[int] = ()) -> Trajectory:
        """Sampling in so many steps; shape: of the latents, on which nothing depends here."""
        ddim = self._ddim()
        ddim.set_timesteps(steps)
        return Trajectory(tuple(ddim.timesteps.tolist()), ddim)

    def levels(self, count: int) -> list[int]:
        """So many t, evenly between no noise and nothing but noise."""
        return torch.linspace(0, len(self.alphas) - 1, count + 2).long()[1:-1].tolist()

    def noised(self, latents: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x_t of x_0 [n, c, h, w]. t: of all, or [n]."""
        kept = self.alphas[t].to(latents.device).reshape(-1, 1, 1, 1)
        return (kept.sqrt() * latents + (1 - kept).sqrt() * noise).to(latents)

    def aim(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What a denoiser that was trained on x_0 [n, c, h, w] predicts of `noised`: eps."""
        return noise

    def epsilon(self, predicted: Tensor, noisy: Tensor, steps: Tensor | float) -> Tensor:
        """eps [n, c, h, w] of what the UNet predicts for x_t.

        Of velocity v (Salimans and Ho 2022, eq. 10 and on):
        eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t.
        """
        if self.prediction == "epsilon":
            return predicted
        kept = self.alphas.to(noisy)[torch.as_tensor(steps).cpu()].reshape(-1, 1, 1, 1)
        return kept.sqrt() * predicted + (1 - kept).sqrt() * noisy


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow (Esser et al. 2024, sec. 2): x_t = (1 - sigma) x_0 + sigma noise, and the
    velocity noise - x_0, for sigma = t / 1000."""

    checkpoint: Checkpoint = field(repr=False)
    prediction = "velocity"
    sampler = "Euler's steps of rectified flow"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of how it is set."""
        return sha256(json.dumps(self._config, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _config(self) -> dict[str, Any]:
        """What the model's folder says of it, else what the family is used with."""
        folder = self.checkpoint.folder
        said = folder.config("scheduler", "scheduler_config.json") if folder else None
        if said is not None:
            return {name: value for name, value in said.items() if not name.startswith("_")}
        network, flow = self.checkpoint.network("denoiser"), self.checkpoint.family.flow or {}
        distilled = network is not None and not any("guidance_" in name for name in network.tensors)
        if flow.get("use_dynamic_shifting") and distilled:  # Flux.1 schnell
            return {"shift": 1.0}
        return dict(flow)

    def trajectory(self, steps: int, shape: Sequence[int] = ()) -> Trajectory:
        """Sampling in so many steps; shape: [..., h, w] of the latents, by whose size Flux.1 dev's
        steps are set."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._config)
        if scheduler.config.use_dynamic_shifting:
            sigmas = torch.linspace(1, 1 / steps, steps).tolist()
            mu = _mu(scheduler.config, shape[-2] * shape[-1] // 4)
            scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        else:
            scheduler.set_timesteps(steps)
        return Trajectory(tuple(scheduler.timesteps.tolist()), scheduler)

    def levels(self, count: int) -> list[int]:
        """So many t, evenly between no noise and nothing but noise."""
        return torch.linspace(0, _TIMES - 1, count + 2).long()[1:-1].tolist()

    def noised(self, latents: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x_t of x_0 [n, c, h, w]. t: of all, or [n]."""
        sigma = (torch.as_tensor(t, device=latents.device) / _TIMES).reshape(-1, 1, 1, 1)
        return ((1 - sigma) * latents + sigma * noise).to(latents)

    def aim(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What a denoiser that was trained on x_0 [n, c, h, w] predicts of `noised`: velocity."""
        return noise - latents


def _mu(said: Any, patches: int) -> float:
    """What the steps of Flux.1 dev are shifted by for images of so many patches: a straight line
    through what the configuration says of small and of large ones."""
    slope = (said.max_shift - said.base_shift) / (said.max_image_seq_len - said.base_image_seq_len)
    return float(said.base_shift + slope * (patches - said.base_image_seq_len))
