"""The least-squares increment: no image, no UNet pass, one solve.

One operator T serves every layer: dW = W @ T, so that a layer reads the concept's embeddings as
if they were those of something else (UCE's objective, here under SepME's constraint).
"""

import torch
from torch import Tensor

from sepme_cli.erasure.subspace import Metric


def solve(concept: Tensor, instead: Tensor, cost: Metric) -> Tensor:
    """The operator T [d, d] that minimises |C T^T - (C* - C)|^2 / n + tr(T M T^T).

    concept: C [n, d], the embeddings of the concept's prompts, one row a token. instead: C* [n, d],
    row for row what they should act like. cost: the metric M; T's rows are combinations of its
    admissible directions.
    """
    c, wanted = concept.double() @ cost.null.T, (instead - concept).double()
    found = torch.linalg.solve(c.T @ c / len(c) + cost.cost, c.T @ wanted / len(c))
    return found.T @ cost.null


def reduce(operator: Tensor, concept: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The operator's best part of at most that rank on the concept: reduced-rank regression.

    Returns (shift [d, r], basis [r, d]) with T near shift @ basis; the rows of basis are
    orthonormal and lie in the row space of T, so they are as admissible as T is.
    """
    moved = concept.double() @ operator.T
    _, values, outputs = torch.linalg.svd(moved, full_matrices=False)
    kept = outputs[: min(rank, int((values > 1e-9 * values[0].clamp(min=1e-30)).sum()))]
    rows = kept @ operator  # T restricted to the kept outputs
    q, r = torch.linalg.qr(rows.T)  # rows = r.T @ q.T
    return kept.T @ r.T, q.T
