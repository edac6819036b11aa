"""What one does by hand: point the concept's name at another word, and keep nothing else in mind.

Least squares without any preservation: the smallest change of K and V for which the rows of the
concept's bare name act like those of another word. (It is TIME, Orgad et al. 2023, arXiv
2303.08084, at lambda to 0.) Replacing a row of the token table would be as simple, but a name of
several tokens shares them with other words, and a model's K and V are what is compared here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.peers.interface import Edit, Request, through
from benchmarks.peers.least_squares import least_squares
from benchmarks.peers.rows import Tokens, Toward, every_concept_rows


@dataclass(frozen=True)
class Naive:
    """tokens, toward: see `rows`. ridge: only so that equal rows do not divide by zero."""

    tokens: Tokens = "onward"
    toward: Toward = "sibling"
    ridge: float = 1e-6

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tokens": ("last", "onward"),
        "toward": ("neutral", "sibling"),
    }

    def edit(self, request: Request) -> Edit:
        concept, instead = every_concept_rows(request, self.tokens, self.toward, "bare")
        operator = least_squares(
            concept, instead, concept[:0], erase=1.0, keep=0.0, ridge=self.ridge
        )
        return through(request.model, operator)
