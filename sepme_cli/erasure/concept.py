"""What is to be erased and what must stay, as prompts and as rows of embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sepme_cli.erasure.alignment import align
from sepme_cli.erasure.prompts import (
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
from sepme_cli.recipe import Item, parse_word

_PAIRS = 40
_COMPANIONS = 16
_PADDING = 2


class TextEncoder(Protocol):
    """e(c): what the layers that an increment changes read."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions], padded."""
        ...

    def encode(self, prompts: Sequence[str], positions: int | None = None) -> Tensor:
        """Hidden states [len(prompts), positions, d], one row a token; of all positions if None."""
        ...


@dataclass(frozen=True)
class Protected:
    """Words that must stay as they are, by what they are."""

    styles: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str], kind: AsKind) -> "Protected":
        """Words as a user names them; see `parse_word`. One of any kind is kept as both."""
        found: dict[Kind, list[str]] = {"style": [], "object": []}
        for word in words:
            name, said = parse_word(word, kind)
            for each in kinds(said):
                found[each].append(name)
        return cls(tuple(found["style"]), tuple(found["object"]))

    def beside(self, words: Iterable[tuple[str, AsKind]]) -> "Protected":
        """The same and further words, each once, of what they are."""
        more: dict[Kind, list[str]] = {"style": [], "object": []}
        for word, said in words:
            for each in kinds(said):
                more[each].append(word)
        return Protected(
            tuple(dict.fromkeys((*self.styles, *more["style"]))),
            tuple(dict.fromkeys((*self.objects, *more["object"]))),
        )

    @property
    def words(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.styles, *self.objects)))

    def of(self, kind: Kind) -> tuple[str, ...]:
        return self.styles if kind == "style" else self.objects

    def prompts(self) -> tuple[str, ...]:
        """Neutral phrases, every word in its phrases, and styles and objects together."""
        found = list(NEUTRAL)
        for kind in kinds("any"):
            beside = self.of(other(kind))
            for word in self.of(kind):
                found += [phrase.text for phrase in phrases(word, kind, beside[:4])]
        found += pairs(self.styles, self.objects, _PAIRS)
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Concept:
    """A concept to erase: its phrases, and for each phrase the same one of its siblings.

    siblings: by name; the concept should act like the most typical of them. Without any, it should
    act like the phrase without the concept.
    """

    name: str
    kind: AsKind
    phrases: tuple[Phrase, ...]
    siblings: Mapping[str, tuple[Phrase, ...]]

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(phrase.text for phrase in self.phrases)

    @property
    def counterparts(self) -> Mapping[str | None, tuple[str, ...]]:
        """For each sibling its phrases; under None those without the concept if it has none."""
        found: dict[str | None, tuple[str, ...]] = {
            name: tuple(phrase.text for phrase in phrases)
            for name, phrases in self.siblings.items()
        }
        return found or {None: tuple(phrase.without for phrase in self.phrases)}


@dataclass(frozen=True)
class Wanted:
    """What is to become of a concept's embeddings.

    concept, instead: C and C* [n, d], float64: distinct embeddings, and row for row what they
    should act like. like: the sibling that those are of, None for phrases without the concept.
    """

    concept: Tensor
    instead: Tensor
    like: str | None


def describe(item: Item, protected: Protected, most: int | None = None) -> Concept:
    """A concept under all of its names, with protected words of the other kind as companions.

    Its siblings are what it should act like where that is said, else the protected words of its
    kind. most: phrases of either kind, for each name.
    """
    found: list[Phrase] = []
    siblings: dict[str, list[Phrase]] = {}
    for each in kinds(item.kind):
        beside = protected.of(other(each))[:_COMPANIONS]
        for name in item.names:
            found += phrases(name, each, beside, most)
            for sibling in (item.like,) if item.like else protected.of(each):
                siblings.setdefault(sibling, []).extend(phrases(sibling, each, beside, most))
    for prompt in item.prompts:
        found.append(renamed(prompt, item.name, item.name))
        for sibling, answers in siblings.items():
            answers.append(renamed(prompt, item.name, sibling))
    complete = {name: tuple(s) for name, s in siblings.items() if len(s) == len(found)}
    return Concept(item.name, item.kind, tuple(found), complete)


class Lexicon:
    """The embeddings of many prompts, each encoded once.

    Only the positions that some text needs are encoded, and a few of the padding behind it: no
    token reads what comes after it, and paddings differ little from one another.
    """

    def __init__(self, encoder: TextEncoder, prompts: Iterable[str]) -> None:
        distinct = tuple(dict.fromkeys(prompts))
        self._places = {prompt: place for place, prompt in enumerate(distinct)}
        ids = encoder.tokens(distinct)
        # The end of the text has the highest id.
        length = min(ids.shape[1], int(ids.argmax(1).max()) + 1 + _PADDING)
        self._ids = ids[:, :length]
        self._states = encoder.encode(distinct, length).cpu()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions]."""
        return self._ids[[self._places[prompt] for prompt in prompts]]

    def states(self, prompts: Sequence[str]) -> Tensor:
        """e(c) [len(prompts), positions, d]."""
        return self._states[[self._places[prompt] for prompt in prompts]]

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """Every distinct embedding of prompts: [n, d], float64; n is 0 without prompts."""
        return torch.unique(self.states(prompts).flatten(0, 1), dim=0).double()

    def wanted(self, concept: Concept) -> Wanted:
        """What the concept should act like: the sibling that is nearest to the mean of all.

        One word gives pictures of one thing; the mean of several is the embedding of none, and was
        drawn as whatever is near it, the erased concept now and then.
        """
        ids = self.tokens(concept.prompts)
        answers = [self._answers(ids, prompts) for prompts in concept.counterparts.values()]
        mean = torch.stack(answers).mean(0)
        apart = torch.stack([(answer - mean).norm() for answer in answers])
        most_typical = int(apart.argmin())
        states = self.states(concept.prompts).flatten(0, 1)
        both = torch.cat([states, answers[most_typical].flatten(0, 1)], 1)
        rows, instead = torch.unique(both, dim=0).double().chunk(2, 1)
        return Wanted(rows, instead, list(concept.counterparts)[most_typical])

    def _answers(self, ids: Tensor, prompts: Sequence[str]) -> Tensor:
        """The embeddings of prompts, rearranged to answer the tokens of ids [n, positions]."""
        states, others = self.states(prompts), self.tokens(prompts)
        order = torch.stack([align(a, b) for a, b in zip(ids, others, strict=True)])
        return torch.gather(states, 1, order[..., None].expand_as(states))
