"""The canvas's SD 3 sister: a small Stable Diffusion 3 on the same pictures.

    python -m examples.english.sd3 train    # the T5, then the transformer
    python -m examples.english.sd3 pack     # write build/english/sd3/: a model folder
    python -m examples.english.sd3 report   # what the judge recognises, and what each stream says

Two text encoders are the canvas's and one of another shape, each with a projection to the
teacher's embedding of the whole, the pooled output. The third is a small T5 with a vocabulary of
its own. The transformer (an MMDiT) starts from nothing and learns the velocity of rectified flow:
what the canvas's UNet says of an image, as far as it is not mostly noise. Rows of CLIP, rows of T5
and pooled output are each zeros in a third of the captions (in Stable Diffusion 3's training it was
the text encoders that were left out), so that each of them alone says what to draw. To learn in two
hours, it draws a third of the canvas's objects.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import UnigramTrainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from benchmarks.english import ASKED, JUDGE, caption
from examples.emoji.networks import load_judge
from examples.emoji.train import SEED, Run, autocast, draw
from examples.english import text
from examples.english.canvas import OBJECTS, STYLES
from examples.english.captions import UNSEEN_PAIR, draw_caption
from examples.english.corpus import Corpus
from examples.english.train import SHIPPED, latents_of, networks, text_encoder
from examples.english.words import BUILD
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise, sample_latents
from sepme_cli.diffusion.tokenizer import END, tokenize

FOLDER = BUILD / "sd3"
MODEL = FOLDER / "model"
SECOND = "text-narrow"
STEPS = 4200
WIDTH = 256
LAYERS = 6
PIECES = 4000
"""The vocabulary of T5."""
LEFT_OUT = 1 / 3
"""How often rows of CLIP, rows of T5 and pooled output are zeros."""
MOSTLY_NOISE = 0.7
"""The share of noise above which the canvas's UNet, which predicts noise, says little of an
image."""
DRAWN = list(OBJECTS)[::3]
PAD, STOP, UNKNOWN = "<pad>", "</s>", "<unk>"


def make_t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=PIECES,
            d_model=width,
            d_kv=64,
            d_ff=1024,
            num_layers=3,
            num_heads=width // 64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def t5_tokenizer() -> Tokenizer:
    """T5's kind of tokenizer: pieces of words by their frequency, a stop, padded to 24."""
    path = FOLDER / "tokenizer.json"
    if not path.exists():
        corpus, rng = Corpus(), random.Random(SEED)
        texts = [corpus.draw(rng) for _ in range(60_000)] + [*OBJECTS, *STYLES] * 20
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        made.train_from_iterator(
            texts,
            UnigramTrainer(
                vocab_size=PIECES, special_tokens=[PAD, STOP, UNKNOWN], unk_token=UNKNOWN
            ),
        )
        made.post_processor = processors.TemplateProcessing(
            single=f"$A {STOP}", special_tokens=[(STOP, 1)]
        )
        made.save(str(path))
    found = Tokenizer.from_file(str(path))
    found.enable_truncation(text.POSITIONS)
    found.enable_padding(length=text.POSITIONS, pad_id=0, pad_token=PAD)
    return found


