"""What is to be erased and what must stay, as prompts and as rows of embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from sepme_cli.erasure.alignment import align
from sepme_cli.erasure.nearness import holds
from sepme_cli.erasure.prompts import (
    COMPANIONS,
    GENERAL,
    NEUTRAL,
    AsKind,
    Kind,
    Phrase,
    attribute_phrases,
    kinds,
    more_phrasings,
    other,
    pairs,
    phrases,
    renamed,
    with_articles,
)
from sepme_cli.erasure.words import Item, parse_word

_ALL_ONE: Mapping[str, float] = MappingProxyType({})
_PAIRS = 40
_BESIDE = 16
_PADDING = 2
_AMONG_ITS_LIKE = 3.0
"""The weight of an attribute of one thing: it lies among all that is protected for its sake, and at
the weight of other concepts too little of it goes."""
_SAME = 0.01
"""What is nearer to an embedding, of its size, than this is the same but for rounding."""
_FEWEST = 3
"""Phrases of a protected word, however many are protected beside it."""


class TextEncoder(Protocol):
    """e(c): what the layers that an increment changes read."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions], padded."""
        ...

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> Tensor:
        """Hidden states [len(prompts), positions, d], one row a token; of all positions if None.

        paddings: how many of the padding behind each text; the last of them stands for those
        behind it; all if None.
        """
        ...


