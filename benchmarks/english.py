"""The English canvas as a measuring instrument: draw captions with some weights, judge them."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import counts
from examples.emoji.captions import fill
from examples.emoji.networks import Judge, load_judge
from examples.english.canvas import OBJECTS, STYLES
from examples.english.captions import UNSEEN_PAIR
from patch_spec.increment import Increment
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.erasure.prompts import Kind

MODEL = Path("examples/english-sd.safetensors")
JUDGE = Path("examples/english-judge.safetensors")
STEPS, GUIDANCE = 10, 3.0
_NAMED = 80
"""About how many pictures of erased objects are looked at."""
STYLE_NAMES, OBJECT_NAMES = tuple(STYLES), tuple(OBJECTS)
ASKED = ("{O} in {s} style", "{o} in the style of {s}", "a {s} painting of {o}")

#: Words for the same thing that neither the UNet's training nor any list of the canvas holds.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "cat": ("kitten", "kitty", "feline"),
    "dog": ("puppy", "hound"),
    "rabbit": ("bunny", "hare"),
    "car": ("automobile", "sedan"),
    "airplane": ("jet", "aircraft"),
    "hamburger": ("burger", "cheeseburger"),
    "castle": ("fortress", "citadel"),
    "violin": ("fiddle", "viola"),
    "bicycle": ("bike",),
    "telephone": ("phone",),
    "ship": ("vessel",),
    "house": ("cottage",),
    "pig": ("piglet", "hog"),
    "horse": ("stallion", "pony"),
    "cow": ("cattle",),
    "sword": ("dagger",),
    "shoe": ("footwear",),
    "mouse": ("rodent",),
    "television": ("tv",),
    "mushroom": ("toadstool", "fungus"),
}


@dataclass(frozen=True)
class Caption:
    """A prompt, what its picture should show, and which of their seeds it has."""

    text: str
    style: int
    object: int
    nth: int = 0

    @property
    def seed(self) -> int:
        return 100_000 * self.nth + 1000 * self.style + self.object

    def names(self, concept: str) -> bool:
        return concept in (STYLE_NAMES[self.style], OBJECT_NAMES[self.object])


def kind_of(concept: str) -> Kind:
    return "style" if concept in STYLE_NAMES else "object"


def caption(style: int, obj: int, templates: Sequence[str] = ASKED, nth: int = 0) -> Caption:
    """The caption of a pair, the templates taken in turn along the pairs."""
    template = templates[(style + obj + nth) % len(templates)]
    return Caption(fill(template, STYLE_NAMES[style], OBJECT_NAMES[obj]), style, obj, nth)


def renamed(one: Caption, word: str) -> Caption:
    """The caption with another word for its object."""
    return Caption(fill(ASKED[0], STYLE_NAMES[one.style], word), one.style, one.object, one.nth)


@dataclass(frozen=True)
class Drawn:
    """Pictures [n, 3, 64, 64] uint8, and whether the style and object of each is recognised."""

    pictures: Tensor
    style: Tensor
    object: Tensor

    def of(self, kind: Kind) -> Tensor:
        return self.style if kind == "style" else self.object


@dataclass
class English:
    """The model and its judge. dtype: what the model draws in. drawn: the objects it draws."""

    model_path: Path = MODEL
    judge_path: Path = JUDGE
    dtype: torch.dtype = torch.bfloat16
    steps: int = STEPS
    guidance: float = GUIDANCE
    drawn: Sequence[str] = OBJECT_NAMES
    _before: dict[Caption, tuple[Tensor, bool, bool]] = field(default_factory=dict)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.model_path)

    @cached_property
    def model(self) -> StableDiffusion:
        return StableDiffusion.of(self.checkpoint, torch.device("cpu"), self.dtype)

    @cached_property
    def judge(self) -> Judge:
        return load_judge(str(self.judge_path))

    def patched(self, increments: Sequence[Increment]) -> dict[str, Tensor]:
        """Every target's weight with increments added, fp16 as the file has it; none without."""
        stack = [(increment, 1.0) for increment in increments]
        return patched_weights(self.checkpoint, stack) if stack else {}

    def draw(self, captions: Sequence[Caption], weights: Mapping[str, Tensor]) -> Drawn:
        """Pictures of captions by the model with some targets' weights replaced."""
        with self.model.with_weights(weights):
            pictures = generate_images(
                self.model,
                [c.text for c in captions],
                [c.seed for c in captions],
                steps=self.steps,
                guidance=self.guidance,
                batch=64,
            )
        return self.judged(captions, pictures)

    @torch.no_grad()
    def judged(self, captions: Sequence[Caption], pictures: Tensor) -> Drawn:
        heads = [torch.cat(h) for h in zip(*map(self.judge, pictures.split(96)), strict=True)]
        styles, objects = (head.argmax(1) for head in heads)
        return Drawn(
            (pictures * 255).round().byte(),
            styles == torch.tensor([c.style for c in captions]),
            objects == torch.tensor([c.object for c in captions]),
        )

    def before(self, captions: Sequence[Caption]) -> Drawn:
        """The same by the original, each drawn once."""
        new = [c for c in dict.fromkeys(captions) if c not in self._before]
        if new:
            drawn = self.draw(new, {})
            for i, one in enumerate(new):
                found = drawn.pictures[i], bool(drawn.style[i]), bool(drawn.object[i])
                self._before[one] = found
        pictures, styles, objects = zip(*(self._before[c] for c in captions), strict=True)
        return Drawn(torch.stack(pictures), torch.tensor(styles), torch.tensor(objects))

    @cached_property
    def nearest(self) -> Mapping[str, tuple[str, ...]]:
        """Of each object, the five others that the text encoder has nearest."""
        ends = self.model.text.ends(self.drawn)
        directions = torch.nn.functional.normalize(ends - ends.mean(0), dim=1)
        order = (directions @ directions.T).argsort(dim=1, descending=True)[:, 1:6]
        return {
            name: tuple(self.drawn[i] for i in row.tolist())
            for name, row in zip(self.drawn, order, strict=True)
        }

    def compare(
        self, captions: Sequence[Caption], weights: Mapping[str, Tensor]
    ) -> tuple[Drawn, dict[str, Any]]:
        """What is recognised of captions [hits, n] after and before, and how far their pictures
        move, in 255ths."""
        before, after = self.before(captions), self.draw(captions, weights)
        moved = (after.pictures.float() - before.pictures.float()).abs().mean((1, 2, 3))
        found: dict[str, Any] = {"moved": round(float(moved.mean()), 2)}
        for kind in ("style", "object"):
            found[kind] = counts(after.of(kind))
            found[f"{kind} before"] = counts(before.of(kind))
        return after, found