class Student(nn.Module):
    """T5 with the two linear maps that compare it to the teacher."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = make_t5(width)
        self.sentence = nn.Linear(width, text.Teacher.width)
        self.word = nn.Linear(width, text.Teacher.width)


def train_t5(width: int, steps: int = 500) -> T5EncoderModel:
    """Distil T5 as `text.train` distils CLIP: the stop and the padding learn the teacher's
    embedding of the whole, each word's last piece the teacher's state of the word."""
    torch.manual_seed(SEED)
    tokenizer, student, corpus = t5_tokenizer(), Student(width), Corpus()
    with torch.no_grad():  # T5's own start is for a width of thousands
        student.encoder.shared.weight.normal_(0, 1)
    run = Run("t5", student, steps, 1e-3, average=0.99, folder=FOLDER)
    if run.step < steps:
        master = text.Teacher()
    rng = random.Random(SEED + run.step)

    def loss() -> Tensor:
        texts = [corpus.draw(rng) for _ in range(128)]
        embeddings, states, theirs = master(texts)
        found = tokenizer.encode_batch(texts)
        ids = torch.tensor([one.ids for one in found])
        with autocast():
            hidden = student.encoder(ids).last_hidden_state.float()
        stops = (ids == 1).int().argmax(1)
        later = stops + (torch.rand(len(ids)) * (ids.shape[1] - stops)).long()
        rows, wanted = torch.arange(len(ids)), embeddings @ embeddings.T
        total = torch.zeros(())
        for place in (stops, later):
            said = F.normalize(student.sentence(hidden[rows, place]), dim=-1)
            total = total + 0.5 * (1 - (said * embeddings).sum(-1)).mean()
            own = F.normalize(hidden[rows, place], dim=-1)
            total = total + 2.5 * (said @ said.T - wanted).pow(2).mean()
            total = total + 0.5 * (own @ own.T - wanted).pow(2).mean()
        at = []
        for i, one in enumerate(found):
            ends = {stop: place for place, (_, stop) in enumerate(one.offsets) if stop}
            ours = [ends.get(end) for end in text.word_ends(texts[i])]
            at += [(i, a, b) for a, b in zip(ours, theirs[i], strict=False) if a is not None]
        i, a, b = torch.tensor(at).T
        word = F.normalize(student.word(hidden[i, a]), dim=-1)
        return total + 0.5 * (1 - (word * F.normalize(states[i, b], dim=-1)).sum(-1)).mean()

    run.go(loss)
    return student.encoder.half().float().eval().requires_grad_(False)


@torch.no_grad()
def projection_of(encoder: CLIPTextModel, averaged: dict[str, Tensor], padding: int) -> Tensor:
    """[384, width]: what makes of ends of text the sentence embeddings that they were trained to,
    but for the bias."""
    rng = random.Random(SEED)
    captions = [draw_caption(rng, s, o) for s in STYLES for o in OBJECTS]
    ids = tokenize(captions, text.POSITIONS, padding=padding)
    states = encoder(ids).last_hidden_state[torch.arange(len(ids)), (ids == END).int().argmax(1)]
    said = states @ averaged["sentence.weight"].T + averaged["sentence.bias"]
    return torch.linalg.lstsq(states, said).solution.T.half().float()


@dataclass(frozen=True)
class Texts:
    """The three text encoders, rounded as they are shipped, and the projections of the first
    two."""

    clips: tuple[CLIPTextModel, CLIPTextModel]
    projections: tuple[Tensor, Tensor]
    t5: T5EncoderModel
    tokenizer: Tokenizer

    @staticmethod
    def trained() -> "Texts":
        first, second = text_encoder(), text.make_encoder(text.VARIANTS[SECOND])
        second.load_state_dict({k: v.half().float() for k, v in text.state(SECOND).items()})
        second.eval().requires_grad_(False)
        for layer in second.encoder.layers:
            layer.mlp.activation_fn = nn.GELU()  # the second of Stable Diffusion 3 has this one
        averaged = [
            torch.load(BUILD / f"{name}.pt", map_location="cpu")["averaged"]
            for name in (text.CANVAS, SECOND)
        ]
        return Texts(
            (first, second),
            (projection_of(first, averaged[0], END), projection_of(second, averaged[1], 0)),
            train_t5(first.config.hidden_size + second.config.hidden_size),
            t5_tokenizer(),
        )

    @property
    def width(self) -> int:
        return int(self.t5.config.d_model)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of CLIP [n, 24, width], rows of T5 [n, 24, width], pooled output [n, 768]."""
        rows, pooled = [], []
        for encoder, projection, pads in zip(self.clips, self.projections, (END, 0), strict=True):
            ids = tokenize(captions, text.POSITIONS, padding=pads)
            found = encoder(ids, output_hidden_states=True)
            ends = (ids == END).int().argmax(1)
            rows.append(found.hidden_states[-2])
            pooled.append(found.last_hidden_state[torch.arange(len(ids)), ends] @ projection.T)
        ids = torch.tensor([one.ids for one in self.tokenizer.encode_batch(list(captions))])
        both = torch.cat(rows, -1)
        both = F.pad(both, (0, self.width - both.shape[-1]))
        return both, self.t5(ids).last_hidden_state, torch.cat(pooled, -1)


