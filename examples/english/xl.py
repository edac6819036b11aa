"""The canvas's XL sister: a small Stable Diffusion XL on the same pictures.

    python -m examples.english.xl train    # the second text encoder, then the UNet
    python -m examples.english.xl pack     # write build/english/xl/xl.safetensors
    python -m examples.english.xl report   # what the judge recognises, and what each stream says

The first text encoder is the canvas's, the second one of another shape and seed with OpenCLIP's
names, whose projection of the end of text is the teacher's embedding of the whole: the pooled
output. The UNet starts from the canvas's and learns its predictions. It reads both encoders' last
layer but one, side by side, and the pooled output beside the time step. In many captions it is
given one of the two alone, so that it reads both.
"""

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from benchmarks.english import ASKED, JUDGE, caption
from benchmarks.openclip import openclip_names
from examples.emoji.networks import load_judge
from examples.emoji.pack import LATENT_SCALE, fold_latent_scale, single_file
from examples.emoji.train import SEED, Run, autocast, draw
from examples.english import text
from examples.english.canvas import OBJECTS, STYLES
from examples.english.captions import UNSEEN_PAIR, draw_caption
from examples.english.train import SHIPPED, latents_of, networks, text_encoder
from examples.english.words import BUILD
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise, sample_latents
from sepme_cli.diffusion.tokenizer import END, tokenize

FOLDER = BUILD / "xl"
FILE = FOLDER / "xl.safetensors"
SECOND = "text-wide"
STEPS = 4200
SIDE = 64
#: Heights and widths, as XL is told them: of the original, of the crop's corner, of the picture.
SIZES = (SIDE, SIDE, 0, 0, SIDE, SIDE)
SIZE_WIDTH = 32
XL_LATENT_SCALE = 0.13025
STATES_ALONE, POOLED_ALONE = 0.12, 0.4
"""How often the UNet is given the states alone, and how often the pooled output alone. With 12% of
each, it read nothing of the pooled output."""
TEXT_BITS, UNET_BITS = 5, 6
"""Of fp16's ten bits of a fraction, those that are kept: zeros compress."""


def rounded(value: Tensor, bits: int) -> Tensor:
    """fp16 with the fraction rounded to this many of its ten bits."""
    dropped = 10 - bits
    whole = value.half().contiguous().view(torch.int16) + (1 << (dropped - 1))
    return (whole & -(1 << dropped)).view(torch.half)


@dataclass(frozen=True)
class Texts:
    """Both text encoders, rounded as they are shipped. projection: [pooled, width]."""

    first: CLIPTextModel
    second: CLIPTextModel
    projection: Tensor

    @staticmethod
    def trained() -> "Texts":
        first, second = text_encoder(), text.make_encoder(text.VARIANTS[SECOND])
        second.load_state_dict(text.state(SECOND, FOLDER))
        second.eval().requires_grad_(False)
        for encoder in (first, second):
            state = encoder.state_dict()
            encoder.load_state_dict({k: rounded(v, TEXT_BITS).float() for k, v in state.items()})
        return Texts(first, second, projection_of(second))

    @property
    def width(self) -> int:
        return int(self.first.config.hidden_size + self.second.config.hidden_size)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States [n, positions, width] and pooled output [n, pooled], as XL reads them."""
        ids = [tokenize(captions, text.POSITIONS, padding=pads) for pads in (END, 0)]
        one = self.first(ids[0], output_hidden_states=True)
        two = self.second(ids[1], output_hidden_states=True)
        ends = (ids[1] == END).int().argmax(1)
        pooled = two.last_hidden_state[torch.arange(len(ends)), ends] @ self.projection.T
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), pooled


@torch.no_grad()
def projection_of(second: CLIPTextModel) -> Tensor:
    """Give the second encoder OpenCLIP's activation, and return the projection [384, width] that
    makes of its ends of text the sentence embeddings that it was trained to, but for the bias."""
    averaged = torch.load(FOLDER / f"{SECOND}.pt", map_location="cpu")["averaged"]
    rng = random.Random(SEED)
    captions = [draw_caption(rng, s, o) for s in STYLES for o in OBJECTS]
    ids = tokenize(captions, text.POSITIONS, padding=0)
    rows, ends = torch.arange(len(ids)), (ids == END).int().argmax(1)
    sentences = second(ids).last_hidden_state[rows, ends] @ averaged["sentence.weight"].T
    for layer in second.encoder.layers:
        layer.mlp.activation_fn = nn.GELU()
    states = second(ids).last_hidden_state[rows, ends]
    found = torch.linalg.lstsq(states, sentences + averaged["sentence.bias"]).solution.T
    return rounded(found, TEXT_BITS).float()


def make_unet(width: int, pooled: int) -> UNet2DConditionModel:
    """The canvas's UNet with XL's traits: 64-wide heads, matrices around the attention, two
    transformers on the lowest level, and what embeds pooled text and sizes."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 3),
        cross_attention_dim=width,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=pooled + len(SIZES) * SIZE_WIDTH,
    )