@dataclass(frozen=True)
class Protected:
    """Words that must stay as they are, by what they are. weights: of those that matter less, in
    (0, 1]; others have 1."""

    styles: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(
        cls, words: Sequence[str], kind: AsKind, weights: Mapping[str, float] = _ALL_ONE
    ) -> "Protected":
        """Words as a user names them; see `parse_word`. One of any kind is kept as both."""
        found: dict[Kind, list[str]] = {"style": [], "object": []}
        for word in words:
            name, said = parse_word(word, kind)
            for each in kinds(said):
                found[each].append(name)
        return cls(tuple(found["style"]), tuple(found["object"]), weights)

    def beside(self, words: Iterable[tuple[str, AsKind]]) -> "Protected":
        """The same and further words, each once, of what they are."""
        more: dict[Kind, list[str]] = {"style": [], "object": []}
        for word, said in words:
            for each in kinds(said):
                more[each].append(word)
        return replace(
            self,
            styles=tuple(dict.fromkeys((*self.styles, *more["style"]))),
            objects=tuple(dict.fromkeys((*self.objects, *more["object"]))),
        )

    @property
    def words(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.styles, *self.objects)))

    def of(self, kind: Kind) -> tuple[str, ...]:
        return self.styles if kind == "style" else self.objects

    def prompts(self, most: int | None = None) -> tuple[str, ...]:
        """Neutral phrases, every word in its phrases, and styles and objects together.

        most: about how many of the words' own; each has some.
        """
        return tuple(self.weighted_prompts(most))

    def weighted_prompts(self, most: int | None = None) -> dict[str, float]:
        """The same, each with the weight of the word in it that matters least."""
        found = [(text, "", "") for text in NEUTRAL]
        each_has = None if most is None else max(_FEWEST, most // max(1, len(self.words)))
        for kind in kinds("any"):
            beside = self.of(other(kind))
            for word in self.of(kind):
                told = phrases(word, kind, beside[:4], each_has)
                found += [(phrase.text, word, phrase.beside) for phrase in told]
        together = pairs(self.styles, self.objects, _PAIRS)
        found += [(text, style, thing) for style, thing, text in together]
        return {text: min(self.weights.get(word, 1.0) for word in both) for text, *both in found}


@dataclass(frozen=True)
class Concept:
    """A concept to erase: its phrases, and for each phrase the one that it should act like.

    names: its name and its aliases. like: its anchor, the word in its place in `answers`. weights:
    of the phrases, as their names have them; all 1 if empty.

    Of an attribute that one thing loses: erase_from, that thing. counterparts: of each phrase, the
    same of another thing and of another attribute. kept: phrases that must stay for that: of other
    things with the attribute, and of the thing without it.

    endings: further prompts whose end of the text counts, the same with the anchor, and weights.
    """

    name: str
    names: tuple[str, ...]
    kind: AsKind
    phrases: tuple[Phrase, ...]
    like: str
    answers: tuple[str, ...]
    weights: tuple[float, ...] = ()
    erase_from: str | None = None
    counterparts: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()
    endings: tuple[tuple[str, str, float], ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(phrase.text for phrase in self.phrases)

    def asked_for_in(self, text: str) -> bool:
        """Whether a text names the concept; an attribute of one thing, with that thing."""
        named = any(holds(text, name) for name in self.names)
        return named and (self.erase_from is None or holds(text, self.erase_from))


@dataclass(frozen=True)
class EmbeddingPairs:
    """A concept's embeddings, and those of its anchor.

    concept, anchor: C and C* [n, d], float64: distinct embeddings, and row for row what they
    should act like; each times the square root of its weight, so that the normal equations have
    the weight itself.
    """

    concept: Tensor
    anchor: Tensor


def describe(item: Item, protected: Protected, most: int | None = None) -> Concept:
    """A concept under all of its names, with protected words of the other kind as companions.

    Unless it is said what it should act like, that is the most general word of its kind, which is
    nobody's work. most: phrases of either kind, for each name.
    """
    if item.erase_from is not None:
        return _describe_attribute(item, item.erase_from, protected, most)
    found: list[Phrase] = []
    answers: list[str] = []
    weights: list[float] = []
    for each in kinds(item.kind):
        beside = protected.of(other(each))[:_BESIDE]
        anchored = [p.text for p in phrases(item.like or GENERAL[each], each, beside, most)]
        for name in item.names:
            found += phrases(name, each, beside, most)
            answers += anchored
            weights += [item.weights.get(name, 1.0)] * len(anchored)
    like = item.like or " or ".join(GENERAL[each] for each in kinds(item.kind))
    for prompt in item.prompts:
        found.append(renamed(prompt, item.name, item.name))
        word = item.like or GENERAL[kinds(item.kind)[-1]]
        answers.append(renamed(prompt, item.name, word).text)
        weights.append(1.0)
    return Concept(
        item.name, item.names, item.kind, tuple(found), like, tuple(answers), tuple(weights)
    )


def endings(item: Item) -> tuple[tuple[str, str, float], ...]:
    """Many more prompts for a concept under all of its names, the same with its anchor, and how
    much each counts; none for an attribute of one thing."""
    if item.erase_from is not None:
        return ()
    return tuple(
        (asked, answer, item.weights.get(name, 1.0))
        for kind in kinds(item.kind)
        for name in item.names
        for asked, answer in zip(
            more_phrasings(name, kind),
            more_phrasings(item.like or GENERAL[kind], kind),
            strict=True,
        )
    )


def _describe_attribute(item: Item, thing: str, protected: Protected, most: int | None) -> Concept:
    """An attribute of one thing, under all of its names: it acts like the thing without it, or with
    `like` in its place. Other things keep it, and the thing keeps other attributes."""
    things = _others(protected.objects, COMPANIONS["style"], [thing])
    attributes = _others(protected.styles, COMPANIONS["object"], [*item.names, item.like or ""])
    found: list[Phrase] = []
    answers: list[str] = []
    weights: list[float] = []
    counterparts: list[tuple[str, str]] = []
    kept: list[str] = [*(phrase.text for phrase in phrases(thing, "object", attributes))]

    def of(attribute: str, what: str) -> tuple[Phrase, ...]:
        return attribute_phrases(attribute, item.kind, what)[:most]

    kept += [phrase.text for attribute in attributes for phrase in of(attribute, thing)]
    for name in item.names:
        own = of(name, thing)
        found += own
        wanted = [p.without for p in own] if item.like is None else _texts(of(item.like, thing))
        answers += wanted
        weights += [item.weights.get(name, 1.0)] * len(own)
        others = _texts(of(name, things[0])), _texts(of(attributes[0], thing))
        counterparts += zip(*others, strict=True)
        kept += [phrase.text for other_thing in things for phrase in of(name, other_thing)]
        kept += _texts(phrases(name, item.kind, things))
    for prompt in item.prompts:
        phrase = renamed(prompt, item.name, item.name)
        found.append(phrase)
        answers.append(renamed(prompt, item.name, item.like).text if item.like else phrase.without)
        weights.append(1.0)
        counterparts.append(
            (
                with_articles(prompt.replace(thing, things[0])),
                renamed(prompt, item.name, attributes[0]).text,
            )
        )
    kept += [text for both in counterparts for text in both]
    like = thing if item.like is None else f"{item.like} {thing}"
    mine = frozenset(_texts(found))
    return Concept(
        item.label,
        item.names,
        item.kind,
        tuple(found),
        like,
        tuple(answers),
        tuple(weights),
        thing,
        tuple(counterparts),
        tuple(dict.fromkeys(text for text in kept if text not in mine)),
    )


def _others(named: Sequence[str], common: Sequence[str], but: Sequence[str]) -> list[str]:
    """Words to stand beside something: those named or near, and common ones; none of `but`."""
    both = dict.fromkeys((*named[:_BESIDE], *common))
    return [word for word in both if not any(holds(word, b) or holds(b, word) for b in but)]


def _texts(found: Iterable[Phrase]) -> list[str]:
    return [phrase.text for phrase in found]


class Lexicon:
    """The embeddings of many prompts, each encoded once.

    All have the positions of the longest text and a few of the padding behind it. Of a shorter one
    as few are encoded, and the last of them stands for the rest: no token reads what comes after
    it, and paddings differ little from one another.
    """

    def __init__(self, encoders: Sequence[TextEncoder], prompts: Iterable[str]) -> None:
        """encoders: whose rows a denoiser reads, those of one after those of another."""
        distinct = tuple(dict.fromkeys(prompts))
        self._places = {prompt: place for place, prompt in enumerate(distinct)}
        self._parts = [_encoded(encoder, distinct) for encoder in encoders]

    def states(self, prompts: Sequence[str]) -> Tensor:
        """e(c) [len(prompts), positions, d]."""
        places = self._at(prompts)
        return torch.cat([states[places] for _, states in self._parts], 1)

    def rows(self, prompts: Sequence[str], weights: Sequence[float] = ()) -> Tensor:
        """Every distinct embedding of prompts: [n, d], float64; n is 0 without prompts.

        weights: of the prompts, all 1 if empty; see `_distinct`.
        """
        states = self.states(prompts)
        given = torch.tensor(weights or [1.0] * len(prompts), dtype=torch.float64)
        return _distinct(states.flatten(0, 1), given.repeat_interleave(states.shape[1]))

    def embedding_pairs(self, concept: Concept) -> EmbeddingPairs:
        """The concept's embeddings, and those of what it should act like.

        Of an attribute of one thing, only the embeddings that have read both: a token's that comes
        before one of them is any other thing's, too.
        """
        asked, answers = self._at(concept.prompts), self._at(concept.answers)
        given = torch.tensor(concept.weights or [1.0] * len(asked), dtype=torch.float64)
        rows: list[Tensor] = []
        weights: list[Tensor] = []

        def add(both: Tensor, each: Tensor) -> None:
            rows.append(both.flatten(0, 1))
            weights.append(each.flatten())

        for ids, states in self._parts:
            each = given[:, None].repeat(1, ids.shape[1])
            for others in zip(*concept.counterparts, strict=True):
                own, theirs = states[asked], states[self._at(others)]
                each[(own - theirs).norm(dim=-1) < _SAME * own.norm(dim=-1)] = 0
            add(_together(ids, states, asked, answers), each)
            if concept.endings:
                more, instead, sure = zip(*concept.endings, strict=True)
                texts = self._at(more)
                ends = _from_the_end(ids[texts]) * torch.tensor(sure, dtype=torch.float64)[:, None]
                add(_together(ids, states, texts, self._at(instead)), ends)
        found = _distinct(torch.cat(rows), torch.cat(weights))
        if concept.erase_from is not None:
            found *= _AMONG_ITS_LIKE**0.5
        return EmbeddingPairs(*found.chunk(2, 1))

    def _at(self, prompts: Sequence[str]) -> list[int]:
        return [self._places[prompt] for prompt in prompts]


def _distinct(rows: Tensor, weights: Tensor) -> Tensor:
    """Distinct rows of [m, d] with weights [m] that are not 0: [n, d], float64.

    A row is multiplied by the square root of the largest weight that it comes with, these scaled to
    a mean of 1: what weighs next to nothing is as if it was not there.
    """
    found, places = torch.unique(rows[weights > 0], dim=0, return_inverse=True)
    largest = torch.zeros(len(found), dtype=torch.float64)
    largest = largest.scatter_reduce(0, places, weights[weights > 0], "amax")
    return found.double() * (largest * len(largest) / largest.sum()).sqrt()[:, None]


def _encoded(encoder: TextEncoder, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids [len(prompts), positions] and e(c) [len(prompts), positions, d]."""
    ids = encoder.tokens(prompts)
    # The end of the text has the highest id.
    length = min(ids.shape[1], int(ids.argmax(1).max()) + 1 + _PADDING)
    return ids[:, :length], encoder.encode(prompts, length, _PADDING).cpu()


def _from_the_end(ids: Tensor) -> Tensor:
    """Which positions [n, positions] are a text's end or padding behind it."""
    return torch.arange(ids.shape[1]) >= ids.argmax(1)[:, None]


def _together(ids: Tensor, states: Tensor, asked: Sequence[int], answers: Sequence[int]) -> Tensor:
    """The embeddings of prompts, each beside the one of the other prompt that plays its part:
    [n, positions, 2 d]."""
    return torch.cat([states[asked], answering(ids[asked], ids[answers], states[answers])], -1)


def answering(ids: Tensor, others: Tensor, states: Tensor) -> Tensor:
    """The embeddings of other prompts, rearranged to answer the tokens of ids [n, positions]."""
    order = torch.stack([align(a, b) for a, b in zip(ids, others, strict=True)])
    return torch.gather(states, 1, order[..., None].expand_as(states))
