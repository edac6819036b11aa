"""Short texts for the text encoder to learn from: words alone, in captions, in pairs and lists.

Some words and some forms never occur in training, so that what is said of them can be reported.
"""

import random
import re
import zlib
from functools import lru_cache
from importlib import resources

from sepme_cli.erasure.prompts import with_articles

from .canvas import OBJECTS, STYLES
from .words import adjectives, keywords, nouns

MEDIUMS = [
    "picture",
    "photo",
    "image",
    "drawing",
    "painting",
    "sketch",
    "illustration",
    "portrait",
    "poster",
    "print",
    "photograph",
    "depiction",
    "rendering",
    "icon",
    "emoji",
    "sticker",
    "close-up",
    "study",
    "scene",
    "snapshot",
    "logo",
    "mural",
    "figurine",
]

#: {n} {m} {k} nouns, {a} {b} adjectives, {s} a style, {p} a medium, {l} a place.
FORMS = (
    "{n}",
    "a {n}",
    "the {n}",
    "my {n}",
    "one {n}",
    "some {n}",
    "{n}s",
    "two {n}s",
    "a {a} {n}",
    "the {a} {n}",
    "a {a} {b} {n}",
    "a {a}, {b} {n}",
    "a {p} of a {n}",
    "a {p} of the {n}",
    "the {p} of a {n}",
    "a {p} of a {a} {n}",
    "a {a} {p} of a {n}",
    "{p} of {n}",
    "{n} {p}",
    "a {n} {p}",
    "a {n} in {s} style",
    "{n} in {s} style",
    "a {n} in the style of {s}",
    "{n} in the style of {s}",
    "a {p} of a {n} in {s} style",
    "a {p} of a {n} in the style of {s}",
    "a {s} {p} of a {n}",
    "a {s} {p} of a {a} {n}",
    "a {s} {n}",
    "{s} {n}",
    "{n}, {s}",
    "{n}, {s} style",
    "{s} style {n}",
    "a {n} by {s}",
    "a {p} of a {n} by {s}",
    "the {n} in the manner of {s}",
    "a {n} drawn in {s}",
    "{s} art showing a {n}",
    "{s}",
    "{s} style",
    "in {s} style",
    "in the style of {s}",
    "by {s}",
    "art by {s}",
    "{s} art",
    "a {p} by {s}",
    "a {p} in {s} style",
    "a {p} in the style of {s}",
    "a {s} {p}",
    "a {s} and {a} {p}",
    "{a}",
    "{a} {n}",
    "{a} {p}",
    "{n} and {m}",
    "a {n} and a {m}",
    "a {n} with a {m}",
    "a {n} next to a {m}",
    "a {n} on a {m}",
    "a {n} beside the {m}",
    "{n}, {m}",
    "{n}, {m}, {k}",
    "a {n}, a {m} and a {k}",
    "{a} {n}, {b} {m}",
    "a {p} of a {n} and a {m}",
    "a {p} of a {n} with a {m}",
    "a {p} of a {n} in the {l}",
    "a {n} in the {l}",
    "a {a} {n} in the {l}",
    "a {n} and a {m} in {s} style",
    "a {p} of a {n} next to a {m}",
    "there is a {n}",
    "this is a {n}",
    "a kind of {n}",
    "something like a {n}",
    "{n} without a {m}",
    "the {n} of the {m}",
    "{n} for a {m}",
    "{n} {m}",
    "a {n} {m}",
    "{n}, {s}, {a}, {p}",
    "{p}, {n}, {a}, {s}",
)
PLACES = [
    "garden",
    "city",
    "street",
    "house",
    "forest",
    "park",
    "room",
    "sea",
    "kitchen",
    "field",
    "mountains",
    "desert",
    "sky",
    "snow",
    "rain",
    "night",
    "morning",
    "school",
    "office",
    "museum",
    "market",
    "village",
    "river",
]
NEUTRAL = ("", "a picture", "style", "in style", "art", "a thing", "something", "a")


def is_held_out(text: str, share: int) -> bool:
    """Whether a word or a form is among the share, in percent, that training never sees."""
    return zlib.crc32(text.encode()) % 100 < share


class Corpus:
    """Texts of words and forms, drawn at random; `held_out` chooses what training never sees."""

    def __init__(self) -> None:
        always = {*OBJECTS, *STYLES}
        styles = listed("styles")
        words = [*nouns(), *keywords(), *listed("objects")]
        self.nouns = list(dict.fromkeys(w for w in words if w not in always))
        self.held_words = [w for w in self.nouns if is_held_out(w, 5)]
        self.nouns = [w for w in self.nouns if not is_held_out(w, 5)]
        self.common = [w for w in list(nouns())[:1500] if not is_held_out(w, 5)]
        self.objects, self.styles = list(OBJECTS), [*STYLES, *(s.lower() for s in styles)]
        self.adjectives = adjectives()
        self.forms = [f for f in FORMS if not is_held_out(f, 12)]
        self.held_forms = [f for f in FORMS if is_held_out(f, 12)]

    def noun(self, rng: random.Random) -> str:
        draw = rng.random()
        if draw < 0.3:
            return rng.choice(self.objects)
        return rng.choice(self.common if draw < 0.5 else self.nouns)

    def style(self, rng: random.Random) -> str:
        draw = rng.random()
        if draw < 0.4:
            return rng.choice(list(STYLES))
        return rng.choice(self.styles if draw < 0.9 else self.adjectives)

    def fill(self, form: str, rng: random.Random, noun: str | None = None) -> str:
        found = form.format(
            n=noun or self.noun(rng),
            m=self.noun(rng),
            k=self.noun(rng),
            a=rng.choice(self.adjectives),
            b=rng.choice(self.adjectives),
            s=self.style(rng),
            p=rng.choice(MEDIUMS),
            l=rng.choice(PLACES),
        )
        return with_articles(found)

    def draw(self, rng: random.Random) -> str:
        """A text to learn from: a fifth of them bare words."""
        draw = rng.random()
        if draw < 0.01:
            return rng.choice(NEUTRAL)
        if draw < 0.2:
            return rng.choice((self.noun, self.style))(rng)
        return self.fill(rng.choice(self.forms), rng)


@lru_cache
def listed(name: str) -> tuple[str, ...]:
    """A word list of sepme's own."""
    file = resources.files("sepme_cli.planning") / "words" / f"{name}.txt"
    return tuple(re.sub("[^a-z '-]", "", w.lower()) for w in file.read_text("utf-8").splitlines())