@torch.no_grad()
def start_from(canvas: UNet2DConditionModel, unet: UNet2DConditionModel, states: Tensor) -> None:
    """Give a new UNet the canvas's weights.

    states: [canvas's width, width], a map from the new encoders' states to the canvas's, by which
    keys and values read what they read there. What the canvas does not have begins by adding
    nothing. Heads are of another number, so that attention is to be learned again.
    """
    there = canvas.state_dict()
    for name, value in unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) and name in there:
            value.copy_(there[name] @ states)
        elif name in there:
            value.copy_(there[name].reshape(value.shape))
        elif name.startswith("add_embedding.linear_2") or (
            ".transformer_blocks.1." in name and (".to_out.0." in name or ".ff.net.2." in name)
        ):
            value.zero_()


def sizes_of(count: int) -> Tensor:
    return torch.tensor(SIZES, dtype=torch.float32).expand(count, -1)


def predicts(unet: nn.Module, noisy: Tensor, t: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
    added = {"text_embeds": pooled, "time_ids": sizes_of(len(pooled))}
    found: Tensor = unet(noisy, t, states, added_cond_kwargs=added).sample
    return found.float()


def one_alone(read: tuple[Tensor, Tensor], blank: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """States and pooled output with one of the two, now and then, that of the blank prompt."""
    states, pooled = read
    which = torch.rand(len(states))
    states = torch.where((which < POOLED_ALONE)[:, None, None], blank[0], states)
    return states, torch.where((which > 1 - STATES_ALONE)[:, None], blank[1], pooled)


def train_unet(steps: int = STEPS, batch: int = 32) -> nn.Module:
    """Learn what the canvas's UNet predicts, by min-SNR-5 weights: its predictions are the mean of
    the noise that they were learned from, and so take a fraction of the steps."""
    texts, encoder = Texts.trained(), text_encoder()
    teacher, vae = networks(SHIPPED)
    rng = random.Random(SEED)
    styles, objects = list(STYLES), list(OBJECTS)

    def caption_of(picture: int) -> str:
        return draw_caption(rng, styles[picture // len(objects)], objects[picture % len(objects)])

    def canvas_reads(captions: Sequence[str]) -> Tensor:
        with torch.no_grad():
            read: Tensor = encoder(tokenize(captions, text.POSITIONS)).last_hidden_state
        return read

    blank = texts.read([""])
    unet = make_unet(texts.width, blank[1].shape[1])
    if not (FOLDER / "unet.pt").exists():
        torch.manual_seed(SEED)
        some = [caption_of(i) for i in draw(len(styles) * len(objects), 1500).tolist()]
        new, old = texts.read(some)[0].flatten(0, 1), canvas_reads(some).flatten(0, 1)
        fitted = torch.linalg.lstsq(new, old).solution.T
        error = (new @ fitted.T - old).pow(2).mean() / old.var()
        print(f"states mapped to the canvas's, but for {error:.4f} of the variance", flush=True)
        start_from(teacher, unet, fitted)
    unet.set_attn_processor(AttnProcessor())  # the fused attention is slow backwards on a CPU
    run = Run("unet", unet, steps, 1e-3, average=0.995, folder=FOLDER)
    latents = latents_of(vae)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights = snr.clamp(max=5) / snr
    rng = random.Random(SEED + run.step)

    def loss() -> Tensor:
        picked = draw(latents.shape[1], batch)
        captions = [caption_of(i) for i in picked.tolist()]
        x = latents[draw(len(latents), batch), picked]
        t = draw(1000, batch)
        noisy = schedule.add_noise(x, torch.randn_like(x), t)
        with torch.no_grad(), autocast():
            wanted = teacher(noisy, t, canvas_reads(captions)).sample.float()
        with autocast():
            predicted = predicts(unet, noisy, t, *one_alone(texts.read(captions), blank))
        return (weights[t] * (predicted - wanted).pow(2).mean((1, 2, 3))).mean()

    run.go(loss)
    return unet


def vae_for_xl() -> dict[str, Tensor]:
    """The canvas's VAE, for whose latents XL has another factor."""
    state = networks(SHIPPED)[1].state_dict()
    channels = state["post_quant_conv.weight"].shape[0]
    factor = torch.full((channels,), XL_LATENT_SCALE / LATENT_SCALE / LATENT_SCALE)
    fold_latent_scale(state, torch.zeros(channels), factor)
    return state


def tensors() -> dict[str, Tensor]:
    """All tensors of the single file, fp16, by XL's names."""
    unet = torch.load(FOLDER / "unet.pt", map_location="cpu")["averaged"]
    added = {n: v for n, v in unet.items() if n.startswith("add_embedding.")}
    rest = {n: v for n, v in unet.items() if n not in added}
    found = {n: rounded(v, UNET_BITS) for n, v in single_file(rest, vae_for_xl(), {}).items()}
    for name, value in added.items():
        number, leaf = name.removeprefix("add_embedding.linear_").split(".")
        place = f"model.diffusion_model.label_emb.0.{2 * int(number) - 2}.{leaf}"
        found[place] = rounded(value, UNET_BITS)
    texts = Texts.trained()
    first, second = (
        {n.removeprefix("text_model."): v for n, v in encoder.state_dict().items()}
        for encoder in (texts.first, texts.second)
    )
    second = openclip_names({**second, "text_projection.weight": texts.projection})
    prefixes = ("0.transformer.text_model.", "1.model.")
    for prefix, state in zip(prefixes, (first, second), strict=True):
        found |= {f"conditioner.embedders.{prefix}{n}": v.half() for n, v in state.items()}
    return {n: v.contiguous() for n, v in found.items()}


def pack() -> None:
    """Write the single file."""
    save_file(tensors(), FILE, metadata={"modelspec.resolution": f"{SIDE}x{SIDE}"})
    print(f"{FILE}: {FILE.stat().st_size / 1e6:.1f} MB")


#: What a prompt's streams are replaced by: name -> (of the states, of the pooled output).
DOORS = {
    "both its own": ("own", "own"),
    "pooled of another": ("own", "other"),
    "states of another": ("other", "own"),
    "pooled blank": ("own", "blank"),
    "states blank": ("blank", "own"),
}


def report(every: int = 22, steps: int = 10, guidance: float = 3.0) -> None:
    """What the judge recognises of the packed model: as asked for, in phrasings that training
    never saw, and with one of the two streams of another prompt or of the blank one.

    every: the objects of a style are looked at one in so many.
    """
    judge = load_judge(str(JUDGE))
    with open_checkpoint(FILE) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"))
        for phrasing, templates in (("seen", ASKED), ("unseen", UNSEEN_PAIR)):
            asked = [
                caption(s, o, templates)
                for s in range(len(STYLES))
                for o in range(s, len(OBJECTS), every)
            ]
            turned = asked[len(asked) // 2 :] + asked[: len(asked) // 2]
            own = model.text.condition([one.text for one in asked])
            blank = model.text.condition([""])
            streams = {
                "own": own,
                "other": model.text.condition([one.text for one in turned]),
                "blank": blank.repeated(len(asked)),
            }
            noise = initial_noise(model.latent_shape(None), [one.seed for one in asked])
            for name, (states, pooled) in DOORS.items():
                if phrasing == "unseen" and name != "both its own":
                    continue
                read = Conditioning(streams[states].states, streams[pooled].pooled)
                latents = sample_latents(
                    model, read, noise, blank=blank, steps=steps, guidance=guidance
                )
                with torch.no_grad():
                    found = [head.argmax(1) for head in judge(model.vae.decode(latents))]
                shares = [
                    (found[kind == "object"] == torch.tensor([getattr(c, kind) for c in whose]))
                    .float()
                    .mean()
                    .item()
                    for whose in (asked, turned)
                    for kind in ("style", "object")
                ]
                print(
                    f"{phrasing} phrasings, {name}, {len(asked)} pictures: its own style "
                    "{:.3f} and object {:.3f}, the other's {:.3f} and {:.3f}".format(*shares),
                    flush=True,
                )


def train() -> None:
    """The second text encoder, then the UNet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / f"{SECOND}.pt").exists():
        text.train(SECOND)
        for name in (f"{SECOND}.pt", f"{SECOND}-ids.pt"):
            shutil.copy(BUILD / name, FOLDER / name)
    train_unet()


if __name__ == "__main__":
    parts: dict[str, Callable[..., object]] = {"train": train, "pack": pack, "report": report}
    for name in sys.argv[1:] or parts:
        parts[name]()
