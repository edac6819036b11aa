"""What is to be erased and what must stay, as prompts and as rows of embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from sepme_cli.erasure.alignment import align
from sepme_cli.erasure.prompts import (
    GENERAL,
    NEUTRAL,
    AsKind,
    Kind,
    Phrase,
    kinds,
    other,
    pairs,
    phrases,
    renamed,
)
from sepme_cli.erasure.words import Item, parse_word

_ALL_ONE: Mapping[str, float] = MappingProxyType({})
_PAIRS = 40
_BESIDE = 16
_PADDING = 2
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
    """

    name: str
    names: tuple[str, ...]
    kind: AsKind
    phrases: tuple[Phrase, ...]
    like: str
    answers: tuple[str, ...]
    weights: tuple[float, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(phrase.text for phrase in self.phrases)


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
        return _distinct([self.states(prompts)], weights)

    def embedding_pairs(self, concept: Concept) -> EmbeddingPairs:
        """The concept's embeddings, and those of what it should act like."""
        asked, answers = self._at(concept.prompts), self._at(concept.answers)
        both = [
            torch.cat([states[asked], _answering(ids[asked], ids[answers], states[answers])], -1)
            for ids, states in self._parts
        ]
        return EmbeddingPairs(*_distinct(both, concept.weights).chunk(2, 1))

    def _at(self, prompts: Sequence[str]) -> list[int]:
        return [self._places[prompt] for prompt in prompts]


def _distinct(states: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Distinct rows of some prompts' states, each [prompts, positions, d]: [n, d], float64.

    weights: of the prompts, all 1 if empty. A row is multiplied by the square root of the largest
    weight that it comes with, these scaled to a mean of 1: what weighs next to nothing is as if it
    was not there.
    """
    rows = torch.cat([one.flatten(0, 1) for one in states])
    found, places = torch.unique(rows, dim=0, return_inverse=True)
    given = torch.tensor(weights or [1.0] * len(states[0]), dtype=torch.float64)
    each = torch.cat([given.repeat_interleave(one.shape[1]) for one in states])
    largest = torch.zeros(len(found), dtype=torch.float64).scatter_reduce(0, places, each, "amax")
    return found.double() * (largest * len(largest) / largest.sum()).sqrt()[:, None]


def _encoded(encoder: TextEncoder, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids [len(prompts), positions] and e(c) [len(prompts), positions, d]."""
    ids = encoder.tokens(prompts)
    # The end of the text has the highest id.
    length = min(ids.shape[1], int(ids.argmax(1).max()) + 1 + _PADDING)
    return ids[:, :length], encoder.encode(prompts, length, _PADDING).cpu()


def _answering(ids: Tensor, others: Tensor, states: Tensor) -> Tensor:
    """The embeddings of other prompts, rearranged to answer the tokens of ids [n, positions]."""
    order = torch.stack([align(a, b) for a, b in zip(ids, others, strict=True)])
    return torch.gather(states, 1, order[..., None].expand_as(states))
