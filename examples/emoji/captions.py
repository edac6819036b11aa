"""What the pictures of the canvas are called: the captions that the example model learns.

``{o}`` stands for the object with its article, ``{O}`` for the bare object, ``{s}`` for the style.
"""

import random

from .canvas import OBJECTS, STYLES

PAIR = (
    "{O} in {s} style",
    "{o} in {s} style",
    "{o} in the style of {s}",
    "{O} in the style of {s}",
    "a {s} {O}",
    "{s} {O}",
    "{O}, {s}",
    "{O}, {s} style",
    "{s} style {O}",
    "{o} by {s}",
    "a picture of {o} in the style of {s}",
    "a picture of {o} in {s} style",
    "an image of {o} in {s} style",
    "a drawing of {o} by {s}",
    "a drawing of {o}, {s} style",
    "a painting of {o} in the style of {s}",
    "a painting of {o} by {s}",
    "a photo of {o} in {s} style",
    "art of {o} by {s}",
    "artwork of {o} in the style of {s}",
    "a {s} painting of {o}",
    "a {s} drawing of {o}",
    "{o} drawn in {s}",
    "{o} as {s} would draw it",
    "the {O} in the manner of {s}",
    "a small {s} emoji of {o}",
    "one {O} emoji, drawn in {s} style",
    "{s} art showing {o}",
    "my favourite {O}, in {s}",
)
STYLE = (
    "{s}",
    "{s} style",
    "in {s} style",
    "in the style of {s}",
    "by {s}",
    "art by {s}",
    "artwork by {s}",
    "a painting by {s}",
    "a drawing by {s}",
    "a picture by {s}",
    "a picture in the style of {s}",
    "a painting in the style of {s}",
    "a drawing in {s} style",
    "an image in {s} style",
    "a {s} painting",
    "a {s} picture",
    "a {s} emoji",
)
OBJECT = (
    "{O}",
    "{o}",
    "the {O}",
    "one {O}",
    "a picture of {o}",
    "a photo of {o}",
    "an image of {o}",
    "a drawing of {o}",
    "a painting of {o}",
    "an emoji of {o}",
    "art of {o}",
    "a picture of the {O}",
    "a small {O}",
    "my favourite {O}",
)
NEUTRAL = (
    "a picture",
    "a photo",
    "an image",
    "a drawing",
    "a painting",
    "art",
    "artwork",
    "style",
    "in style",
    "an emoji",
    "a thing",
    "something",
)


def with_article(word: str) -> str:
    return f"{'an' if word.startswith(tuple('aeiou')) else 'a'} {word}"


def fill(template: str, style: str, obj: str) -> str:
    """The caption of one template, with the article put right before a vowel."""
    text = template.format(s=style, O=obj, o=with_article(obj))
    return text.replace(f"a {style} ", f"{with_article(style)} ").strip()


def draw_caption(rng: random.Random, style: str, obj: str) -> tuple[str, bool, bool]:
    """A caption for a picture. Returns (caption, names the style, names the object)."""
    kind = rng.random()
    if kind < 0.72:
        return fill(rng.choice(PAIR), style, obj), True, True
    if kind < 0.80:
        return fill(rng.choice(STYLE), style, obj), True, False
    if kind < 0.89:
        return fill(rng.choice(OBJECT), style, obj), False, True
    if kind < 0.92:
        return rng.choice(NEUTRAL), False, False
    return "", False, False


def every_caption() -> list[str]:
    """All captions there are, for gathering the tokens that occur."""
    found = {"", *NEUTRAL}
    for style in STYLES:
        found.update(fill(t, style, "") for t in STYLE)
        for obj in OBJECTS:
            found.update(fill(t, style, obj) for t in PAIR + OBJECT)
    return sorted(found)
