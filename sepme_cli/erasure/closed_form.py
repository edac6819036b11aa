"""The least-squares increment: no image, no UNet pass, one small solve a concept.

One operator T serves every layer: dW = W @ T, so that a layer reads the concept's embeddings as
if they were those of something else (UCE's objective, here under SepME's constraint).
"""

import torch
from torch import Tensor

from sepme_cli.erasure.subspace import Preservation


def solve(
    concept: Tensor,
    anchor: Tensor,
    preservation: Preservation,
    insistence: float,
    own: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator T [d, d] that minimises |C T^T - (C* - C)|^2 / n + tr(T M T^T).

    concept: C [n, d], the embeddings of the concept's prompts, one row a token. anchor: C* [n, d],
    row for row what they should act like. M = B - insistence C^T C / n: the cost B of preservation,
    less what the concept itself is in it.
    With K = C B^-1 C^T and a = (1 - insistence) / n (Woodbury):
    T^T = B^-1 C^T (I + a K)^-1 (C* - C) / n.
    own: how many of the rows, the first ones, are the concept's: n, which the cost of preservation
    holds; all if None. Of further ones, which are erased beside them, a is 1 / n.
    Returns left [d, n] and right [n, d] with T = left @ right; the rows of right are admissible.
    """
    c, wanted = concept.double(), (anchor - concept).double()
    right = preservation.solve(c)
    count = len(c) if own is None else own
    a = torch.full((len(c), 1), 1 / count, dtype=torch.float64)
    a[:count] = (1 - insistence) / count
    inner = torch.eye(len(c), dtype=torch.float64) + a * (c @ right.T)
    return torch.linalg.solve(inner, wanted / count).T, right


def reduce(left: Tensor, right: Tensor, concept: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best part of T = left @ right of at most that rank on the concept: reduced-rank
    regression.

    Returns (shift [d, r], basis [r, d]) with T near shift @ basis; the rows of basis are
    orthonormal and lie in the row space of T, so they are as admissible as T is.
    """
    moved = (concept.double() @ right.T) @ left.T
    # The singular vectors through the smaller Gram matrix: only the largest are wanted.
    values, vectors = torch.linalg.eigh(moved @ moved.T)
    found = int((values > 1e-18 * values[-1].clamp(min=1e-60)).sum())
    rank = min(rank, found)
    kept = torch.linalg.qr((vectors[:, len(values) - rank :].T @ moved).T)[0].T.flip(0)
    rows = (kept @ left) @ right  # T restricted to the kept outputs
    q, r = torch.linalg.qr(rows.T)  # rows = r.T @ q.T
    return kept.T @ r.T, q.T
