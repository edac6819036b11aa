"""What lies beside the concepts: what they are, other names of theirs, neighbours to protect."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from patch_spec.increment import Increment
from patch_spec.text import slugify
from sepme_cli.erasure.background import Background
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.nearness import EndEncoder, Nearness
from sepme_cli.erasure.prompts import Kind, kinds
from sepme_cli.erasure.words import Item
from sepme_cli.planning.request import Aliases
from sepme_cli.planning.vocabulary import everything, objects_and_styles, related, vocabulary
from sepme_cli.recipe import Recipe

_MOST_ALIASES = 8


@dataclass(frozen=True)
class NearWord:
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
    aliases: Mapping[str, tuple[NearWord, ...]]
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
    protected = Protected.parse(recipe.protect, "any", recipe.weights)
    named = [
        word
        for item in recipe.concepts
        for word in (*item.names, item.like, item.erase_from)
        if word
    ]
    words = [*named, *protected.styles, *protected.objects, *(part.concept for part in known)]
    other_words = {item.label: _related(item) for item in recipe.concepts}
    compared = [*words, *(word for found in other_words.values() for word in found)]
    nearness = Nearness.of(encoder, compared, background.words, background.word_ends)
    items = _of_kinds(recipe.concepts, nearness)
    spoken_for = {slugify(word) for word in words}
    free = [word for word in everything() if slugify(word) not in spoken_for]
    aliases = {}
    for item in items:
        others = [word for word in other_words[item.label] if slugify(word) not in spoken_for]
        aliases[item.label] = _aliases(item, nearness, free, others)
    aliases = _each_once(aliases)
    if take_in == "auto":
        items = [_with_aliases(item, aliases[item.label]) for item in items]
    recipe = replace(recipe, concepts=tuple(items))
    warnings = tuple(dict.fromkeys(_warnings(recipe, protected, known, nearness)))
    neighbours: dict[str, tuple[str, ...]] = {}
    if count:
        kept = {slugify(word) for word in protected.words}
        erased = [name for item in _everywhere(items) for name in item.names]
        unfit = {word for _, word in nearness.alike(erased, everything())}
        unfit |= {word for word in everything() if slugify(word) in kept}
        unfit |= {near.word for found in aliases.values() for near in found}
        # First those of attributes, which need theirs the most: they stand beside them in phrases.
        for item in sorted(items, key=lambda item: item.erase_from is None):
            found = _neighbours(item, nearness, unfit, count)
            neighbours[item.label] = tuple(word for word, _ in found)
            protected = protected.beside(found)
    return Neighbourhood(tuple(items), protected, neighbours, aliases, warnings)


def _of_kinds(items: Sequence[Item], nearness: Nearness) -> list[Item]:
    """The same, each of the kind that its names tell where none is said."""
    unsaid = [item for item in items if item.kind == "any"]
    if not unsaid:
        return list(items)
    objects, styles = objects_and_styles()
    found = nearness.kinds([item.names for item in unsaid], styles, objects)
    told = dict(zip((item.label for item in unsaid), found, strict=True))
    return [replace(item, kind=told.get(item.label, item.kind)) for item in items]


def _related(item: Item) -> list[str]:
    """What the dictionary has as other names of the concept and as kinds of it."""
    if item.kind == "style":
        return []
    return list(dict.fromkeys(word for name in item.names for word in related(name)))


def _aliases(
    item: Item, nearness: Nearness, free: Sequence[str], others: Sequence[str]
) -> tuple[NearWord, ...]:
    """The words of the concept's kind that can hardly be told from it, and those of its related
    words that the encoder has near it, too; the nearest first.

    free: words that nobody named. others: the related ones.
    """
    of_kind = {word for kind in kinds(item.kind) for word in vocabulary(kind)}
    alike = {word for _, word in nearness.alike(item.names, free)} & of_kind
    if item.kind == "style":
        others = ()
    words = [*(word for word in free if word in alike), *(w for w in others if w not in alike)]
    near = [
        NearWord(word, max(nearness.between(word, name) for name in item.names))
        for word in nearness.nearest(item.names, words)
    ]
    enough = [one for one in near if one.word in alike or one.nearness >= nearness.related_from]
    return tuple(enough[:_MOST_ALIASES])


def _each_once(aliases: Mapping[str, Sequence[NearWord]]) -> dict[str, tuple[NearWord, ...]]:
    """The same, a word that is near to several concepts with the one it is nearest to."""
    owner: dict[str, tuple[float, str]] = {}
    for name, found in aliases.items():
        for near in found:
            if near.nearness > owner.get(near.word, (-2.0, ""))[0]:
                owner[near.word] = near.nearness, name
    return {
        name: tuple(near for near in found if owner[near.word][1] == name)
        for name, found in aliases.items()
    }


def _with_aliases(item: Item, found: Sequence[NearWord]) -> Item:
    return replace(item, aliases=(*item.aliases, *(near.word for near in found)))


def _neighbours(
    item: Item, nearness: Nearness, unfit: Collection[str], count: int
) -> list[tuple[str, Kind]]:
    """The words of the concept's kind that are nearest to it.

    unfit: words that are nearly a name of what is erased, or that are protected by name. One that
    is protected as a neighbour already counts, so that concepts share their neighbours. Of an
    attribute of one thing, those of either, whatever the attribute's are kept as its like: other
    things keep it, and the thing keeps them.
    """
    if item.erase_from is not None:
        both = (*item.names, item.erase_from)
        unfit = {*unfit, *(word for _, word in nearness.alike(both, everything()))}
        thing = replace(item, name=item.erase_from, kind="object", aliases=(), erase_from=None)
        attribute = replace(item, erase_from=None)
        things = _neighbours(thing, nearness, unfit, count)
        like_it = _neighbours(attribute, nearness, {*unfit, *(word for word, _ in things)}, count)
        return [*things, *((word, "style") for word, _ in like_it)]
    of: dict[str, Kind] = {
        word: kind for kind in kinds(item.kind) for word in vocabulary(kind) if word not in unfit
    }
    return [(word, of[word]) for word in nearness.nearest(item.names, list(of))[:count]]


def _everywhere(items: Sequence[Item]) -> Iterator[Item]:
    """Those that are erased from everything."""
    return (item for item in items if item.erase_from is None)


def _warnings(
    recipe: Recipe, protected: Protected, known: Sequence[Increment], nearness: Nearness
) -> Iterator[str]:
    of = {name: item for item in _everywhere(recipe.concepts) for name in item.names}
    order = {name: place for place, name in enumerate(of)}
    for a, b in sorted(nearness.alike(list(of), list(of)), key=lambda pair: order[pair[0]]):
        if of[a] is not of[b] and order[a] < order[b]:
            yield (
                f"{a!r} and {b!r} are nearly the same, and neither increment may change the "
                "other's prompts, so that much of both will remain: make one an alias of the "
                "other in a recipe, or leave one out"
            )
    for name, word in sorted(nearness.alike(list(of), protected.words)):
        yield (
            f"{name!r} is to be erased, and {word!r}, which is nearly the same, is "
            "protected: much of the concept will remain; protect only what is clearly "
            "different"
        )
    for name, concept in sorted(nearness.alike(list(of), [part.concept for part in known])):
        yield (
            f"{name!r} is nearly {concept!r}, which a known patch erases, and may not "
            "change its prompts: apply that patch alone, or leave it out of --known"
        )
    for item in recipe.concepts:
        if item.like is not None and nearness.alike(item.names, [item.like]):
            yield (
                f"{item.like!r}, the anchor of {item.name!r}, is nearly the same: much of the "
                "concept will remain; name something clearly different"
            )