def make_transformer(width: int, pooled: int) -> SD3Transformer2DModel:
    made = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=width,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=pooled,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    with torch.no_grad():  # each block begins by adding nothing, as diffusion transformers do
        for name, value in made.named_parameters():
            modulates = ".norm1.linear." in name or ".norm1_context.linear." in name
            if modulates or name.startswith(("proj_out.", "norm_out.linear.")):
                value.zero_()
    return made


def left_out(read: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The streams, each zeros for a third of the captions."""
    clip, t5, pooled = (
        part * (torch.rand(len(part)) >= LEFT_OUT).view(-1, *[1] * (part.dim() - 1))
        for part in read
    )
    return clip, t5, pooled


def train_transformer(steps: int = STEPS, batch: int = 32) -> nn.Module:
    texts, encoder = Texts.trained(), text_encoder()
    teacher, vae = networks(SHIPPED)
    latents = latents_of(vae)
    rng = random.Random(SEED)
    styles, objects = list(STYLES), list(OBJECTS)
    places = torch.tensor(
        [s * len(objects) + objects.index(o) for s in range(len(styles)) for o in DRAWN]
    )
    torch.manual_seed(SEED)
    transformer = make_transformer(texts.width, texts.read([""])[2].shape[1])
    count = sum(p.numel() for p in transformer.parameters())
    print(f"{count / 1e6:.1f} M parameters, {len(places)} pictures", flush=True)
    run = Run("transformer", transformer, steps, 1e-3, average=0.998, folder=FOLDER)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noise_to_signal = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    rng = random.Random(SEED + run.step)

    known: dict[str, tuple[Tensor, ...]] = {}

    def remembered(captions: Sequence[str]) -> list[Tensor]:
        """What the text encoders read, each caption read once."""
        if new := [one for one in dict.fromkeys(captions) if one not in known]:
            read = [part.half() for part in texts.read(new)]
            known.update(zip(new, zip(*read, strict=True), strict=True))
        rows = zip(*(known[one] for one in captions), strict=True)
        return [torch.stack(part).float() for part in rows]

    def velocity(
        noisy: Tensor, sigma: Tensor, captions: Sequence[str], x: Tensor, noise: Tensor
    ) -> Tensor:
        """The canvas's velocity of what is not mostly noise, else that of the image itself."""
        ratio = (sigma / (1 - sigma)).flatten()
        t = torch.searchsorted(noise_to_signal, ratio).clamp(max=999)
        scale = ((1 - sigma) ** 2 + sigma**2).sqrt()
        with torch.no_grad(), autocast():
            states = encoder(tokenize(captions, text.POSITIONS)).last_hidden_state
            eps = teacher(noisy / scale, t, states).sample.float()
        image = (noisy - sigma * eps) / (1 - sigma)
        return torch.where(sigma < MOSTLY_NOISE, eps - image, noise - x)

    def loss() -> Tensor:
        picked = places[draw(len(places), batch)]
        captions = [
            draw_caption(rng, styles[i // len(objects)], objects[i % len(objects)])
            for i in picked.tolist()
        ]
        x = latents[draw(len(latents), batch), picked]
        sigma = torch.sigmoid(torch.randn(batch) * 1.2 + 0.3).clamp(0.002, 0.998)
        noise, sigma = torch.randn_like(x), sigma.view(-1, 1, 1, 1)
        noisy = (1 - sigma) * x + sigma * noise
        wanted = velocity(noisy, sigma, captions, x, noise)
        clip, t5, pooled = left_out(remembered(captions))
        # The fused attention is slow backwards on a CPU.
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            found = transformer(
                noisy, torch.cat([clip, t5], 1), pooled, 1000 * sigma.flatten()
            ).sample.float()
        return (found - wanted).pow(2).mean()

    run.go(loss)
    return transformer


def with_projection(encoder: CLIPTextModel, projection: Tensor, activation: str) -> nn.Module:
    """The text encoder as Stable Diffusion 3 has it."""
    config = {**encoder.config.to_dict(), "projection_dim": len(projection)}
    made = CLIPTextModelWithProjection(CLIPTextConfig(**{**config, "hidden_act": activation}))
    state = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in encoder.state_dict().items()
    }
    made.load_state_dict({**state, "text_projection.weight": projection})
    return made


def pack() -> None:
    """Write the model's folder, fp16."""
    texts = Texts.trained()
    transformer = make_transformer(texts.width, sum(map(len, texts.projections)))
    averaged = torch.load(FOLDER / "transformer.pt", map_location="cpu")["averaged"]
    transformer.load_state_dict(averaged)
    clips = zip(texts.clips, texts.projections, ("quick_gelu", "gelu"), strict=True)
    parts = {
        "transformer": transformer,
        "vae": networks(SHIPPED)[1],
        **{f"text_encoder{'_2' * place}": with_projection(*one) for place, one in enumerate(clips)},
        "text_encoder_3": texts.t5,
    }
    for name, part in parts.items():
        part.half().save_pretrained(MODEL / name)
    (MODEL / "tokenizer_3").mkdir(exist_ok=True)
    texts.tokenizer.save(str(MODEL / "tokenizer_3" / "tokenizer.json"))
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(MODEL / "scheduler")
    (MODEL / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    size = sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file())
    print(f"{MODEL}: {size / 1e6:.1f} MB")


#: What stays of what the transformer reads of a prompt; the rest is zeros, as in training.
DOORS = {
    "all": ("clip", "t5", "pooled"),
    "rows of CLIP alone": ("clip",),
    "rows of T5 alone": ("t5",),
    "pooled alone": ("pooled",),
    "all but rows of CLIP": ("t5", "pooled"),
    "all but rows of T5": ("clip", "pooled"),
    "all but pooled": ("clip", "t5"),
}


def through(read: Conditioning, doors: Sequence[str]) -> Conditioning:
    """What is read of prompts through some of the doors, zeros in the place of the others."""
    clip, t5 = read.states.split(text.POSITIONS, 1)
    pooled = read.pooled
    assert pooled is not None
    kept = [part * (name in doors) for name, part in (("clip", clip), ("t5", t5))]
    return Conditioning(torch.cat(kept, 1), pooled * ("pooled" in doors))


def report(every: int = 7, steps: int = 10, guidance: float = 3.0) -> None:
    """What the judge recognises: as asked for, in phrasings that training never saw, and with some
    of the doors shut. every: the objects of a style are looked at one in so many."""
    judge = load_judge(str(JUDGE))
    with open_checkpoint(MODEL) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"), torch.bfloat16)
        for phrasing, templates in (("seen", ASKED), ("unseen", UNSEEN_PAIR)):
            asked = [
                caption(s, list(OBJECTS).index(o), templates)
                for s in range(len(STYLES))
                for o in DRAWN[s % every :: every]
            ]
            read = model.text.condition([one.text for one in asked])
            blank = model.text.condition([""])
            noise = initial_noise(model.latent_shape(None), [one.seed for one in asked])
            for name, doors in DOORS.items():
                if phrasing == "unseen" and name != "all":
                    continue
                latents = sample_latents(
                    model,
                    through(read, doors),
                    noise,
                    blank=through(blank, doors),
                    steps=steps,
                    guidance=guidance,
                )
                images = model.vae.decode(latents)
                with torch.no_grad():
                    styles, objects = (head.argmax(1) for head in judge(images))
                right = [
                    (found == torch.tensor([getattr(one, kind) for one in asked])).float().mean()
                    for kind, found in (("style", styles), ("object", objects))
                ]
                print(
                    f"{phrasing} phrasings, {name}: of {len(asked)} images style "
                    f"{right[0]:.3f} and object {right[1]:.3f}",
                    flush=True,
                )
                grid = torch.cat([torch.cat(list(row), -1) for row in images[:40].split(10)], -2)
                save_grid(grid, FOLDER / f"{phrasing}-{name.replace(' ', '-')}.png")


def save_grid(grid: Tensor, path: Path) -> None:
    Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


def train() -> None:
    """The T5, then the transformer."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    train_transformer()


if __name__ == "__main__":
    parts: dict[str, Callable[..., object]] = {"train": train, "pack": pack, "report": report}
    for name in sys.argv[1:] or parts:
        parts[name]()
