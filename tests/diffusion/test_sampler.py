from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.moments import image_moments, sampled_moments
from sepme_cli.diffusion.sampler import generate_images, initial_noise, sample_latents
from sepme_cli.erasure.prompts import Phrase
from sepme_cli.erasure.representation import Sample
from sepme_cli.erasure.settings import Settings

PHRASES = (Phrase("ink", ""), Phrase("a cat in ink style", "a cat"))
SETTINGS = Settings(pictures=3, sampling_steps=4)


@pytest.fixture(scope="module")
def model(small_model: Path) -> Iterator[StableDiffusion]:
    with open_checkpoint(small_model) as checkpoint:
        yield StableDiffusion.of(checkpoint, torch.device("cpu"))


def test_noise_depends_on_its_seed_alone() -> None:
    one, both = initial_noise((4, 2, 2), [5]), initial_noise((4, 2, 2), [3, 5])
    assert torch.equal(one[0], both[1])
    assert not torch.equal(both[0], both[1])


def test_the_same_seed_draws_the_same_picture(model: StableDiffusion) -> None:
    first, second = (generate_images(model, ["ink", "cat"], [1, 2], steps=3) for _ in range(2))
    assert first.shape == (2, 3, 16, 16)
    assert torch.equal(first, second)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_drawing_is_ddim_with_guidance(model: StableDiffusion, steps: int, guidance: float) -> None:
    """Each step from t to the next time step is the papers' formulas, on (1 - w) eps(x_t) +
    w eps(x_t, c); without the text at guidance 0, on it alone at 1."""
    context, blank = model.text.condition(["ink"]), model.text.condition([""])
    x = noise = initial_noise((4, 8, 8), [0])
    found = sample_latents(model, context, noise, blank=blank, steps=steps, guidance=guidance)
    times = list(model.schedule.trajectory(steps).times)
    alphas = [model.schedule.alphas[t] for t in times]
    for t, alpha, after in zip(times, alphas, [*alphas[1:], model.schedule.alphas[0]], strict=True):
        with torch.no_grad():
            asked, plain = (model.denoiser.predict(x, t, read) for read in (context, blank))
        predicted = (1 - guidance) * plain + guidance * asked
        x0 = (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * predicted
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_moments_hold_what_the_original_model_predicts(model: StableDiffusion) -> None:
    sample = sampled_moments(model, PHRASES, SETTINGS)
    assert len(sample) == 3 * 4
    check_predictions(model, sample)


def check_predictions(model: StableDiffusion, sample: Sample) -> None:
    """Every moment's are what the model says of its image, at its time step, with its phrase."""
    asked = model.text.condition([p.text for p in PHRASES])[sample.prompts]
    instead = model.text.condition([p.without for p in PHRASES])[sample.prompts]
    with torch.no_grad():
        conditional = model.denoiser.predict(sample.noisy, sample.steps, asked)
        without = model.denoiser.predict(sample.noisy, sample.steps, instead)
    torch.testing.assert_close(sample.without, without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample.representation, conditional - without, rtol=1e-3, atol=1e-5)


def test_given_pictures_are_noised_to_every_level(model: StableDiffusion) -> None:
    """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise, and what the model predicts there."""
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sample = image_moments(model, PHRASES, pictures, SETTINGS)
    assert len(sample) == 2 * 4
    times = sample.steps.tolist()
    assert sorted(set(times)) == times[::2] == times[1::2]
    latents = model.vae.encode(pictures).repeat(4, 1, 1, 1)
    alphas = model.schedule.alphas[sample.steps].view(-1, 1, 1, 1)
    noise = (sample.noisy - alphas.sqrt() * latents) / (1 - alphas).sqrt()
    # Standard normal at each level, and nothing of the images is in it.
    torch.testing.assert_close(noise.reshape(4, -1).std(1), torch.ones(4), rtol=0.15, atol=0)
    assert abs(float(noise.mean())) < 0.1
    assert abs(float((noise * latents).mean())) < 0.1 * float(latents.std())
    assert set(sample.prompts.tolist()) == {0, 1}
    check_predictions(model, sample)
