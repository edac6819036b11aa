"""Weight decoupling: where increments may act so that nothing else is touched.

An increment dW [out, d] is added to layers that read text embeddings e [d]. It changes nothing
for a prompt whose embeddings it maps to zero (SepME, "weight decoupling": dW e_m^T = 0). That is
kept in three strengths:

- the blank prompt, by force: its embeddings are out of every increment's reach;
- concepts erased beside this one or before it, dearly: acting on them costs `insistence` times
  what acting on the concept gains;
- what is protected, `protection` times, all of it together.

A hard constraint on every token of every prompt would use up the d dimensions after a handful of
concepts and leave nothing to erase with; a price lets the leakage grow smoothly instead. What it
costs to act is one quadratic form for all concepts, so that it is factorised once.

Everything here is float64 and knows neither networks nor files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sepme_cli.erasure.settings import CostWeights

#: What is below this share of the largest singular value is rounding, in float64.
_EXACT = 1e-9


def row_space(rows: Tensor, tolerance: float = _EXACT) -> Tensor:
    """Orthonormal basis [k, d] of the span of rows [n, d], singular values above tolerance
    times the largest."""
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    return directions[values > tolerance * values.max().clamp(min=torch.finfo(values.dtype).tiny)]


def energy(rows: Tensor) -> Tensor:
    """The mean of e^T e over rows e: [d, d], zero without rows."""
    wide = rows.double()
    return wide.T @ wide / max(len(rows), 1)


@dataclass(frozen=True)
class Preservation:
    """What must be preserved: what it costs to act on it, the same for all concepts that are
    erased together.

    null: [free, d], orthonormal: the directions that the blank does not use. cost: [d, d], what
    keeping everything costs, every concept counted as one of the others. factor: the Cholesky
    factor of null cost null^T. own: a concept's mean energy in a direction. ridge: what of the
    cost is the ridge's.
    """

    null: Tensor
    cost: Tensor
    factor: Tensor
    own: float
    ridge: float

    @classmethod
    def of(
        cls, blank: Tensor, concepts: Sequence[Tensor], protected: Tensor, weights: CostWeights
    ) -> "Preservation":
        """blank: rows [b, d]. concepts: each one's rows [n, d]. protected: the energy of all that
        is protected, [d, d]; see `energy`."""
        taken = row_space(blank)
        null = torch.linalg.qr(taken.T, mode="complete")[0].T[len(taken) :]
        apart = torch.zeros(2 * [blank.shape[1]], dtype=torch.float64)
        for rows in concepts:
            apart += energy(rows)
        own = float(apart.trace()) / max(len(concepts), 1) / len(apart)
        ridge = weights.ridge * own
        cost = weights.insistence * apart + weights.protection * protected
        cost += ridge * torch.eye(len(cost), dtype=torch.float64)
        inside = null @ cost @ null.T
        return cls(null, cost, torch.linalg.cholesky(inside), own, ridge)

    def solve(self, rows: Tensor) -> Tensor:
        """rows [n, d] times the inverse of the cost on the admissible directions: [n, d]."""
        inside = self.null @ rows.double().T
        return torch.cholesky_solve(inside, self.factor).T @ self.null

    @cached_property
    def taken(self) -> int:
        """In how many dimensions something must stay as it is: the blank's, and those in which
        keeping the rest costs more than erasing a concept gains there on average."""
        held = torch.linalg.eigvalsh(self.null @ self.cost @ self.null.T) - self.ridge
        return len(self.cost) - len(self.null) + int((held > self.own).sum())
