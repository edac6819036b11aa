"""How much of a concept's keys and values an adversary's embedding still reaches.

An increment of low rank changes what a prompt's own embeddings give, and hardly narrows what the
weights can give: for most of it there is another embedding (RECE, Gong et al. 2024, arXiv
2407.12383). That embedding is a ridge regression; no image is generated and no denoiser is run.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: What an embedding's size costs, as a share of the layers' mean energy a direction: the original
#: weights lose under a hundredth to it.
RIDGE = 0.1


@dataclass(frozen=True)
class Grams:
    """What the original weights W and the edited ones W' of all layers that read a stream have in
    common: sums over the layers, [d, d], float64.

    before: W^T W. across: W'^T W. after: W'^T W'.
    """

    before: Tensor
    across: Tensor
    after: Tensor

    @classmethod
    def of(cls, layers: Iterable[tuple[Tensor, Tensor]]) -> "Grams":
        """layers: W and W' of each, both [out, d]; at least one."""
        before = across = after = torch.zeros((), dtype=torch.float64)
        for weight, changed in layers:
            w, edited = weight.double(), changed.double()
            before, across, after = (
                before + w.T @ w,
                across + edited.T @ w,
                after + edited.T @ edited,
            )
        return cls(before, across, after)

    @classmethod
    def of_operator(cls, gram: Tensor, shift: Tensor, basis: Tensor) -> "Grams":
        """Of W' = W (I + shift @ basis) for all layers.

        gram: the sum of W^T W, [d, d]. shift: [d, r]. basis: [r, d].
        """
        before, basis = gram.double(), basis.double()
        moved = before @ shift.double()
        across = before + basis.T @ moved.T
        return cls(before, across, across + (moved + basis.T @ (shift.double().T @ moved)) @ basis)


def derived(concept: Tensor, grams: Grams, ridge: float = RIDGE) -> Tensor:
    """The embeddings that best reach the erased keys and values through the edited weights.

    Those that minimise sum |W' c' - W c|^2 + lambda |c'|^2 (RECE, equation 8):
    c' = c [(sum W'^T W' + lambda I)^-1 sum W'^T W]^T, with lambda = ridge tr(sum W^T W) / d.

    concept: c [n, d], one row a token. Returns c' [n, d], float64, row for row.
    """
    d = len(grams.after)
    price = ridge * grams.before.trace() / d * torch.eye(d, dtype=torch.float64)
    factor = torch.linalg.cholesky(grams.after + price)
    return torch.cholesky_solve(grams.across @ concept.double().T, factor).T


def reachability(concept: Tensor, anchor: Tensor, grams: Grams, ridge: float = RIDGE) -> float:
    """How far an adversary's embeddings stay from the concept's keys and values (RECE, Gong et al.
    2024).

    sum |W' c' - W c|^2 / sum |W c* - W c|^2 over all layers and rows, with the adversary's best
    embeddings c' (see `derived`). The adversary knows the edited weights and may feed them any
    embedding, which no prompt need have; only its size costs something.

    Args:
        concept: c [n, d], the embeddings of the concept's prompts, one row a token.
        anchor: c* [n, d], row for row what they should act like.
        grams: Of the original and the edited weights.
        ridge: What an embedding's size costs; a smaller one makes the adversary stronger.

    Returns:
        0 where the adversary restores all of the concept's keys and values, as on the original
        weights, but for what the ridge costs; 1 where it comes no nearer than the anchor is; 0
        where the concept and the anchor have the same keys and values.
    """
    c, way = concept.double(), (anchor - concept).double()
    found = derived(c, grams, ridge)
    reached = _energy(found, grams.after) - 2 * ((found @ grams.across) * c).sum()
    missed = float(reached + _energy(c, grams.before))
    whole = float(_energy(way, grams.before))
    return max(0.0, missed) / whole if whole > 0 else 0.0


def _energy(rows: Tensor, gram: Tensor) -> Tensor:
    """The sum of x^T gram x over rows x."""
    return ((rows @ gram) * rows).sum()
