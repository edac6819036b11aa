"""What is to be erased and what must stay, as prompts and as rows of embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from patch_spec import limits
from patch_spec.text import clean_text
from sepme_cli.erasure.alignment import align
from sepme_cli.erasure.prompts import NEUTRAL, AsKind, Kind, Phrase, kinds, other, pairs, phrases

_PAIRS = 40
_COMPANIONS = 16


class TextEncoder(Protocol):
    """e(c): what the layers that an increment changes read."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions], padded."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Hidden states [len(prompts), positions, d], one row a token."""
        ...


def parse_word(word: str, kind: AsKind) -> tuple[str, AsKind]:
    """A word as a user names it and what it is: "style:noto", "object:cat", or a bare word, which
    is of the given kind. Raises FormatError J5 for text that a patch cannot hold."""
    prefix, colon, name = word.partition(":")
    if colon and prefix in ("style", "object"):
        return clean_text(name, limits.CONCEPT_BYTES), cast(Kind, prefix)
    return clean_text(word, limits.CONCEPT_BYTES), kind


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

    siblings: [siblings][phrases], what the concept should act like on average; without any, it
    should act like the phrase without the concept.
    """

    name: str
    kind: AsKind
    phrases: tuple[Phrase, ...]
    siblings: tuple[tuple[Phrase, ...], ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(phrase.text for phrase in self.phrases)


def describe(word: str, kind: AsKind, protected: Protected) -> Concept:
    """A concept with the protected words of its kind as siblings, of the other as companions.

    word, kind: see `parse_word`.
    """
    name, kind = parse_word(word, kind)
    found: list[Phrase] = []
    siblings: dict[str, list[Phrase]] = {}
    for each in kinds(kind):
        beside = protected.of(other(each))[:_COMPANIONS]
        found += phrases(name, each, beside)
        for sibling in protected.of(each):
            siblings.setdefault(sibling, []).extend(phrases(sibling, each, beside))
    complete = [tuple(s) for s in siblings.values() if len(s) == len(found)]
    return Concept(name, kind, tuple(found), tuple(complete))


def rows(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Every distinct embedding row of prompts: [n, d], float64; n is 0 without prompts."""
    if not prompts:
        return rows(encoder, [""])[:0]
    states = encoder.encode(prompts).double().cpu()
    return torch.unique(states.flatten(0, 1), dim=0)


def concept_rows(encoder: TextEncoder, concept: Concept) -> tuple[Tensor, Tensor]:
    """C and C* [phrases * positions, d], float64: the concept's embeddings, and row for row what
    they should act like."""
    ids = encoder.tokens(concept.prompts)
    states = encoder.encode(concept.prompts).double().cpu()
    instead = [
        _answers(encoder, ids, [phrase.text for phrase in sibling]) for sibling in concept.siblings
    ] or [_answers(encoder, ids, [phrase.without for phrase in concept.phrases])]
    return states.flatten(0, 1), torch.stack(instead).mean(0).flatten(0, 1)


def _answers(encoder: TextEncoder, ids: Tensor, prompts: Sequence[str]) -> Tensor:
    """The embeddings of prompts, rearranged to answer the tokens of ids [n, positions]."""
    states = encoder.encode(prompts).double().cpu()
    order = torch.stack([align(a, b) for a, b in zip(ids, encoder.tokens(prompts), strict=True)])
    return torch.gather(states, 1, order[..., None].expand_as(states))
