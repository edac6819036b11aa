"""Which words are near to each other: in their letters, and in what the text encoder makes of them.

An increment for one word acts on its neighbours too, and two names of one thing cannot be told
apart at all. Both can be seen before anything is erased.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

#: Words whose directions have this cosine count as one.
SAME = 0.95


class EndEncoder(Protocol):
    """What a text encoder makes of a few words, in one row."""

    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of the end of each prompt [len(prompts), d]."""
        ...


@dataclass(frozen=True)
class Nearness:
    """Cosines between the directions of some words.

    A word's direction is its embedding minus what ordinary words have in common, which is most of
    any embedding. cosines: [words, words].
    """

    places: Mapping[str, int]
    cosines: Tensor

    @classmethod
    def of(cls, encoder: EndEncoder, words: Iterable[str], ordinary: Sequence[str]) -> "Nearness":
        """Between words. ordinary: a few dozen of all kinds."""
        distinct = tuple(dict.fromkeys(words))
        common = encoder.ends(ordinary).double().mean(0)
        directions = torch.nn.functional.normalize(encoder.ends(distinct).double() - common)
        places = {word: place for place, word in enumerate(distinct)}
        return cls(places, directions @ directions.T)

    def between(self, a: str, b: str) -> float:
        """The cosine of two of the words."""
        return float(self.cosines[self.places[a], self.places[b]])

    def nearest(self, names: Sequence[str], others: Sequence[str]) -> list[str]:
        """The others, the one nearest to any of the names first."""
        if not others:
            return []
        rows = self.cosines[[self.places[name] for name in names]]
        near = rows[:, [self.places[other] for other in others]].amax(0)
        return [others[int(place)] for place in near.argsort(descending=True, stable=True)]

    def same(self, a: str, b: str) -> bool:
        """Whether two of the words can hardly be told apart, by letters or by embedding."""
        return holds(a, b) or holds(b, a) or self.between(a, b) >= SAME


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
