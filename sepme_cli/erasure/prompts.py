"""The prompts that stand for a concept, and the same phrases without it.

SepME describes a concept by one bare prompt; a bare prompt erased is a sentence kept. Here a
concept has a phrase for every way it is commonly asked for, alone and beside something else, and
each phrase comes with its counterpart: what is left when the concept is taken out. The pair is
what makes a representation concept-irrelevant (method, "G-CiRs").
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice, zip_longest
from math import lcm
from typing import Literal

Kind = Literal["style", "object"]
AsKind = Literal["style", "object", "any"]


@dataclass(frozen=True)
class Phrase:
    """A prompt and what remains of it without its concept. beside: the other word in it, if any."""

    text: str
    without: str
    beside: str = field(default="", compare=False)


# {c} is the concept, {x} what stands beside it; "a(n)" before either is put right afterwards.
_ALONE: dict[Kind, tuple[tuple[str, str], ...]] = {
    "style": (
        ("{c}", ""),
        ("{c} style", "style"),
        ("in {c} style", "in style"),
        ("in the style of {c}", "in the style of"),
        ("a picture in the style of {c}", "a picture"),
        ("a painting by {c}", "a painting"),
        ("a {c} painting", "a painting"),
        ("art by {c}", "art"),
    ),
    "object": (
        ("{c}", ""),
        ("a {c}", ""),
        ("the {c}", ""),
        ("a picture of a {c}", "a picture"),
        ("a photo of a {c}", "a photo"),
        ("an image of a {c}", "an image"),
        ("a painting of a {c}", "a painting"),
    ),
}
_BESIDE: dict[Kind, tuple[tuple[str, str], ...]] = {
    "style": (
        ("{x} in {c} style", "{x}"),
        ("a {x} in {c} style", "a {x}"),
        ("a {x} in the style of {c}", "a {x}"),
        ("a {c} {x}", "a {x}"),
        ("{c} {x}", "{x}"),
        ("a {x} by {c}", "a {x}"),
        ("a picture of a {x} in the style of {c}", "a picture of a {x}"),
        ("a {c} painting of a {x}", "a painting of a {x}"),
    ),
    "object": (
        ("{c} in {x} style", "in {x} style"),
        ("a {c} in {x} style", "in {x} style"),
        ("a {c} in the style of {x}", "in the style of {x}"),
        ("a {x} {c}", "{x}"),
        ("{x} {c}", "{x}"),
        ("a {c} by {x}", "by {x}"),
        ("a picture of a {c} in the style of {x}", "a picture in the style of {x}"),
        ("a {x} painting of a {c}", "a {x} painting"),
    ),
}
# Where a concept stands in longer texts, whose end alone counts.
_MORE: dict[Kind, tuple[str, ...]] = {
    "style": (
        "a landscape, {c}",
        "a portrait in the manner of {c}",
        "{c}, highly detailed",
        "a city at night, by {c}",
        "flowers in a vase, {c} style",
        "a house by the sea in the style of {c}",
        "a woman reading, {c}",
        "in {c} style, a forest in the snow",
        "inspired by {c}",
        "a famous {c} work",
        "a {c} picture of a street",
        "a child and a dog by {c}",
        "a mountain lake, {c} style, 4k",
        "the best of {c}",
        "an old tree as in {c}",
    ),
    "object": (
        "a {c}, highly detailed",
        "a small {c} on a table",
        "two of them: a {c} and another {c}",
        "a {c} at night",
        "a {c} in the snow",
        "a portrait of the {c}",
        "a close-up of a {c}",
        "a {c} and a person",
        "someone with a {c}",
        "an old {c} in a city",
        "a toy {c}",
        "a black and white photo of a {c}",
        "a {c} by the sea",
        "a cute {c}, 4k",
        "the {c} that everyone knows",
    ),
}
# An attribute {c} of a thing {x}, by what the attribute is.
_OF: dict[Kind, tuple[tuple[str, str], ...]] = {
    "style": _BESIDE["style"],
    "object": (
        ("{c} {x}", "{x}"),
        ("a {c} {x}", "a {x}"),
        ("the {c} {x}", "the {x}"),
        ("a photo of a {c} {x}", "a photo of a {x}"),
        ("a picture of a {c} {x}", "a picture of a {x}"),
        ("a {x} with a {c}", "a {x}"),
        ("a {x}, {c}", "a {x}"),
    ),
}
#: What stands beside a concept where nothing protected says what could.
COMPANIONS: dict[Kind, tuple[str, ...]] = {
    "style": ("cat", "dog", "house", "tree", "woman", "man", "city", "mountain"),
    "object": ("cartoon", "watercolor", "sketch", "realistic", "pixel art", "3d", "anime", "retro"),
}
#: What a concept acts like where nothing is said: the most general word of its kind.
GENERAL: dict[Kind, str] = {"style": "art", "object": "thing"}
NEUTRAL = ("", "a picture", "a photo", "an image", "a drawing", "a painting", "art", "style")


def other(kind: Kind) -> Kind:
    """What stands beside a concept of this kind."""
    return "object" if kind == "style" else "style"


def kinds(kind: AsKind) -> tuple[Kind, ...]:
    """The kinds a concept may be of."""
    return ("style", "object") if kind == "any" else (kind,)


def kind_told(concept: str, prompts: Collection[str]) -> AsKind:
    """What a concept is, as the prompts that were made to stand for it tell; "any" if they do not.

    The bare word stands for either.
    """
    told = [
        kind
        for kind in kinds("any")
        if any(_fill(text, concept) in prompts for text, _ in _ALONE[kind][1:])
    ]
    return told[0] if len(told) == 1 else "any"


def phrases(
    concept: str, kind: AsKind, companions: Sequence[str] = (), most: int | None = None
) -> tuple[Phrase, ...]:
    """Every phrase that stands for the concept, alone and beside companions in turn.

    companions: words of the other kind to stand beside it; each in-context template takes them
    in turn, so their number does not multiply the number of phrases. most: of either kind.
    """
    found = (islice(_phrases(concept, k, companions), most) for k in kinds(kind))
    return tuple(dict.fromkeys(chain.from_iterable(found)))


def _phrases(concept: str, kind: Kind, companions: Sequence[str]) -> Iterator[Phrase]:
    alone = [(text, without, "") for text, without in _ALONE[kind]]
    templates = cycle(_BESIDE[kind])
    words = companions or COMPANIONS[kind]
    beside = [(*pair, word) for pair, word in zip(templates, words, strict=False)]
    for found in chain.from_iterable(zip_longest(alone, beside)):
        if found is not None:
            text, without, word = found
            yield Phrase(_fill(text, concept, word), _fill(without, concept, word), word)


def more_phrasings(concept: str, kind: Kind) -> tuple[str, ...]:
    """Longer prompts that ask for a concept; see `phrases` for those that stand for it."""
    return tuple(_fill(text, concept) for text in _MORE[kind])


def attribute_phrases(attribute: str, kind: AsKind, thing: str) -> tuple[Phrase, ...]:
    """Every phrase that gives a thing an attribute, and the same of the thing without it."""
    return tuple(
        Phrase(_fill(text, attribute, thing), _fill(without, attribute, thing), thing)
        for text, without in dict.fromkeys(chain.from_iterable(_OF[k] for k in kinds(kind)))
    )


def renamed(prompt: str, name: str, other: str) -> Phrase:
    """A user's own prompt with another name for the one in it; without it, the words that the
    name is part of ("Monet's") are cut out."""
    text = prompt if other == name else with_articles(prompt.replace(name, other))
    within = re.compile(rf"\w*{re.escape(name)}(?:\w|['\u2019](?=\w))*")
    return Phrase(text, with_articles(within.sub("", prompt)))


def pairs(
    styles: Sequence[str], objects: Sequence[str], count: int
) -> Iterator[tuple[str, str, str]]:
    """At most count styles and objects, each pair once, and a prompt that names both.

    Both lists are walked at the same pace, one starting a place further on after each round, so
    that a few pairs already hold every word.
    """
    if not styles or not objects:
        return
    texts = [text for text, _ in _BESIDE["style"]]
    round_length = lcm(len(styles), len(objects))
    for i in range(min(count, len(styles) * len(objects))):
        style = styles[i % len(styles)]
        thing = objects[(i + i // round_length) % len(objects)]
        yield style, thing, _fill(texts[i % len(texts)], style, thing)


def _fill(template: str, concept: str, companion: str = "") -> str:
    return with_articles(template.format(c=concept, x=companion))


def with_articles(text: str) -> str:
    """The text with "a" before a vowel put right, and single spaces."""
    words = text.split()
    return " ".join(
        "an" if word == "a" and after[:1].lower() in set("aeiou") else word
        for word, after in zip(words, [*words[1:], ""], strict=False)
    )
