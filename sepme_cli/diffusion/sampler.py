"""Generating images: DDIM, or Euler's steps of rectified flow, under guidance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion


def initial_noise(shape: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """x_T for each seed [len(seeds), c, h, w], the same whatever else is in the batch."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def sample_latents(
    model: StableDiffusion,
    context: Conditioning,
    noise: Tensor,
    *,
    blank: Conditioning,
    steps: int = 20,
    guidance: float = 7.5,
) -> Tensor:
    """Sample latents by the model's schedule, under its guidance.

    context: of n prompts. noise: x_T [n, c, h, w]. blank: of the blank prompt.
    guidance: its scale, see `Denoiser.guided`.
    Returns x_0 [n, c, h, w].
    """
    trajectory = model.schedule.trajectory(steps, noise.shape)
    asked, nothing = model.machine.put(context), model.machine.put(blank)
    x = model.machine.put(noise)
    for t in trajectory.times:
        x = trajectory.step(model.denoiser.guided(x, t, asked, nothing, guidance), t, x)
    return x


def generate_images(
    model: StableDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float = 7.5,
    size: int | None = None,
    batch: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """One image for each prompt with its seed: [n, 3, H, W] in [0, 1], on the CPU."""
    context = model.text.condition(list(prompts))
    blank = model.text.condition([""])
    noise = initial_noise(model.latent_shape(size), seeds)
    images = []
    for part in torch.arange(len(prompts)).split(model.machine.at_once(batch)):
        latents = sample_latents(
            model, context[part], noise[part], blank=blank, steps=steps, guidance=guidance
        )
        images.append(model.vae.decode(latents))
        advance(len(part))
    return torch.cat(images)