def probes(names: Sequence[str], canvas: English) -> dict[str, list[Caption]]:
    """What to draw to judge an erasure of some concepts, by what it shows.

    erased, unseen: captions that name one, in phrasings that are usual and in others. near: the
    objects that the text encoder has nearest to one. others: captions that name none of them.
    About the same number of pictures, however many concepts there are.
    """
    styles = [s for s, name in enumerate(STYLE_NAMES) if name not in names]
    objects = [
        o for o, name in enumerate(OBJECT_NAMES) if name in canvas.drawn and name not in names
    ]
    each = max(1, min(8, _NAMED // len(names)))
    found: dict[str, list[Caption]] = {"erased": [], "unseen": [], "near": []}
    near: dict[str, None] = {}
    for turn, name in enumerate(names):
        style = kind_of(name) == "style"
        for i in range(each * (3 if style else 1)):
            if style:
                pair = STYLE_NAMES.index(name), objects[(i * 29 + 7) % len(objects)]
            else:
                pair = styles[(i + turn) % len(styles)], OBJECT_NAMES.index(name)
            nth = i // 8 if style else i // len(styles)
            found["erased"].append(caption(*pair, nth=nth))
            found["unseen"].append(caption(*pair, UNSEEN_PAIR, nth=nth))
        if not style:
            near |= dict.fromkeys(n for n in canvas.nearest[name] if n not in names)
    for i, name in enumerate(list(near)[:_NAMED]):
        for nth in range(2 if len(near) <= 5 else 1):
            style_of = styles[(i + 3 * nth) % len(styles)]
            found["near"].append(caption(style_of, OBJECT_NAMES.index(name)))
    first = zlib.crc32(names[0].encode())
    found["others"] = [
        caption(styles[i % len(styles)], objects[(i * 31 + first) % len(objects)])
        for i in range(32 if kind_of(names[0]) == "style" or len(names) > 1 else 16)
    ]
    return found
