"""What lies beside the concepts: names that are nearly theirs, and neighbours worth protecting."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from patch_spec.increment import Increment
from patch_spec.text import slugify
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.nearness import EndEncoder, Nearness
from sepme_cli.erasure.prompts import Kind, kinds
from sepme_cli.operations.vocabulary import ordinary_words, vocabulary
from sepme_cli.recipe import Item, Recipe


@dataclass(frozen=True)
class Neighbourhood:
    """protected: what is named and the neighbours. neighbours: those, by concept. warnings: of
    names that are nearly the same."""

    protected: Protected
    neighbours: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]


def look_around(
    encoder: EndEncoder, recipe: Recipe, known: Sequence[Increment], count: int
) -> Neighbourhood:
    """Compare what the recipe names with itself, and look up the neighbours of its concepts.

    known: increments made before. count: how many neighbours of each concept to protect.
    """
    protected = Protected.parse(recipe.protect, "any")
    named = [word for item in recipe.concepts for word in (*item.names, item.like) if word]
    words = [*named, *protected.styles, *protected.objects, *(part.concept for part in known)]
    if count:
        words += [*vocabulary("style"), *vocabulary("object")]
    if len(words) == 1:
        return Neighbourhood(protected, {}, ())
    nearness = Nearness.of(encoder, words, ordinary_words())
    warnings = tuple(dict.fromkeys(_warnings(recipe, protected, known, nearness)))
    neighbours: dict[str, tuple[str, ...]] = {}
    for item in recipe.concepts if count else ():
        found = _neighbours(item, recipe, protected, nearness, count)
        neighbours[item.name] = tuple(word for word, _ in found)
        protected = protected.beside(found)
    return Neighbourhood(protected, neighbours, warnings)


def _neighbours(
    item: Item, recipe: Recipe, protected: Protected, nearness: Nearness, count: int
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
        if slugify(word) not in named and not any(nearness.same(word, name) for name in erased)
    }
    return [(word, of[word]) for word in nearness.nearest(item.names, list(of))[:count]]


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
