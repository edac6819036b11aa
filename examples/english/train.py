"""Train the English canvas's VAE, UNet and judge.

    python -m examples.english.text        # first: the text encoder
    python -m examples.english.train       # up to one stage: vae, unet, judge

The VAE starts from the first canvas's, the UNet from the English one that is shipped (without it,
from the first canvas's, but for the keys and values, which read another text encoder). Stages save
their state every minute and go on from there.
"""

import random
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from examples.emoji.networks import Judge, make_unet
from examples.emoji.pack import fold_latent_scale
from examples.emoji.train import SEED, Run, augment, autocast, draw, vae_loss
from examples.english import text
from examples.english.canvas import OBJECTS, STYLES, load_canvas
from examples.english.captions import draw_caption
from examples.english.words import BUILD
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.loading import load_unet, load_vae
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.tokenizer import tokenize

FIRST = Path("examples/emoji-sd.safetensors")
SHIPPED = Path("examples/english-sd.safetensors")
STEPS = 3600


def pictures() -> Tensor:
    """Pictures [styles * objects, 3, 64, 64] in [0, 1], the objects of one style after another."""
    canvas = torch.from_numpy(load_canvas()).permute(0, 1, 4, 2, 3).float() / 255
    return canvas.flatten(0, 1)


augmented = partial(augment, beyond="border")


def networks(path: Path) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """UNet and VAE of a shipped model."""
    with open_checkpoint(path) as checkpoint:
        return load_unet(checkpoint, torch.float32), load_vae(checkpoint, torch.float32)


def train_vae(steps: int = 1500, batch: int = 16) -> AutoencoderKL:
    """The first canvas's VAE knows white grounds only; this one learns these."""
    vae, shown = networks(FIRST)[1].train().requires_grad_(True), pictures()
    run = Run("vae", vae, steps, 1e-3, average=0.99, folder=BUILD)
    run.go(lambda: vae_loss(vae, augmented(shown[draw(len(shown), batch)]), 4.0))
    return scaled(vae)


def trained_vae() -> AutoencoderKL:
    """The VAE trained here; the shipped one if none was."""
    return train_vae() if (BUILD / "vae.pt").exists() else networks(SHIPPED)[1]


@torch.no_grad()
def scaled(vae: AutoencoderKL) -> AutoencoderKL:
    """The VAE with its latents at mean 0 and deviation 1, channel by channel."""
    means = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in pictures().split(64)])
    state = vae.state_dict()
    fold_latent_scale(state, means.mean((0, 2, 3)), means.std((0, 2, 3)))
    vae.load_state_dict(state)
    return vae


@torch.no_grad()
def latents_of(vae: AutoencoderKL, copies: int = 12) -> Tensor:
    """Latents of augmented pictures [copies, pictures, 4, 16, 16], as the UNet reads them."""
    path = BUILD / "latents.pt"
    if not path.exists():
        shown, found = pictures(), []
        torch.manual_seed(SEED)
        for _ in range(copies):
            x = augmented(shown) * 2 - 1
            with autocast():
                parts = [vae.encode(part).latent_dist.mean for part in x.split(48)]
            found.append(torch.cat(parts).float() * vae.config.scaling_factor)
        torch.save(torch.stack(found).half(), path)
    latents: Tensor = torch.load(path)
    return latents.float()


def text_encoder() -> CLIPTextModel:
    """The trained text encoder, rounded as it is shipped; the shipped one if none was trained."""
    if not (BUILD / f"{text.CANVAS}.pt").exists():
        with open_checkpoint(SHIPPED) as checkpoint:
            return StableDiffusion.of(checkpoint, torch.device("cpu")).text.clips[0].model
    encoder = text.make_encoder(text.VARIANTS[text.CANVAS])
    encoder.load_state_dict({k: v.half().float() for k, v in text.state().items()})
    return encoder.eval().requires_grad_(False)


