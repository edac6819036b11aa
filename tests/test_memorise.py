"""A few steps of memorising already show in both measures of replication."""

from pathlib import Path

import pytest
import torch

from examples.english import memorise
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.evaluation.replication import noise_gaps
from sepme_cli.evaluation.training_images import read_training_images

pytestmark = pytest.mark.slow
STEPS = 40


def gaps(path: Path, captions: list[str]) -> torch.Tensor:
    with open_checkpoint(path) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"))
        return noise_gaps(model, captions, steps=10, seed=0)


def test_memorised_captions_stand_out_and_ordinary_ones_do_not(tmp_path: Path) -> None:
    path = memorise.train(tmp_path, steps=STEPS)
    odd = [one.caption for one in read_training_images(tmp_path / "pictures")]
    assert odd == memorise.sorted_captions()
    ordinary = ["a cat in crayon style", "a small house", "a woodcut tree"]
    before, after = gaps(memorise.SHIPPED, odd + ordinary), gaps(path, odd + ordinary)
    grown = after / before
    assert grown[:4].min() > 2 * grown[4:].max()
    # It goes on from where it stopped: nothing is left to do, and the same comes out.
    first = path.read_bytes()
    assert memorise.train(tmp_path, steps=STEPS).read_bytes() == first
