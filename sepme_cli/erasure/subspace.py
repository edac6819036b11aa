"""Weight decoupling: where an increment may act so that nothing else is touched.

An increment dW [out, d] is added to layers that read text embeddings e [d]. It changes nothing
for a prompt whose embeddings it maps to zero. Two strengths of that promise are kept apart:

- *separable*: dW e^T = 0 for the blank, exactly, and for the concepts erased beside this one or
  before it along every direction in which they carry energy (SepME, "weight decoupling":
  e_m S = 0). What is left of them below the tolerance weighs heavily.
- *protected*: dW e^T is small for what should stay as it is, weighed against acting on the
  concept. A hard constraint on all of it would exhaust the d dimensions and leave nothing to
  erase with.

Everything here is float64 and knows neither networks nor files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: What is below this share of the largest singular value is rounding, in float64.
_EXACT = 1e-9


@dataclass(frozen=True)
class Weighing:
    """What the admissible directions weigh against each other.

    tolerance: singular values of the separable rows below this share of the largest constrain
    nothing by force. insistence: the weight, beside the concept's own, of what the tolerance let
    through. protection: mu, the same for protected rows. ridge: lambda,
    the weight of every direction as a share of the concept's mean energy a direction, so that
    what nobody looked at stays too.
    """

    tolerance: float = 1e-2
    insistence: float = 1e3
    protection: float = 100.0
    ridge: float = 1e-4


def row_space(rows: Tensor, tolerance: float) -> Tensor:
    """Orthonormal basis [k, d] of the span of rows [n, d], singular values above tolerance
    times the largest."""
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    return directions[values > tolerance * values.max().clamp(min=torch.finfo(values.dtype).tiny)]


@dataclass(frozen=True)
class Metric:
    """What it costs to act on a direction: a quadratic form on the admissible directions.

    null: [free, d], orthonormal: the admissible directions. cost: [free, free], positive, seen in
    null.
    """

    null: Tensor
    cost: Tensor

    def of(self, basis: Tensor) -> Tensor:
        """The cost of admissible directions, rows of basis [r, d], between each other: [r, r]."""
        inside = basis @ self.null.T
        return inside @ self.cost @ inside.T


def metric(
    concept: Tensor, blank: Tensor, separable: Tensor, protected: Tensor, weighing: Weighing
) -> Metric:
    """The metric for erasing concept [n, d]: blank [b, d] rows are out of reach, separable [s, d]
    rows nearly so, protected [m, d] rows are dear, and every direction costs the ridge."""
    taken = row_space(blank, _EXACT)
    if len(separable):
        taken = row_space(torch.cat([taken, row_space(separable, weighing.tolerance)]), _EXACT)
    _, _, directions = torch.linalg.svd(taken, full_matrices=True)
    null = directions[len(taken) :]
    energy = concept.double().pow(2).sum() / len(concept) / concept.shape[1]
    cost = weighing.ridge * energy * torch.eye(len(null), dtype=torch.float64)
    for kept, weight in ((separable, weighing.insistence), (protected, weighing.protection)):
        inside = kept.double() @ null.T
        cost = cost + weight * inside.T @ inside / max(len(kept), 1)
    return Metric(null, cost)
