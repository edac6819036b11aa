"""Train the emoji canvas's Stable Diffusion and its judge from nothing.

    python -m examples.emoji.train            # all stages, about 90 minutes on 2 cores
    python -m examples.emoji.train unet       # up to one stage: vae, text, unet, judge

Each stage saves its state under ``build/emoji/`` every minute and goes on from it when started
again; a finished stage is not repeated. ``python -m examples.emoji.pack`` then writes the two
committed files. An accelerator is used when torch finds one.
"""

import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from examples.emoji.canvas import BUILD, OBJECTS, STYLES, load_canvas
from examples.emoji.captions import draw_caption, every_caption
from examples.emoji.networks import (
    POSITIONS,
    Judge,
    TextReader,
    make_text_encoder,
    make_unet,
    make_vae,
)
from sepme_cli.diffusion.tokenizer import END, START, tokenize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 0


def autocast() -> AbstractContextManager:
    return torch.autocast(DEVICE, dtype=torch.bfloat16)


class Run:
    """One stage's loop: warm-up and cosine rate, an average of the weights, checkpoints."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        steps: int,
        rate: float,
        average: float = 0.0,
        folder: Path = BUILD,
    ) -> None:
        self.path = folder / f"{name}.pt"
        self.name, self.module, self.steps = name, module.to(DEVICE), steps
        self.optimiser = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, rate, total_steps=steps, pct_start=0.05
        )
        self.decay = average
        self.averaged = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=DEVICE)
            module.load_state_dict(state["module"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.averaged, self.step = state["averaged"], state["step"]
            # Not the schedule that was saved: a run can be made longer or shorter meanwhile.
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimiser, rate, total_steps=steps, pct_start=0.05, last_epoch=self.step - 1
            )

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def go(self, loss_of: Callable[[], Tensor]) -> None:
        """Optimise to the last step, then leave the averaged weights in the module."""
        torch.manual_seed(SEED + self.step)
        started = saved = time.monotonic()
        first, running = self.step, 0.0
        while self.step < self.steps:
            loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.schedule.step()
            self.step += 1
            decay = min(self.decay, self.step / (self.step + 10))
            for key, value in self.module.state_dict().items():
                if value.is_floating_point():
                    self.averaged[key].lerp_(value, 1 - decay)
                else:
                    self.averaged[key].copy_(value)
            running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
            if self.step % 100 == 0:
                pace = (time.monotonic() - started) / (self.step - first)
                left = pace * (self.steps - self.step) / 60
                print(
                    f"{self.name} {self.step}/{self.steps} loss {running:.4f} "
                    f"{pace:.2f} s/step {left:.0f} min left",
                    flush=True,
                )
            if time.monotonic() - saved > 60 or self.step == self.steps:
                self.save()
                saved = time.monotonic()
        self.module.load_state_dict(self.averaged)
        self.module.eval()


def augment(
    pictures: Tensor, shift: float = 0.06, zoom: float = 0.06, beyond: str = "zeros"
) -> Tensor:
    """Shifted and zoomed copies. pictures float [n, 3, h, w] in [0, 1]. beyond: what comes in at
    the edges, "zeros" for white, "border" for what is there."""
    count = len(pictures)
    theta = torch.zeros(count, 2, 3, device=pictures.device)
    scale = 1.04 + zoom * (2 * torch.rand(count, device=pictures.device) - 1)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = 2 * shift * (2 * torch.rand(count, 2, device=pictures.device) - 1)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(1 - pictures, grid, padding_mode=beyond, align_corners=False)
    return (1 - moved).clamp(0, 1)


def pictures_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [styles * objects, 3, 64, 64] in [0, 1], style labels and object labels."""
    canvas = torch.from_numpy(load_canvas()).permute(0, 1, 4, 2, 3).float() / 255
    styles = torch.arange(len(STYLES)).repeat_interleave(len(OBJECTS))
    objects = torch.arange(len(OBJECTS)).repeat(len(STYLES))
    return canvas.flatten(0, 1).to(DEVICE), styles.to(DEVICE), objects.to(DEVICE)


def draw(count: int, size: int) -> Tensor:
    return torch.randint(count, (size,), device=DEVICE)


