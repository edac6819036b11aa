"""A broad sample of captions, which every erasure leaves alone though nobody names it.

An increment is constrained where something is known to be; everywhere else it does what it likes.
With nothing but the concept named, that is nearly the whole language. So every erasure also
protects the second moment of this sample, and what its increments do to others, with other words
in other phrasings, is measured.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from sepme_cli.erasure.concept import Lexicon, TextEncoder
from sepme_cli.erasure.nearness import EndEncoder
from sepme_cli.erasure.prompts import with_articles

#: Of the sample; another one makes other patches, and its number stands in their manifests.
VERSION = 1

_HELD_OUT = 5
"""One word in so many is kept for measuring."""

_PART = 200
"""How many prompts are encoded at a time, between two looks at the clock."""

# {n}, {m}, {k} are things, people or places; {a} an adjective; {s} a style or an artist.
_CAPTIONS = (
    "{n}",
    "a {n}",
    "the {n}",
    "{n}s",
    "a {a} {n}",
    "a photo of a {n}",
    "a picture of a {n}",
    "an image of the {n}",
    "a painting of a {n}",
    "a drawing of a {a} {n}",
    "a close-up photo of a {a} {n}",
    "a portrait of a {n}",
    "a {n} and a {m}",
    "a {n} with a {m}",
    "a {n} in front of a {m}",
    "a photo of a {n} next to a {m}",
    "{n}, {m}",
    "{n}, {m}, {k}",
    "{a} {n}, {m}, highly detailed",
    "a {n} holding a {m}",
    "{n} and {m} in the rain",
    "a {n} at night",
    "a {a} {n} in a garden",
    "{s}",
    "{s} style",
    "by {s}",
    "a painting by {s}",
    "a picture in the style of {s}",
    "a {n} in {s} style",
    "a {n} in the style of {s}",
    "a {n} by {s}",
    "a {s} painting of a {a} {n}",
    "a {n} and a {m} in the style of {s}",
    "{n}, {s}",
)
_HELD_OUT_CAPTIONS = (
    "{n}",
    "one {n}",
    "a sketch of a {n}",
    "a {a} photograph of the {n}",
    "this is a {n}",
    "a {n} beside the {m}",
    "an illustration of a {n} on a {m}",
    "{n} without {m}",
    "a view of a {a} {n} from above",
    "art by {s}",
    "an illustration in {s} style",
    "a {n} as {s} would paint it",
)


class BackgroundEncoder(TextEncoder, EndEncoder, Protocol):
    """A text encoder in both of the ways that a background asks it."""


@dataclass(frozen=True)
class Words:
    """What captions are made of, the most common first."""

    things: tuple[str, ...]
    people: tuple[str, ...]
    places: tuple[str, ...]
    adjectives: tuple[str, ...]
    styles: tuple[str, ...]


@dataclass(frozen=True)
class Captions:
    """protected: what an erasure leaves alone. held_out: what it is measured on."""

    protected: tuple[str, ...]
    held_out: tuple[str, ...]


def captions(words: Words, protected: int = 1000, held_out: int = 300) -> Captions:
    """The sample: as many captions as asked for of either kind, the same ones every time."""
    return Captions(
        _drawn(_CAPTIONS, words, protected, lambda word: not is_held_out(word)),
        _drawn(_HELD_OUT_CAPTIONS, words, held_out, is_held_out),
    )


def is_held_out(word: str) -> bool:
    """Whether a word takes no part in what is protected."""
    return zlib.crc32(word.encode()) % _HELD_OUT == 0


def _drawn(
    forms: Sequence[str], words: Words, count: int, chosen: Callable[[str], bool]
) -> tuple[str, ...]:
    rng = random.Random(VERSION)
    things, people, places, adjectives, styles = (
        tuple(filter(chosen, part))
        for part in (words.things, words.people, words.places, words.adjectives, words.styles)
    )

    def one(part: Sequence[str]) -> str:
        # random() alone is the same in every version of Python.
        return part[int(rng.random() * len(part))]

    def subject() -> str:
        kind = rng.random()
        return one(things if kind < 0.75 else people if kind < 0.9 else places)

    found: dict[str, None] = {}
    turn = 0
    while len(found) < count:
        form = forms[turn % len(forms)]
        text = form.format(n=subject(), m=subject(), k=subject(), a=one(adjectives), s=one(styles))
        found[with_articles(text)] = None
        turn += 1
    return tuple(found)


@dataclass(frozen=True)
class Background:
    """What a text encoder makes of the sample, and of a vocabulary.

    moment: [d, d], float64: the mean of e^T e over the tokens of the protected captions. captions,
    ends: the held-out ones, and the embedding [n, k d] of the end of each, fp32: from k text
    encoders one behind the other. words, word_ends: the same of the vocabulary's words [m, k d].
    """

    moment: Tensor
    captions: tuple[str, ...]
    ends: Tensor
    words: tuple[str, ...]
    word_ends: Tensor
    protected: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        encoders: Sequence[BackgroundEncoder],
        sample: Captions,
        words: Sequence[str],
        advance: Callable[[], None] = lambda: None,
    ) -> Self:
        """encoders: whose rows a denoiser reads. advance: called after each of
        `steps(sample, words)`."""
        total, count = torch.zeros(()), 0
        for part in _parts(sample.protected):
            rows = Lexicon(encoders, part).rows(part)
            total, count = total + rows.T @ rows, count + len(rows)
            advance()
        held_out = []
        for part in _parts((*sample.held_out, *words)):
            held_out.append(torch.cat([encoder.ends(part) for encoder in encoders], -1))
            advance()
        ends = torch.cat(held_out).float()
        size = len(sample.held_out)
        moment, held = total / count, ends[:size]
        return cls(moment, sample.held_out, held, tuple(words), ends[size:], sample.protected)


def steps(sample: Captions, words: Sequence[str]) -> int:
    """How often a background advances while it is computed."""
    return len(_parts(sample.protected)) + len(_parts((*sample.held_out, *words)))


def _parts(prompts: Sequence[str]) -> list[Sequence[str]]:
    return [prompts[start : start + _PART] for start in range(0, len(prompts), _PART)]
