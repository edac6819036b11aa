"""Words that most models know: what captions are made of, and what may lie beside a concept.

Where each list comes from: `words/SOURCES.txt`.
"""

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

from sepme_cli.erasure.background import Words
from sepme_cli.erasure.prompts import Kind


@lru_cache
def vocabulary(kind: Kind) -> tuple[str, ...]:
    """Styles and artists, or objects and people: what a concept's neighbours are looked for in."""
    lists = ("styles",) if kind == "style" else ("objects", "nouns", "people")
    return tuple(dict.fromkeys(word for name in lists for word in _listed(name)))


@lru_cache
def everything() -> tuple[str, ...]:
    """All words of either kind, each once."""
    return tuple(dict.fromkeys((*vocabulary("style"), *vocabulary("object"))))


@lru_cache
def objects_and_styles() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is an object and not a style, and what is a style: examples of either kind."""
    styles = vocabulary("style")
    return tuple(word for word in vocabulary("object") if word not in styles), styles


@lru_cache
def _related() -> Mapping[str, tuple[str, ...]]:
    pairs = (line.split(": ") for line in _listed("related"))
    return {word: tuple(others.split(", ")) for word, others in pairs}


def related(name: str) -> tuple[str, ...]:
    """Other words for a thing and for kinds of it, of any meaning it may have: "puppy" and "toy"
    of "dog". None of what the lists do not know."""
    return _related().get(name.casefold(), ())


def caption_words() -> Words:
    """What the captions of the background are made of."""
    things = tuple(dict.fromkeys((*_listed("objects"), *_listed("nouns"))))
    return Words(
        things, _listed("people"), _listed("places"), _listed("adjectives"), _listed("styles")
    )


@lru_cache
def _listed(name: str) -> tuple[str, ...]:
    file = resources.files("sepme_cli.planning") / "words" / f"{name}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())