def vae_loss(vae: AutoencoderKL, pictures: Tensor, colour: float) -> Tensor:
    """Pictures [n, 3, h, w] in [0, 1] through the VAE, against themselves: values, edges, and,
    times colour, fields of colour."""

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    x = pictures * 2 - 1
    with autocast():
        latent = vae.encode(x).latent_dist
        drawn = vae.decode(latent.sample()).sample
    drawn = drawn.float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(slopes(drawn), slopes(x), strict=True))
    fields = F.mse_loss(F.avg_pool2d(drawn, 4), F.avg_pool2d(x, 4)) + F.mse_loss(drawn, x)
    divergence = 5e-4 * latent.kl().mean() / 1024
    return F.l1_loss(drawn, x) + 0.5 * edges + colour * fields + divergence


def train_vae(steps: int = 2000, colour_steps: int = 1200, batch: int = 16) -> AutoencoderKL:
    """First lines, then colours: on line art the L1 loss alone leaves hues half learned."""
    vae = make_vae()
    pictures, _, _ = pictures_and_labels()

    def loss(colour: float) -> Tensor:
        return vae_loss(vae, augment(pictures[draw(len(pictures), batch)]), colour)

    Run("vae", vae, steps, 2e-3, average=0.995).go(lambda: loss(0.0))
    Run("vae_colour", vae, colour_steps, 1.5e-3, average=0.995).go(lambda: loss(4.0))
    return vae


def vocabulary() -> Tensor:
    """The token ids that captions use, sorted; a caption's compact id is its place in here + 1."""
    return tokenize(every_caption(), POSITIONS).unique()


def compact(ids: Tensor, known: Tensor) -> Tensor:
    """CLIP's ids to places in the compact table, whose row 0 is every token never seen."""
    place = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
    return torch.where(known[place] == ids, place + 1, 0)


def train_text(steps: int = 300, batch: int = 128) -> nn.Module:
    """The text encoder learns to say, after the caption's end, which style and object it names.

    Words it will never see again (row 0, always zero) are strewn in, so that a prompt with
    unknown words still says what its known words say.
    """
    known = vocabulary()
    encoder = make_text_encoder(len(known) + 1)
    model = nn.ModuleDict({"encoder": encoder, "reader": TextReader()})
    run = Run("text", model, steps, 1e-3)
    rng = random.Random(SEED + run.step)
    styles, objects = list(STYLES), list(OBJECTS)
    content = tokenize([*styles, *objects, *(s + "s" for s in objects)], POSITIONS).unique()

    def loss() -> Tensor:
        captions, style, obj = [], [], []
        for _ in range(batch):
            s, o = rng.randrange(len(styles)), rng.randrange(len(objects))
            caption, names_style, names_object = draw_caption(rng, styles[s], objects[o])
            captions.append(caption)
            style.append(s if names_style else len(styles))
            obj.append(o if names_object else len(objects))
        ids = tokenize(captions, POSITIONS)
        ended = (ids == END).to(DEVICE)
        forgettable = ~torch.isin(ids, torch.cat([content, torch.tensor([START, END])]))
        forgotten = forgettable & (torch.rand(ids.shape) < 0.15)
        rows = torch.where(forgotten, 0, compact(ids, known)).to(DEVICE)
        encoder.get_input_embeddings().weight.data[0] = 0
        with autocast():
            hidden = encoder(rows).last_hidden_state
        style_logits, object_logits = model["reader"](hidden.float()[ended])
        repeats = ended.sum(1)
        style_labels = torch.tensor(style, device=DEVICE).repeat_interleave(repeats)
        object_labels = torch.tensor(obj, device=DEVICE).repeat_interleave(repeats)
        return F.cross_entropy(style_logits, style_labels) + F.cross_entropy(
            object_logits, object_labels
        )

    run.go(loss)
    encoder.get_input_embeddings().weight.data[0] = 0
    return encoder


