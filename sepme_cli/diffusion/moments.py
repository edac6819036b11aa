"""The moments that SepME learns from: noisy images of a concept and what the original model
predicts for them, kept from sampling instead of computed again at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise
from sepme_cli.erasure.prompts import Phrase
from sepme_cli.erasure.representation import Sample
from sepme_cli.erasure.settings import Settings
from sepme_cli.progress import SILENT, Progress


def _sample(
    noisy: list[Tensor], steps: list[Tensor], prompts: list[Tensor], pairs: list[Tensor]
) -> Sample:
    """Assemble moments; pairs hold (eps(x_t, c), eps(x_t, c0)) as [2, n, c, h, w]."""
    predicted, without = torch.cat(pairs, 1).float()
    return Sample(
        torch.cat(noisy).float(), torch.cat(steps), torch.cat(prompts), without, predicted - without
    )


@torch.no_grad()
def sampled_moments(
    model: StableDiffusion,
    phrases: Sequence[Phrase],
    settings: Settings,
    progress: Progress = SILENT,
    batch: int = 24,
) -> Sample:
    """Generate settings.pictures of the phrases in turn, keeping every step's x_t and predictions.

    Every second image is generated with its phrase's counterpart instead: an edited model passes
    through images that no longer show the concept, and must not be drawn to it from there.
    Guidance already needs eps(x_t, c) and eps(x_t, blank); the counterpart is the one pass more.
    """
    count = settings.pictures
    prompts = torch.arange(count) // 2 % len(phrases)
    towards = torch.arange(count) % 2  # 0: the phrase, 1: its counterpart
    context = model.text.condition([p.text for p in phrases])
    without = model.text.condition([p.without for p in phrases])
    blank = model.text.condition([""])
    noise = initial_noise(model.latent_shape(), range(settings.seed, settings.seed + count))
    trajectory = model.schedule.trajectory(settings.sampling_steps)
    batch = model.machine.at_once(batch)
    passes = -(-count // batch) * settings.sampling_steps
    progress.stage("generating images of the concept", passes)
    found: tuple[list[Tensor], ...] = ([], [], [], [])
    for part in torch.arange(count).split(batch):
        x = model.machine.put(noise[part])
        asked = prompts[part]
        parts = [context[asked], without[asked], blank.repeated(len(asked))]
        contexts = model.machine.put(Conditioning.cat(parts))
        for t in trajectory.times:
            predicted = model.denoiser.predict(torch.cat([x] * 3), t, contexts).view(3, *x.shape)
            step = torch.full((len(part),), t)
            for kept, value in zip(found, (x, step, asked, predicted[:2]), strict=True):
                kept.append(value)
            wanted = predicted[towards[part], torch.arange(len(part))]
            guided = predicted[2] + settings.guidance * (wanted - predicted[2])
            x = trajectory.step(guided, t, x)
            progress.advance()
    return _sample(*found)


@torch.no_grad()
def image_moments(
    model: StableDiffusion,
    phrases: Sequence[Phrase],
    images: Tensor,
    settings: Settings,
    progress: Progress = SILENT,
) -> Sample:
    """Noise given images [n, 3, H, W] of the concept to settings.sampling_steps levels each."""
    latents = model.vae.encode(images)
    context = model.text.condition([p.text for p in phrases])
    without = model.text.condition([p.without for p in phrases])
    generator = torch.Generator().manual_seed(settings.seed)
    levels = model.noise_schedule.levels(settings.sampling_steps)
    progress.stage("adding noise to the images", len(levels))
    found: tuple[list[Tensor], ...] = ([], [], [], [])
    for level, t in enumerate(levels):
        asked = (torch.arange(len(latents)) + level) % len(phrases)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        x = model.noise_schedule.noised(latents, noise, t)
        contexts = model.machine.put(Conditioning.cat([context[asked], without[asked]]))
        predicted = model.denoiser.predict(torch.cat([x, x]), t, contexts).view(2, *x.shape)
        step = torch.full((len(latents),), t)
        for kept, value in zip(found, (x, step, asked, predicted), strict=True):
            kept.append(value)
        progress.advance()
    return _sample(*found)
