"""RECE: Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models (Gong et al. 2024,
arXiv 2407.12383).

UCE first; then, some rounds long, what still leads to the concept is derived and erased as well.
Derived are the embeddings c' that the edited W' answer as the original W answer the concept's c,
over all keys and values: min sum |W' c' - W c|^2 + lambda |c'|^2, whose solution is
c' = (sum W'^T W' + lambda I)^-1 (sum W'^T W) c, for every row of the concept's prompts. They are
mapped to the rows of the blank prompt in the same places by UCE's equations, applied to the model
as it is edited so far. As with UCE, what is kept is what the user names; general captions are no
part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers.interface import Edit, Request, identity, through
from benchmarks.peers.least_squares import least_squares
from benchmarks.peers.rows import (
    Prompts,
    Tokens,
    Toward,
    concept_prompts,
    every_concept_rows,
    kept_rows,
)


@dataclass(frozen=True)
class RECE:
    """erase, preserve, ridge: UCE's weights, in every round. robust: lambda of c'. rounds: of
    deriving and erasing. tokens, toward, prompts: of the first edit, see `rows`."""

    erase: float = 0.1
    preserve: float = 0.1
    ridge: float = 0.1
    robust: float = 1e-1
    rounds: int = 1
    tokens: Tokens = "last"
    toward: Toward = "neutral"
    prompts: Prompts = "bare"

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tokens": ("last", "onward"),
        "toward": ("neutral", "sibling"),
        "prompts": ("bare", "phrases"),
        "ridge": (0.1, 0.01),
        "robust": (1e-1, 1e-2, 1e-3),
        "rounds": (1, 2, 3),
    }

    def edit(self, request: Request) -> Edit:
        kept = kept_rows(request, self.tokens, self.prompts)
        concept, instead = every_concept_rows(request, self.tokens, self.toward, self.prompts)
        operator = self._erased(concept, instead, kept)
        read, blank = self._read(request)
        gram = torch.stack(
            [w.double().T @ w.double() for _, w in request.model.denoiser.stored_weights()]
        )
        for _ in range(self.rounds):
            found = derived(read, operator, gram.sum(0), self.robust)
            operator = operator @ self._erased(found, blank, kept)
        return through(request.model, operator)

    def _erased(self, concept: Tensor, instead: Tensor, kept: Tensor) -> Tensor:
        """UCE's operator [d, d] for rows C, C* [n, d], K [m, d]."""
        return least_squares(
            concept, instead, kept, erase=self.erase, keep=self.preserve, ridge=self.ridge
        )

    def _read(self, request: Request) -> tuple[Tensor, Tensor]:
        """Every row c of the concepts' prompts, and the blank's in their places, [n, d] each."""
        texts = [
            text
            for name in request.names
            for text in concept_prompts(request, name, name, self.prompts)
        ]
        states = request.model.text.encode(texts).double()
        blank = request.model.text.encode([""]).double().expand_as(states)
        return states.flatten(0, 1), blank.flatten(0, 1)


def derived(concept: Tensor, operator: Tensor, gram: Tensor, robust: float) -> Tensor:
    """Rows c' [n, d] for rows c [n, d], W' = W T of every W and the sum of W^T W [d, d]."""
    crossed = gram @ operator
    regular = operator.T @ crossed + robust * identity(len(gram))
    return torch.linalg.solve(regular, concept @ crossed, left=False)
