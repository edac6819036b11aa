"""What lies beside the concepts: what they are, other names of theirs, neighbours to protect."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Literal

from patch_spec.increment import Increment
from patch_spec.text import slugify
from sepme_cli.erasure.background import Background
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.nearness import EndEncoder, Nearness
from sepme_cli.erasure.prompts import Kind, kinds
from sepme_cli.operations.vocabulary import objects_and_styles, vocabulary
from sepme_cli.recipe import Item, Recipe

#: "auto" erases what is nearly the same as a concept with it; "none" leaves it as it falls.
Aliases = Literal["none", "auto"]

_MOST_ALIASES = 8


@dataclass(frozen=True)
class Near:
    """A word that is nearly a concept's name, and the cosine of the two."""

    word: str
    nearness: float


@dataclass(frozen=True)
class Neighbourhood:
    """concepts: the recipe's, of a kind that was found where none was said, and with the aliases
    that were taken in. protected: what is named and the neighbours. neighbours: those, by concept.
    aliases: words that are nearly the same as a concept, by concept, the nearest first. warnings:
    of names that are nearly the same."""

    concepts: tuple[Item, ...]
    protected: Protected
    neighbours: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, tuple[Near, ...]]
    warnings: tuple[str, ...]


def look_around(
    encoder: EndEncoder,
    recipe: Recipe,
    known: Sequence[Increment],
    background: Background,
    count: int,
    take_in: Aliases = "none",
) -> Neighbourhood:
    """Compare what the recipe names with itself and with the vocabulary of a background.

    known: increments made before. count: how many neighbours of each concept to protect. take_in:
    whether what is nearly the same as a concept goes with it.
    """
    protected = Protected.parse(recipe.protect, "any")
    named = [word for item in recipe.concepts for word in (*item.names, item.like) if word]
    words = [*named, *protected.styles, *protected.objects, *(part.concept for part in known)]
    nearness = Nearness.of(encoder, words, background.words, background.word_ends)
    items = [_of_kind(item, nearness) for item in recipe.concepts]
    spoken_for = {slugify(word) for word in words}
    aliases = {item.name: _aliases(item, nearness, spoken_for) for item in items}
    if take_in == "auto":
        items = [_with_aliases(item, aliases[item.name]) for item in items]
    recipe = replace(recipe, concepts=tuple(items))
    warnings = tuple(dict.fromkeys(_warnings(recipe, protected, known, nearness)))
    neighbours: dict[str, tuple[str, ...]] = {}
    for item in items if count else ():
        found = _neighbours(item, recipe, nearness, count)
        neighbours[item.name] = tuple(word for word, _ in found)
        protected = protected.beside(found)
    return Neighbourhood(tuple(items), protected, neighbours, aliases, warnings)


def _of_kind(item: Item, nearness: Nearness) -> Item:
    """The same, of the kind that its names tell where none is said."""
    if item.kind != "any":
        return item
    objects, styles = objects_and_styles()
    return replace(item, kind=nearness.kind(item.names, styles, objects))


def _aliases(item: Item, nearness: Nearness, spoken_for: set[str]) -> tuple[Near, ...]:
    """The words of the concept's kind that can hardly be told from it, and that nobody named."""
    words = [
        word
        for kind in kinds(item.kind)
        for word in vocabulary(kind)
        if slugify(word) not in spoken_for and any(nearness.same(word, n) for n in item.names)
    ]
    near = [
        Near(word, max(nearness.between(word, name) for name in item.names))
        for word in nearness.nearest(item.names, words)
    ]
    return tuple(near[:_MOST_ALIASES])


def _with_aliases(item: Item, found: Sequence[Near]) -> Item:
    return replace(item, aliases=(*item.aliases, *(near.word for near in found)))


def _neighbours(
    item: Item, recipe: Recipe, nearness: Nearness, count: int
) -> list[tuple[str, Kind]]:
    """The words of the concept's kind that are nearest to it and no name of what is erased.

    One that is protected already counts, so that concepts share their neighbours.
    """
    erased = [name for other in recipe.concepts for name in other.names]
    named = {slugify(word) for word in Protected.parse(recipe.protect, "any").words}
    of: dict[str, Kind] = {
        word: kind
        for kind in kinds(item.kind)
        for word in vocabulary(kind)
        if slugify(word) not in named
    }
    # Names need only be compared with what is near: most of a vocabulary is not.
    found: list[tuple[str, Kind]] = []
    for word in nearness.nearest(item.names, list(of)):
        if len(found) == count:
            break
        if not any(nearness.same(word, name) for name in erased):
            found.append((word, of[word]))
    return found


def _warnings(
    recipe: Recipe, protected: Protected, known: Sequence[Increment], nearness: Nearness
) -> Iterator[str]:
    for one, other in combinations(recipe.concepts, 2):
        for a, b in product(one.names, other.names):
            if nearness.same(a, b):
                yield (
                    f"{a!r} and {b!r} are nearly the same, and neither increment may touch the "
                    "other's prompts, so that little of either goes: make one of them an alias of "
                    "the other in a recipe, or leave one out"
                )
    for item in recipe.concepts:
        for name, word in product(item.names, protected.words):
            if nearness.same(name, word):
                yield (
                    f"{name!r} is to be erased and {word!r}, which is nearly the same, to be "
                    "protected: much of the concept will stay; protect only one that is clearly "
                    "something else"
                )
        for name, part in product(item.names, known):
            if nearness.same(name, part.concept):
                yield (
                    f"{name!r} is nearly {part.concept!r}, which a known patch erases, and may not "
                    "touch its prompts: apply that patch alone, or leave it out of --known"
                )
        if item.like is not None and any(nearness.same(n, item.like) for n in item.names):
            yield (
                f"{item.name!r} should act like {item.like!r}, which is nearly the same: much of "
                "the concept will stay; name something that is clearly something else"
            )
