"""Images of a model under different weights, generated once and kept.

An image's name is made of everything that decides it, so that a run that was cut short goes on
where it stopped, and one with other settings starts anew. Batches are always the same, for how
many images are generated together shows in the last bits of each.
"""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sepme_cli.checkpoints.disk.files import write_file
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import generate_images, initial_noise, sample_latents
from sepme_cli.evaluation.protocol import Question, SamplingOptions

BATCH = 8


@dataclass(frozen=True)
class State:
    """Weights that images are generated with. name: what decides them. weights: makes those that
    are replaced, by target."""

    name: str
    weights: Callable[[], Mapping[str, Tensor]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Gallery:
    """A folder of images. settings: what decides them, beside the sampling options and
    weights, prompt and seed."""

    folder: Path
    model: StableDiffusion = field(repr=False)
    sampling: SamplingOptions
    settings: str

    def missing(self, state: State, questions: Sequence[Question]) -> list[tuple[Question, ...]]:
        """The batches of which a picture is not there, or damaged."""
        batches = [tuple(questions[at : at + BATCH]) for at in range(0, len(questions), BATCH)]
        return [
            batch
            for batch in batches
            if any(load_image(self.path(state, question)) is None for question in batch)
        ]

    def generate(
        self, state: State, batches: Sequence[Sequence[Question]], advance: Callable[[int], None]
    ) -> None:
        """Generate and keep one image for each question."""
        with self.model.with_weights(state.weights()):
            for batch in batches:
                drawn = generate_images(
                    self.model,
                    [question.prompt for question in batch],
                    [question.seed for question in batch],
                    steps=self.sampling.steps,
                    guidance=self.model.scale_of(self.sampling.guidance),
                    size=self.sampling.size,
                    batch=BATCH,
                )
                for question, image in zip(batch, drawn, strict=True):
                    save_image(image, self.path(state, question))
                advance(len(batch))

    def images(self, state: State, questions: Sequence[Question]) -> Tensor:
        """One image for each question [n, 3, H, W] in [0, 1], as PNG keeps it: 8 bits."""
        found = [load_image(self.path(state, question)) for question in questions]
        return torch.stack([image for image in found if image is not None])

    def path(self, state: State, question: Question) -> Path:
        """The file of a picture."""
        guidance = self.model.scale_of(self.sampling.guidance)
        sampling = (self.sampling.steps, guidance, self.sampling.size)
        said = [self.settings, *sampling, state.name, question.prompt, question.seed]
        return self.folder / f"{sha256(json.dumps(said).encode()).hexdigest()[:24]}.png"

    def seconds_per_image(self) -> float:
        """About how long one takes, from one step and one decoding after a first to warm up."""
        asked = self.model.text.condition(["a picture"])
        noise = initial_noise(self.model.latent_shape(self.sampling.size), [0])
        for _ in range(2):
            started = time.monotonic()
            latents = sample_latents(self.model, asked, noise, blank=asked, steps=1)
            drawn = time.monotonic()
        self.model.vae.decode(latents)
        return (drawn - started) * self.sampling.steps + time.monotonic() - drawn


def save_image(image: Tensor, path: Path) -> None:
    """Write an image [3, H, W] in [0, 1] as PNG, whole or not at all."""
    memory = io.BytesIO()
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(memory, format="PNG")
    write_file(path, memory.getvalue(), force=True)


def load_image(path: Path) -> Tensor | None:
    """The image of a file; None if it is not there, or not whole."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums; an image that was verified must be opened anew
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).copy()
    except (OSError, SyntaxError, ValueError):
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
