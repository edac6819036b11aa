"""The emoji canvas as a measuring instrument: draw every pair with some increments, judge it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from examples.emoji.judging import (
    OBJECT_NAMES,
    STYLE_NAMES,
    Caption,
    Verdict,
    all_pairs,
    verdict,
)
from examples.emoji.networks import load_judge
from patch_spec.increment import Increment
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.prompts import Kind
from sepme_cli.increments import Scaled, compose

MODEL = Path("examples/emoji-sd.safetensors")
STEPS, GUIDANCE = 20, 3.0

#: What every pair is asked for by.
ASKED = all_pairs(["{O} in {s} style"])
#: Phrasings the model knows and no erasure uses: see `sepme_cli.erasure.prompts`.
UNSEEN = [
    caption
    for shift in range(3)
    for caption in all_pairs(
        [
            ("{O}, {s}", "{o} drawn in {s}", "{s} art showing {o}"),
            ("{o} as {s} would draw it", "a small {s} emoji of {o}", "my favourite {O}, in {s}"),
            (
                "the {O} in the manner of {s}",
                "artwork of {o} in the style of {s}",
                "one {O} emoji, drawn in {s} style",
            ),
        ][shift]
    )
]


def kind_of(concept: str) -> Kind:
    return "style" if concept in STYLE_NAMES else "object"


def everything_but(*concepts: str) -> Protected:
    """All else that the model knows, to be protected."""
    return Protected(
        tuple(s for s in STYLE_NAMES if s not in concepts),
        tuple(o for o in OBJECT_NAMES if o not in concepts),
    )


def naming(captions: Sequence[Caption], concepts: Sequence[str]) -> Tensor:
    """Which captions name any of the concepts: bool [captions]."""
    return torch.tensor([any(c.names(concept) for concept in concepts) for c in captions])


@dataclass(frozen=True)
class Canvas:
    """The model and its judge. dtype: what the model draws in."""

    dtype: torch.dtype = torch.float32

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's file, open as long as the process is there."""
        return open_checkpoint(MODEL)

    @cached_property
    def model(self) -> StableDiffusion:
        return StableDiffusion.of(self.checkpoint, torch.device("cpu"), self.dtype)

    def draw(self, captions: Sequence[Caption], increments: Sequence[Increment] = ()) -> Tensor:
        """Pictures [captions, 3, 64, 64], each with a seed of its own pair."""
        with self.model.denoiser.with_weights(self.patched([(i, 1.0) for i in increments])):
            return self.drawn(captions)

    def patched(self, stack: Sequence[Scaled]) -> dict[str, Tensor]:
        """Every target's weight with increments added, fp16 as the file has it; none without."""
        return {
            target.name: torch.from_numpy(compose(target.read(), stack, target.name))
            for target in (self.checkpoint.targets if stack else ())
        }

    def drawn(self, captions: Sequence[Caption], rounds: Sequence[int] = ()) -> Tensor:
        """Pictures [captions, 3, 64, 64] by the model as it stands. rounds: of each caption, which
        of its pair's seeds; the first without."""
        return generate_images(
            self.model,
            [c.text for c in captions],
            [
                c.style * 100 + c.object + 1000 * nth
                for c, nth in zip(captions, rounds or [0] * len(captions), strict=True)
            ],
            steps=STEPS,
            guidance=GUIDANCE,
            batch=64,
        )

    def judge(self, pictures: Tensor, captions: Sequence[Caption]) -> Verdict:
        return verdict(self._judge, pictures, captions)

    @cached_property
    def _judge(self):  # type: ignore[no-untyped-def]
        return load_judge()
