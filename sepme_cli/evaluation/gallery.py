"""Pictures of a model under different weights, drawn once and kept.

A picture's name is made of everything that decides it, so that a run that was cut short goes on
where it stopped, and one with other settings draws anew.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sepme_cli.checkpoints.files import new_file, write_all
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import draw_pictures
from sepme_cli.evaluation.protocol import Question

_BATCH = 16


@dataclass(frozen=True)
class State:
    """Weights that pictures are drawn with. name: what decides them. weights: those replaced."""

    name: str
    weights: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Gallery:
    """A folder of pictures. settings: all that decides them but prompt, seed and weights."""

    folder: Path
    model: StableDiffusion = field(repr=False)
    steps: int
    guidance: float
    size: int | None
    settings: str

    def pictures(
        self,
        state: State,
        questions: Sequence[Question],
        advance: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """One picture for each question [n, 3, H, W] in [0, 1], as PNG keeps it: 8 bits."""
        paths = [self.path(state, question) for question in questions]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        advance(len(questions) - len(missing))
        with self.model.with_weights(state.weights):
            for at in range(0, len(missing), _BATCH):
                part = missing[at : at + _BATCH]
                drawn = draw_pictures(
                    self.model,
                    [questions[i].prompt for i in part],
                    [questions[i].seed for i in part],
                    steps=self.steps,
                    guidance=self.guidance,
                    size=self.size,
                    batch=_BATCH,
                )
                for i, picture in zip(part, drawn, strict=True):
                    _save(picture, paths[i])
                advance(len(part))
        return torch.stack([_load(path) for path in paths])

    def path(self, state: State, question: Question) -> Path:
        """The file of a picture."""
        said = [self.settings, state.name, question.prompt, question.seed]
        return self.folder / f"{sha256(json.dumps(said).encode()).hexdigest()[:24]}.png"


def _save(picture: Tensor, path: Path) -> None:
    memory = io.BytesIO()
    pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(memory, format="PNG")
    data = memory.getvalue()
    with new_file(path, len(data), force=True) as descriptor:
        write_all(descriptor, data, 0)


def _load(path: Path) -> Tensor:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
