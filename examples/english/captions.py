"""What the pictures are called while the UNet learns, and phrasings that it never sees."""

import random

from ..emoji.captions import NEUTRAL, OBJECT, PAIR, STYLE, fill

__all__ = ["UNSEEN_OBJECT", "UNSEEN_PAIR", "UNSEEN_STYLE", "draw_caption", "fill"]

#: Phrasings that neither training nor the product's own prompts hold.
UNSEEN_PAIR = (
    "{o} rendered in {s}",
    "a {s} illustration of {o}",
    "{s} version of {o}",
    "{o} made with {s}",
    "a sketch of {o}, {s}",
    "there is {o}, {s} look",
)
UNSEEN_OBJECT = (
    "an illustration of {o}",
    "this is {o}",
    "a sketch of the {O}",
    "look at this {O}",
    "a nice {O}",
    "some kind of {O}",
)
UNSEEN_STYLE = (
    "a {s} illustration",
    "something rendered in {s}",
    "made with {s}",
)


def draw_caption(rng: random.Random, style: str, obj: str) -> str:
    """A caption for a picture: of both, of one of them, of neither, or blank."""
    kind = rng.random()
    if kind < 0.68:
        return fill(rng.choice(PAIR), style, obj)
    if kind < 0.74:
        return fill(rng.choice(STYLE), style, obj)
    if kind < 0.89:
        return fill(rng.choice(OBJECT), style, obj)
    return rng.choice(NEUTRAL) if kind < 0.91 else ""
