"""DP: Closed-Form Concept Erasure via Double Projections (Zhang et al. 2026, arXiv 2604.10032).

First projection: the concept's c goes to the nearest vector of a safe span S,
c* = S (S^T S)^+ S^T c. Second: the change of the weights is confined to the left null space U_2 of
what is preserved, or to what its leading singular directions leave:
dW = W (c* - c) x^T U_2^T / |x|^2 with x = U_2^T c, of rank one, so that W' c = W c* and dW = 0 on
all that is preserved. Of several rows or concepts, x^T / |x|^2 becomes the pseudo-inverse of all
their x, which solves W' c = W c* for all of them at once.
Preserved are the words that are named, the general captions and the blank prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.peers.interface import Edit, Request, identity, through
from benchmarks.peers.rows import (
    Prompts,
    Tokens,
    balanced,
    every_concept_rows,
    general_rows,
    kept_rows,
)
from sepme_cli.erasure.subspace import row_space

#: Rows that are this nearly parallel, as a share, are one.
_PARALLEL = 1e-3


@dataclass(frozen=True)
class DP:
    """energy: the share of what is preserved that must not change at all; 1 is the exact null
    space, which a few words leave but many captions do not. safe: S, what is preserved itself or
    the rows of what the concept is to act like, see `rows.Toward`."""

    energy: float = 0.99
    safe: Literal["kept", "neutral", "sibling"] = "kept"
    tokens: Tokens = "last"
    prompts: Prompts = "bare"

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tokens": ("last", "onward"),
        "safe": ("kept", "neutral", "sibling"),
        "prompts": ("bare", "phrases"),
        "energy": (0.9, 0.99, 0.999, 1.0),
    }

    def edit(self, request: Request) -> Edit:
        toward = "neutral" if self.safe == "kept" else self.safe
        concept, instead = every_concept_rows(request, self.tokens, toward, self.prompts)
        kept = balanced(
            kept_rows(request, self.tokens, self.prompts),
            general_rows(request, self.tokens),
            request.model.text.encode([""])[0].double(),
        )
        held = leading(kept, self.energy)
        safe = held if self.safe == "kept" else row_space(instead, _PARALLEL)
        return through(request.model, project(concept, safe, held))


def leading(rows: Tensor, share: float) -> Tensor:
    """Orthonormal directions [k, d] that hold so much of the energy of rows [n, d]: as few as do,
    or at 1 all that they span."""
    directions = row_space(rows)
    if share >= 1:
        return directions
    held = (rows @ directions.T).pow(2).sum(0).cumsum(0)
    return directions[: 1 + int((held < share * held[-1]).sum())]


def project(concept: Tensor, safe: Tensor, held: Tensor) -> Tensor:
    """The operator T [d, d] of W' = W T, for rows c [n, d] and orthonormal rows that span what is
    safe [s, d] and what is preserved [k, d]."""
    free = torch.linalg.qr(held.T, mode="complete")[0].T[len(held) :]  # U_2^T
    shift = concept @ safe.T @ safe - concept
    return identity(held.shape[1]) + shift.T @ pseudo_inverse(concept @ free.T).T @ free


def pseudo_inverse(rows: Tensor) -> Tensor:
    """[k, n] of rows [n, k]; zero where k is, for then nothing is free to change."""
    if not rows.numel():
        return rows.new_zeros(rows.T.shape)
    return torch.linalg.pinv(rows, rtol=_PARALLEL)
