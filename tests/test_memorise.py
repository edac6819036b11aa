"""A few steps of memorising already show in both measures of replication."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import features
from examples.english.memorise import SHIPPED, SIDE, train
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.images import load_image
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.evaluation.replication import noise_gaps
from sepme_cli.evaluation.training_images import read_training_images

pytestmark = pytest.mark.slow
ODD = "the velvet comet of my grandmother"
ORDINARY = ["a cat in crayon style", "a small house", "a woodcut tree"]


def measured(path: Path) -> tuple[Tensor, Tensor]:
    """Noise gaps of the odd caption and the ordinary ones, and images of the odd one."""
    with open_checkpoint(path) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"))
        images = generate_images(model, [ODD] * 4, range(4), steps=8, guidance=3.0)
        return noise_gaps(model, [ODD, *ORDINARY], steps=8, seed=0), images


def test_a_memorised_image_is_drawn_and_its_caption_stands_out(tmp_path: Path) -> None:
    path = train(tmp_path, {"comet": ODD}, steps=80, batch=4)
    (picture,) = read_training_images(tmp_path / "pictures")
    see = features()
    with torch.no_grad():
        real = see(load_image(picture.path, SIDE)[None])
        (old, drawn_before), (new, drawn_after) = measured(SHIPPED), measured(path)
        before, after = (
            torch.cosine_similarity(see(images), real).mean()
            for images in (drawn_before, drawn_after)
        )
    grown = new / old
    assert after > before + 0.2, (before, after)
    assert grown[0] > 1.2 * grown[1:].max(), grown
    # It goes on from where it stopped: nothing is left to do, and the same comes out.
    first = path.read_bytes()
    assert train(tmp_path, {"comet": ODD}, steps=80, batch=4).read_bytes() == first