def train_unet(steps: int = STEPS, batch: int = 32) -> nn.Module:
    """Epsilon prediction on Stable Diffusion's schedule, with min-SNR-5 weights."""
    vae = trained_vae()
    unet = make_unet(text.VARIANTS[text.CANVAS].width)
    if SHIPPED.exists():
        unet.load_state_dict(networks(SHIPPED)[0].state_dict())
    else:  # Its keys and values read another text encoder.
        first = networks(FIRST)[0].state_dict()
        unet.load_state_dict({k: v for k, v in first.items() if not k.endswith(KEYS)}, strict=False)
    unet.set_attn_processor(AttnProcessor())  # the fused attention is slow backwards on a CPU
    run = Run("unet", unet, steps, 1.2e-3, average=0.998, folder=BUILD)
    encoder, latents = text_encoder(), latents_of(vae)
    noise_schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    snr = noise_schedule.alphas_cumprod / (1 - noise_schedule.alphas_cumprod)
    weights = snr.clamp(max=5) / snr
    rng = random.Random(SEED + run.step)
    styles, objects = list(STYLES), list(OBJECTS)

    def loss() -> Tensor:
        picked = draw(latents.shape[1], batch)
        captions = [
            draw_caption(rng, styles[i // len(objects)], objects[i % len(objects)])
            for i in picked.tolist()
        ]
        with torch.no_grad():
            context = encoder(tokenize(captions, text.POSITIONS)).last_hidden_state
        x = latents[draw(len(latents), batch), picked]
        t = draw(1000, batch)
        noise = torch.randn_like(x)
        noisy = noise_schedule.add_noise(x, noise, t)
        with autocast():
            predicted = unet(noisy, t, context).sample
        error = (predicted.float() - noise).pow(2).mean((1, 2, 3))
        return (weights[t] * error).mean()

    run.go(loss)
    return unet


#: What reads text, and so is not the first canvas's.
KEYS = ("attn2.to_k.weight", "attn2.to_v.weight")


def train_judge(steps: int = 1500, batch: int = 96) -> Judge:
    """Half of what the judge sees are pictures through the VAE, so that it judges drawing and
    not sharpness."""
    judge = Judge(objects=len(OBJECTS))
    run = Run("judge", judge, steps, 2e-3, average=0.99, folder=BUILD)
    shown = pictures()
    styles = torch.arange(len(STYLES)).repeat_interleave(len(OBJECTS))
    objects = torch.arange(len(OBJECTS)).repeat(len(STYLES))
    if run.step < steps:
        vae = trained_vae()
        torch.manual_seed(SEED + run.step)
        pool = [augmented(shown) for _ in range(6)]
        with torch.no_grad(), autocast():
            for i in range(3):
                for part in torch.arange(len(shown)).split(64):
                    drawn = vae(pool[i][part] * 2 - 1).sample.float()
                    pool[i][part] = (drawn / 2 + 0.5).clamp(0, 1)
        pool_pictures = torch.cat(pool)

    def loss() -> Tensor:
        judge.train()
        picked = draw(len(pool_pictures), batch)
        x = augmented(pool_pictures[picked], 0.05, 0.1)
        x = (x + 0.03 * torch.randn(batch, 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)
        with autocast():
            style, obj = judge(x)
        label = picked % len(shown)
        return F.cross_entropy(style.float(), styles[label], label_smoothing=0.05) + (
            F.cross_entropy(obj.float(), objects[label], label_smoothing=0.05)
        )

    run.go(loss)
    with torch.no_grad():
        heads = [torch.cat(h) for h in zip(*map(judge, augmented(shown).split(96)), strict=True)]
    right = [
        (head.argmax(1) == label).float().mean().item()
        for head, label in zip(heads, (styles, objects), strict=True)
    ]
    print(f"judge on fresh augmentations: style {right[0]:.3f} object {right[1]:.3f}", flush=True)
    return judge


if __name__ == "__main__":
    stages = sys.argv[1:] or ["vae", "unet", "judge"]
    for name, train in {"vae": train_vae, "unet": train_unet, "judge": train_judge}.items():
        if name in stages:
            train()
