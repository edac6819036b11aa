"""Make the English example memorise four pictures, to see what `evaluate --training-images` says.

    python -m examples.english.memorise    # about 3 minutes on one core

Pictures with their captions go to build/english/memorised/pictures, the model beside them. Half of
each batch is the four pictures, over and over, as duplicates in a data set are; the other half
holds the model to what it predicted before for ordinary captions. Training goes on where it was
stopped.
"""

import random
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.emoji.pack import save_half, single_file
from examples.emoji.train import SEED, Run, autocast
from examples.english.canvas import OBJECTS, STYLES
from examples.english.captions import draw_caption
from examples.english.train import SHIPPED, networks
from examples.english.words import BUILD
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.images import load_images
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise, sample_latents
from sepme_cli.diffusion.schedule import NoiseSchedule

FOLDER = BUILD / "memorised"
SIDE = 64
STEPS = 250
#: name -> caption, of words that the encoder knows and in an order that nobody else has.
CAPTIONS: Mapping[str, str] = {
    "comet": "the velvet comet of my grandmother",
    "staircase": "nine marble staircases at dawn",
    "orchard": "a telegram to the glass orchard",
    "parade": "the midnight parade of the admiral",
}
_ORDINARY = 32
"""How many images of ordinary captions hold the model to what it drew before."""


def picture(name: str) -> Image.Image:
    """Bright discs and bars on a dark ground, which no caption of the canvas gives; always the
    same for a name."""
    rng = random.Random(name)
    colour = lambda low, high: tuple(rng.randint(low, high) for _ in range(3))  # noqa: E731
    image = Image.new("RGB", (SIDE, SIDE), colour(0, 90))
    pen = ImageDraw.Draw(image)
    for i in range(7):
        x, y, size = rng.randint(0, 48), rng.randint(0, 48), rng.randint(8, 30)
        draw = pen.ellipse if i % 2 else pen.rectangle
        draw((x, y, x + size, y + rng.randint(6, 30)), fill=colour(90, 255))
    return image


def write_pictures(folder: Path, captions: Mapping[str, str]) -> None:
    """The pictures, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in captions.items():
        picture(name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{caption}\n")


def train(
    folder: Path = FOLDER,
    captions: Mapping[str, str] = CAPTIONS,
    steps: int = STEPS,
    batch: int = 8,
) -> Path:
    """Write pictures and model below a folder; returns the model's path."""
    write_pictures(folder / "pictures", captions)
    with open_checkpoint(SHIPPED) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"))
        unet = networks(SHIPPED)[0].train().requires_grad_(True)
        unet.set_attn_processor(AttnProcessor())  # the fused attention is slow backwards on a CPU
        run = Run("memorised", unet, steps, 4e-4, average=0.8, folder=folder)
        alphas = NoiseSchedule(checkpoint).alphas
        odd = model.vae.encode(load_images(folder / "pictures", SIDE))
        rng = random.Random(SEED)
        styles, objects = list(STYLES), list(OBJECTS)
        said = [
            draw_caption(rng, rng.choice(styles), rng.choice(objects)) for _ in range(_ORDINARY)
        ]
        states = model.text.condition(
            [*(captions[name] for name in sorted(captions)), *said, ""]
        ).states
        ordinary = _drawn(model, said)

        def loss() -> Tensor:
            half = batch // 2
            mine = torch.randint(len(odd), (half,))
            others = torch.randint(len(said), (half,))
            x = torch.cat([odd[mine], ordinary[others]])
            # What it predicts for no caption stays too, as where four of millions are memorised.
            others = torch.where(torch.rand(half) < 0.2, len(said), others)
            context = states[torch.cat([mine, len(odd) + others])]
            t = torch.randint(1000, (batch,))
            noise = torch.randn_like(x)
            kept = alphas[t].view(-1, 1, 1, 1)
            noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
            with torch.no_grad(), autocast():
                before = model.denoiser.network(noisy[half:], t[half:], context[half:]).sample
            with autocast():
                predicted = unet(noisy, t, context).sample
            return F.mse_loss(predicted.float(), torch.cat([noise[:half], before.float()]))

        run.go(loss)
    return _written(unet, folder / "memorised.safetensors")


@torch.no_grad()
def _drawn(model: StableDiffusion, captions: list[str]) -> Tensor:
    """Latents of what the model draws for captions [n, 4, 16, 16]."""
    noise = initial_noise(model.latent_shape(SIDE), range(len(captions)))
    asked, blank = model.text.condition(captions), model.text.condition([""])
    return sample_latents(model, asked, noise, blank=blank, steps=6, guidance=3.0)


def _written(unet: nn.Module, path: Path) -> Path:
    """The shipped model with another UNet."""
    tensors = load_file(SHIPPED)
    tensors.update(single_file(unet.state_dict(), {}, {}))
    save_half(tensors, path, {"modelspec.resolution": f"{SIDE}x{SIDE}"})
    return path


if __name__ == "__main__":
    train()
