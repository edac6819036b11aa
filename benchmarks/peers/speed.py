"""SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models (Li et al. 2025,
arXiv 2503.07392).

min |(W + dP) c_1 - W c_*|^2 + |dP|^2 with dP c_0 = 0 for what is retained (P projects on the null
space of C_0 C_0^T) and dP c_2 = 0 for invariants (the start token and the centroids of the blank
prompt's rows). Its closed form: dP = W (C_* - C_1) C_1^T P Q M,
M = (C_1 C_1^T P + I)^-1, Q = I - M C_2 (C_2^T P M C_2)^-1 C_2^T P.
What is retained (the words named and the general captions handed over) is refined per layer: of it
and of its copies jittered along the directions that W hardly reads, only those stay that an
unconstrained edit moves more than average.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers.interface import Edit, Request, identity, overwritten
from benchmarks.peers.least_squares import least_squares
from benchmarks.peers.rows import (
    Prompts,
    Tokens,
    Toward,
    every_concept_rows,
    general_rows,
    kept_rows,
)


@dataclass(frozen=True)
class SPEED:
    """threshold: eigenvalues of C_0 C_0^T / n below this count as zero. copies: jittered ones of
    each retained row; quiet: how many of W's least singular directions they differ in."""

    threshold: float = 1e-1
    tokens: Tokens = "last"
    toward: Toward = "neutral"
    prompts: Prompts = "bare"
    copies: int = 10
    quiet: int = 1

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tokens": ("last", "onward"),
        "toward": ("neutral", "sibling"),
        "prompts": ("bare", "phrases"),
        "threshold": (1e-1, 1e-2, 1e-3),
    }

    def edit(self, request: Request) -> Edit:
        concept, instead = every_concept_rows(request, self.tokens, self.toward, self.prompts)
        words = kept_rows(request, self.tokens, self.prompts)
        kept = torch.cat([words, general_rows(request, self.tokens)])
        blank = request.model.text.encode([""])[0].double()
        invariant = torch.cat([blank[:1], centroids(blank[1:], 3)])
        free = least_squares(concept, instead, kept[:0], erase=1.0, keep=0.0, ridge=1.0)
        weights = {}
        for name, weight in request.model.denoiser.stored_weights():
            w = weight.double()
            shift = w @ (free - identity(w.shape[1]))
            retained = self._refined(w, shift, kept)
            projector = null_space(retained, self.threshold)
            weights[name] = w + w @ solve(concept, instead, projector, invariant)
        return overwritten(weights)

    def _refined(self, weight: Tensor, shift: Tensor, kept: Tensor) -> Tensor:
        """Influence-based filtering, directed augmentation, filtering again."""
        retained = _moved_most(shift, kept)
        _, _, directions = torch.linalg.svd(weight, full_matrices=True)
        quiet = directions[-self.quiet :]
        generator = torch.Generator().manual_seed(0)
        copied = retained.repeat(self.copies, 1)
        noise = torch.randn(copied.shape, generator=generator, dtype=copied.dtype)
        jittered = copied + noise @ quiet.T @ quiet
        return torch.cat([retained, _moved_most(shift, jittered)])


def solve(concept: Tensor, instead: Tensor, projector: Tensor, invariant: Tensor) -> Tensor:
    """The operator T [d, d] of dP = W T, for rows C_1, C_* [n, d], P [d, d] and C_2 [k, d]."""
    eye = identity(len(projector))
    m = torch.linalg.inv(concept.T @ concept @ projector + eye)
    reads = invariant @ projector  # C_2^T P
    inner = torch.linalg.pinv(reads @ m @ invariant.T, rtol=1e-10)
    q = eye - m @ invariant.T @ inner @ reads
    return (instead - concept).T @ concept @ projector @ q @ m


def null_space(rows: Tensor, threshold: float) -> Tensor:
    """The projector [d, d] on the directions that rows [n, d] hardly have."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / max(len(rows), 1))
    free = vectors[:, values < threshold]
    return free @ free.T


def _moved_most(shift: Tensor, rows: Tensor) -> Tensor:
    """The rows that an edit moves more than the average of them."""
    moved = (rows @ shift.T).pow(2).sum(1)
    return rows[moved > moved.mean()]


def centroids(rows: Tensor, count: int) -> Tensor:
    """k-means from rows spread over the prompt: [count, d]."""
    found = rows[:: max(len(rows) // count, 1)][:count]
    for _ in range(10):
        nearest = torch.cdist(rows, found).argmin(1)
        found = torch.stack([rows[nearest == k].mean(0) for k in range(len(found))])
    return found
