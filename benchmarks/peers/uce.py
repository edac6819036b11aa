"""UCE: Unified Concept Editing in Diffusion Models (Gandikota et al. 2023, arXiv 2308.14761).

Its objective over edited concepts E and preserved ones P,
sum_E |W' c - v*|^2 + sum_P |W' c - W c|^2 with v* = W c*, and its closed form
W' = (sum_E v* c^T + sum_P W c c^T) (sum_E c c^T + sum_P c c^T)^-1,
with the weights that its authors put on the sums and the lambda I that makes it invertible.
P is what the user names; general captions are no part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.peers.interface import Edit, Request, through
from benchmarks.peers.least_squares import least_squares
from benchmarks.peers.rows import Prompts, Tokens, Toward, every_concept_rows, kept_rows


@dataclass(frozen=True)
class UCE:
    """erase, preserve, ridge: weights of E, of P, of staying the same (lambda)."""

    erase: float = 1.0
    preserve: float = 1.0
    ridge: float = 0.5
    tokens: Tokens = "last"
    toward: Toward = "neutral"
    prompts: Prompts = "bare"

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tokens": ("last", "onward"),
        "toward": ("neutral", "sibling"),
        "prompts": ("bare", "phrases"),
        "erase": (1.0, 10.0),
        "ridge": (0.5, 0.01),
    }

    def edit(self, request: Request) -> Edit:
        concept, instead = every_concept_rows(request, self.tokens, self.toward, self.prompts)
        kept = kept_rows(request, self.tokens, self.prompts)
        operator = least_squares(
            concept, instead, kept, erase=self.erase, keep=self.preserve, ridge=self.ridge
        )
        return through(request.model, operator)
