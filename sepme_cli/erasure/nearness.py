"""Which words are near to each other: in their letters, and in what the text encoder makes of them.

An increment for one word acts on its neighbours too, and two names of one thing cannot be told
apart at all. Both can be seen before anything is erased; so can what a word is, a style or an
object.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from sepme_cli.erasure.prompts import AsKind

_SAME = 0.85
"""A word is another name of one that is as near to it as this share of the vocabulary is not to
any: encoders differ in how near their words are, but in all of them most words are a thing of
their own."""
_RELATED = 0.25
"""A word that the dictionary has as another name of one, or as a kind of it, has to be as near to
it as this share of the vocabulary is not to any: the dictionary's "toy" is a dog, too."""
_LOOKED_AT = 600
"""How many words of the vocabulary tell that."""
_RIDGE = 0.3
_UNSURE = 0.1
"""Below this, of 1, a word is neither clearly a style nor clearly an object."""


class EndEncoder(Protocol):
    """What a text encoder makes of a few words, in one row."""

    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of the end of each prompt [len(prompts), d]."""
        ...


@dataclass(frozen=True)
class Nearness:
    """Cosines between the directions of some words.

    A word's direction is its embedding minus what a vocabulary has in common, which is most of any
    embedding. directions: [words, d]. same_from: the cosine from which two words count as names of
    one thing; related_from: of two of which a dictionary says so.
    """

    places: Mapping[str, int]
    directions: Tensor
    same_from: float
    related_from: float

    @classmethod
    def of(
        cls, encoder: EndEncoder, words: Iterable[str], vocabulary: Sequence[str], ends: Tensor
    ) -> "Nearness":
        """Between words, and words of a vocabulary whose embeddings' ends [n, d] are known."""
        known = frozenset(vocabulary)
        new = tuple(word for word in dict.fromkeys(words) if word not in known)
        both = torch.cat([encoder.ends(new), ends]) if new else ends
        directions = torch.nn.functional.normalize(both.double() - ends.double().mean(0))
        places = {word: place for place, word in enumerate((*new, *vocabulary))}
        return cls(places, directions, *_thresholds(directions[len(new) :]))

    def between(self, a: str, b: str) -> float:
        """The cosine of two of the words."""
        return float(self.directions[self.places[a]] @ self.directions[self.places[b]])

    def nearest(self, names: Sequence[str], others: Sequence[str]) -> list[str]:
        """The others, the one nearest to any of the names first."""
        if not others:
            return []
        rows = self.directions[[self.places[name] for name in names]]
        near = (rows @ self.directions[[self.places[other] for other in others]].T).amax(0)
        return [others[int(place)] for place in near.argsort(descending=True, stable=True)]

    def alike(self, names: Sequence[str], others: Sequence[str]) -> set[tuple[str, str]]:
        """The pairs of a name and another that can hardly be told apart, by letters or by
        embedding."""
        rows = self.directions[[self.places[name] for name in names]]
        near = rows @ self.directions[[self.places[other] for other in others]].T
        found = {(names[i], others[j]) for i, j in (near >= self.same_from).nonzero().tolist()}
        by_letter = _by_letter(others)
        for name in names:
            candidates = {other for letter in _letters(name) for other in by_letter.get(letter, ())}
            found |= {(name, c) for c in candidates if holds(name, c) or holds(c, name)}
        return found

    def kinds(
        self, groups: Sequence[Sequence[str]], styles: Collection[str], objects: Collection[str]
    ) -> list[AsKind]:
        """What each group of names is, from what the vocabulary's styles and objects have in
        common.

        A ridge regression of +1 for styles and -1 for objects on the words' directions, each kind
        weighing half; "any" for what lies between them.
        """
        of = [[self.places[word] for word in words] for words in (styles, objects)]
        rows = self.directions[[*of[0], *of[1]]]
        sides = rows.new_tensor([1.0] * len(of[0]) + [-1.0] * len(of[1]))
        weights = rows.new_tensor([0.5 / len(of[0])] * len(of[0]) + [0.5 / len(of[1])] * len(of[1]))
        mean = weights @ rows
        apart = (rows - mean) * weights[:, None]
        spread = apart.T @ (rows - mean)
        spread += _RIDGE * spread.trace() / len(spread) * torch.eye(len(spread), dtype=rows.dtype)
        normal = torch.linalg.solve(spread, apart.T @ sides)
        scores = [
            float(((self.directions[[self.places[n] for n in names]] - mean) @ normal).mean())
            for names in groups
        ]
        return [
            "any" if abs(score) < _UNSURE else "style" if score > 0 else "object"
            for score in scores
        ]


def _thresholds(directions: Tensor) -> tuple[float, float]:
    """The cosines that most words of a vocabulary, and few of them, do not reach with their
    nearest; at most 1."""
    step = max(1, len(directions) // _LOOKED_AT)
    looked_at = torch.arange(0, len(directions), step)
    cosines = directions[looked_at] @ directions.T
    cosines[torch.arange(len(looked_at)), looked_at] = -1
    nearest = cosines.amax(1)
    same, related = (min(1.0, float(nearest.quantile(share))) for share in (_SAME, _RELATED))
    return same, related


def _letters(name: str) -> set[str]:
    """What the words of a name begin with: no two words that are alike differ there."""
    return {word[0] for word in _words(name)}


def _by_letter(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        for letter in _letters(name):
            found.setdefault(letter, []).append(name)
    return found


def holds(whole: str, part: str) -> bool:
    """Whether a name holds another, whatever its case and number: "Claude Monet" and "Monet",
    "cats" and "cat"."""
    long, short = _words(whole), _words(part)
    return bool(short) and any(
        all(map(_alike, long[start:], short)) for start in range(len(long) - len(short) + 1)
    )


@lru_cache(maxsize=4096)
def _words(name: str) -> tuple[str, ...]:
    """The words of a name, without case and articles."""
    words = re.findall(r"\w+", name.casefold())
    return tuple(word for word in words if word not in ("a", "an", "the"))


def _alike(a: str, b: str) -> bool:
    """Whether two words are one, or one's plural."""
    one, many = sorted((a, b), key=len)
    return many in (one, f"{one}s", f"{one}es", f"{one.removesuffix('y')}ies")
