"""The weighted least squares that UCE and MACE solve."""

import torch
from torch import Tensor

from benchmarks.peers.interface import identity


def least_squares(
    concept: Tensor, instead: Tensor, kept: Tensor, *, erase: float, keep: float, ridge: float
) -> Tensor:
    """T [d, d] that minimises
    erase |C T^T - C*|^2 + keep |K T^T - K|^2 + ridge |T - I|^2, for rows C, C* [n, d], K [m, d].

    W' = W T is then the published W' for every W at once: W only stands to the left of all terms.
    """
    gram = keep * kept.T @ kept + ridge * identity(concept.shape[1])
    wanted = erase * instead.T @ concept + gram
    return torch.linalg.solve(erase * concept.T @ concept + gram, wanted, left=False)