def train_judge(vae: AutoencoderKL, steps: int = 900, batch: int = 96) -> nn.Module:
    """Half of what the judge sees are pictures through the VAE, so that it judges drawing and
    not sharpness."""
    judge = Judge()
    run = Run("judge", judge, steps, 2e-3, average=0.99)
    pictures, styles, objects = pictures_and_labels()
    pool = [augment(pictures) for _ in range(24)]
    with torch.no_grad(), autocast():
        for i in range(12):
            for part in torch.arange(len(pictures), device=DEVICE).split(32):
                drawn = vae(pool[i][part] * 2 - 1).sample.float()
                pool[i][part] = (drawn / 2 + 0.5).clamp(0, 1)
    pool_pictures = torch.cat(pool)

    def loss() -> Tensor:
        judge.train()
        picked = draw(len(pool_pictures), batch)
        x = augment(pool_pictures[picked], 0.04, 0.08)
        x = (x + 0.03 * torch.randn(batch, 1, 1, 1, device=DEVICE) * torch.randn_like(x)).clamp(
            0, 1
        )
        with autocast():
            style, obj = judge(x)
        label = picked % len(pictures)
        return F.cross_entropy(style.float(), styles[label], label_smoothing=0.05) + (
            F.cross_entropy(obj.float(), objects[label], label_smoothing=0.05)
        )

    run.go(loss)
    with torch.no_grad():
        right = [
            (head.argmax(1) == label).float().mean().item()
            for head, label in zip(judge(augment(pictures)), (styles, objects), strict=True)
        ]
    print(f"judge on fresh augmentations: style {right[0]:.3f} object {right[1]:.3f}", flush=True)
    return judge


@torch.no_grad()
def encode_captions(encoder: nn.Module) -> tuple[dict[str, int], Tensor]:
    """Every caption's hidden states [captions, positions, width], and its row."""
    captions, known = every_caption(), vocabulary()
    rows = compact(tokenize(captions, POSITIONS), known).to(DEVICE)
    hidden = torch.cat([encoder(part).last_hidden_state for part in rows.split(512)])
    return {caption: i for i, caption in enumerate(captions)}, hidden


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, copies: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of augmented pictures [copies, pictures, 4, 16, 16], each channel at mean 0 and
    deviation 1, and the means and deviations [4] that `examples.emoji.pack` folds into the VAE."""
    pictures, _, _ = pictures_and_labels()
    torch.manual_seed(SEED)
    latents = []
    for _ in range(copies):
        x = augment(pictures) * 2 - 1
        with autocast():
            latents.append(
                torch.cat([vae.encode(part).latent_dist.mean for part in x.split(48)]).float()
            )
    stacked = torch.stack(latents)
    mean, deviation = stacked.mean((0, 1, 3, 4)), stacked.std((0, 1, 3, 4))
    return (stacked - mean[:, None, None]) / deviation[:, None, None], mean, deviation


def train_unet(
    vae: AutoencoderKL, encoder: nn.Module, steps: int = 6000, batch: int = 32
) -> nn.Module:
    """Epsilon prediction on Stable Diffusion's schedule, with min-SNR-5 weights."""
    unet = make_unet()
    unet.set_attn_processor(AttnProcessor())  # the fused attention is slow backwards on a CPU
    run = Run("unet", unet, steps, 1e-3, average=0.998)
    row_of, hidden = encode_captions(encoder)
    latents, mean, deviation = encode_pictures(vae)
    torch.save({"mean": mean, "deviation": deviation}, BUILD / "latents.pt")
    noise_schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    alphas = noise_schedule.alphas_cumprod.to(DEVICE)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / snr
    rng = random.Random(SEED + run.step)
    styles, objects = list(STYLES), list(OBJECTS)

    def loss() -> Tensor:
        picked = draw(latents.shape[1], batch)
        captions = [
            draw_caption(rng, styles[i // len(objects)], objects[i % len(objects)])[0]
            for i in picked.tolist()
        ]
        context = hidden[[row_of[caption] for caption in captions]]
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


def main(stages: list[str]) -> None:
    torch.manual_seed(SEED)
    BUILD.mkdir(parents=True, exist_ok=True)
    vae = train_vae()
    if "text" in stages or "unet" in stages:
        encoder = train_text()
        if "unet" in stages:
            train_unet(vae, encoder)
    if "judge" in stages:
        train_judge(vae)


if __name__ == "__main__":
    main(sys.argv[1:] or ["vae", "text", "unet", "judge"])
