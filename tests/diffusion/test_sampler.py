from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.moments import pictured_moments, sampled_moments
from sepme_cli.diffusion.sampler import draw_latents, draw_pictures, initial_noise
from sepme_cli.erasure.prompts import Phrase
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
    first, second = (draw_pictures(model, ["ink", "cat"], [1, 2], steps=3) for _ in range(2))
    assert first.shape == (2, 3, 16, 16)
    assert torch.equal(first, second)


def test_ddim_inverts_a_known_noise(model: StableDiffusion) -> None:
    """At guidance 1, one step from t to x_0 is the paper's formula on eps(x_t, c) alone."""
    context, blank = model.text.condition(["ink"]), model.text.condition([""])
    noise = initial_noise((4, 8, 8), [0])
    found = draw_latents(model, context, noise, blank=blank, steps=1, guidance=1.0)
    (t,) = model.schedule.trajectory(1).times
    alpha, last = model.schedule.alphas[[t, 0]]
    with torch.no_grad():
        predicted = model.denoiser.predict(noise, t, context)
    x0 = (noise - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    expected = last.sqrt() * x0 + (1 - last).sqrt() * predicted
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_moments_hold_what_the_original_model_predicts(model: StableDiffusion) -> None:
    sample = sampled_moments(model, PHRASES, SETTINGS)
    assert len(sample) == 3 * 4
    asked = model.text.condition([p.text for p in PHRASES])[sample.prompts]
    instead = model.text.condition([p.without for p in PHRASES])[sample.prompts]
    with torch.no_grad():
        conditional = model.denoiser.predict(sample.noisy, sample.steps, asked)
        without = model.denoiser.predict(sample.noisy, sample.steps, instead)
    torch.testing.assert_close(sample.without, without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample.representation, conditional - without, rtol=1e-3, atol=1e-5)


def test_given_pictures_are_noised_to_every_level(model: StableDiffusion) -> None:
    sample = pictured_moments(model, PHRASES, torch.rand(2, 3, 16, 16), SETTINGS)
    assert len(sample) == 2 * 4
    assert sorted(set(sample.steps.tolist())) == sorted(sample.steps.tolist())[::2]
    assert sample.noisy.shape == (8, 4, 8, 8)
