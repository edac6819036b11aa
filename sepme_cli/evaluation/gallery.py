"""Images of a model under different weights, generated once and kept.

An image's name is made of everything that decides it, so that a run that was cut short goes on
where it stopped, and one with other settings starts anew. Batches are always the same, for how
many images are generated together shows in the last bits of each. Several processes may share the
folder: no two batches keep the same image.
"""

import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sepme_cli.checkpoints.disk.failures import reading
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
class Batch:
    """Questions whose images are generated together. kept: those of them whose images it keeps;
    of the others, which more than one subject asks for, an earlier batch keeps them."""

    state: State
    questions: tuple[Question, ...]
    kept: tuple[Question, ...]


@dataclass(frozen=True)
class Gallery:
    """A folder of images. settings: what decides them, beside the sampling options and
    weights, prompt and seed."""

    folder: Path
    model: StableDiffusion = field(repr=False)
    sampling: SamplingOptions
    settings: str

    def batches(self, work: Iterable[tuple[State, Sequence[Question]]]) -> list[Batch]:
        """All of some work, the same for whoever asks, whatever is there already."""
        found, taken = [], set[Path]()
        for state, questions in work:
            for at in range(0, len(questions), BATCH):
                batch = tuple(questions[at : at + BATCH])
                kept = tuple(q for q in batch if self.path(state, q) not in taken)
                taken.update(self.path(state, question) for question in kept)
                if kept:
                    found.append(Batch(state, batch, kept))
        return found

    def missing(self, batches: Iterable[Batch]) -> list[Batch]:
        """Those of which an image is not there, or damaged."""
        return [
            batch
            for batch in batches
            if any(load_image(self.path(batch.state, question)) is None for question in batch.kept)
        ]

    def take(self, folder: Path, batches: Iterable[Batch]) -> int:
        """Copy what is missing from another gallery's folder; returns how many images that was."""
        count = 0
        for batch in self.missing(batches):
            for question in batch.kept:
                path = self.path(batch.state, question)
                if load_image(path) is None and load_image(folder / path.name) is not None:
                    with reading(folder / path.name):
                        data = (folder / path.name).read_bytes()
                    write_file(path, data, force=True)
                    count += 1
        return count

    def generate(self, batches: Iterable[Batch], advance: Callable[[int], None]) -> None:
        """Generate them, and keep what each keeps."""
        for state, of_state in groupby(batches, lambda batch: batch.state):
            with self.model.with_weights(state.weights()):
                for batch in of_state:
                    drawn = generate_images(
                        self.model,
                        [question.prompt for question in batch.questions],
                        [question.seed for question in batch.questions],
                        steps=self.sampling.steps,
                        guidance=self.model.scale_of(self.sampling.guidance),
                        size=self.sampling.size,
                        batch=BATCH,
                    )
                    for question, image in zip(batch.questions, drawn, strict=True):
                        if question in batch.kept:
                            save_image(image, self.path(state, question))
                    advance(len(batch.questions))

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
