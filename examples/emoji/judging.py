"""What the judge says of pictures drawn from captions of the canvas."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sepme_cli.evaluation.intervals import Proportion

from .canvas import OBJECTS, STYLES
from .captions import fill
from .networks import Judge

STYLE_NAMES = tuple(STYLES)
OBJECT_NAMES = tuple(OBJECTS)


@dataclass(frozen=True)
class Caption:
    """A prompt of the canvas and what its picture should show."""

    text: str
    style: int
    object: int

    def names(self, concept: str) -> bool:
        return concept in (STYLE_NAMES[self.style], OBJECT_NAMES[self.object])


def all_pairs(templates: Sequence[str]) -> list[Caption]:
    """Every style with every object, the templates taken in turn along the objects."""
    return [
        Caption(fill(templates[(s + o) % len(templates)], style, obj), s, o)
        for s, style in enumerate(STYLE_NAMES)
        for o, obj in enumerate(OBJECT_NAMES)
    ]


@dataclass(frozen=True)
class Verdict:
    """For each picture, whether its style and its object were recognised: bool [n]."""

    style: Tensor
    object: Tensor

    def of(self, kind: str) -> Tensor:
        return self.style if kind == "style" else self.object


@torch.no_grad()
def verdict(judge: Judge, pictures: Tensor, captions: Sequence[Caption]) -> Verdict:
    """Judge pictures [n, 3, 64, 64] in [0, 1] against their captions."""
    styles, objects = (torch.cat(h) for h in zip(*map(judge, pictures.split(96)), strict=True))
    return Verdict(
        styles.argmax(1) == torch.tensor([c.style for c in captions]),
        objects.argmax(1) == torch.tensor([c.object for c in captions]),
    )


@dataclass(frozen=True)
class CanvasJudge:
    """A canvas's judge, as `sepme evaluate --judge` takes one."""

    network: Judge
    styles: Sequence[str] = STYLE_NAMES
    objects: Sequence[str] = OBJECT_NAMES

    def labels(self, kind: str) -> Sequence[str]:
        return self.styles if kind == "style" else self.objects

    @torch.no_grad()
    def recognise(self, pictures: Tensor, kind: str) -> Sequence[str]:
        heads = [self.network(part)[kind == "object"] for part in pictures.split(96)]
        return [self.labels(kind)[int(i)] for i in torch.cat(heads).argmax(1)]


def proportion(right: Tensor) -> Proportion:
    return Proportion(int(right.sum()), len(right))
