"""OCE: Orthogonal Concept Erasure for Diffusion Models (Sun et al. 2026, arXiv 2605.28902).

W* = R W with an orthogonal R of each layer's own, so that no key or value changes its length, nor
any two of them their angle. R is the Procrustes solution U V^T of M = U S V^T, which maximises
tr(R^T M), for
M = -e (I - G*) G + p_2 sum v v^T + p_1 W C_g W^T + lambda W W^T.
G and G* project on what W makes of the concepts and of what they are to act like, so the first
term is tr((I - G*) R G): what R makes of G is to leave all that is not G*. The others are what is
left of |R v - v|^2 for the kept words' v = W k / |W k|, of |R W c - W c|^2 for the tokens of
general captions (the paper's are COCO's; C_g is their second moment) and of |R W - W|^2.
Transposed, G (I - G*), the first term turns the concept away from what it is to act like.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers.interface import Edit, Request, identity, overwritten
from benchmarks.peers.rows import (
    Prompts,
    Tokens,
    Toward,
    balanced,
    every_concept_rows,
    general_rows,
    kept_rows,
)
from sepme_cli.erasure.subspace import row_space

#: Many rows of one prompt are nearly parallel: what is below this share of their largest singular
#: value does not count as a direction of theirs.
_PARALLEL = 1e-2


@dataclass(frozen=True)
class OCE:
    """erase, keep, prior, ridge: e, p_2, p_1 and lambda. A kept word counts once, however many
    rows it has."""

    erase: float = 1.0
    keep: float = 0.3
    prior: float = 0.5
    ridge: float = 1.5
    tokens: Tokens = "last"
    toward: Toward = "neutral"
    prompts: Prompts = "bare"

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tokens": ("last", "onward"),
        "toward": ("neutral", "sibling"),
        "prompts": ("bare", "phrases"),
        "erase": (1.0, 10.0, 100.0),
        "keep": (0.3, 3.0),
        "ridge": (1.5, 0.15),
    }

    def edit(self, request: Request) -> Edit:
        concept, instead = every_concept_rows(request, self.tokens, self.toward, self.prompts)
        kept = kept_rows(request, self.tokens, self.prompts)
        words = len(request.retained.styles) + len(request.retained.objects)
        general = balanced(general_rows(request, "all"))
        read = self.prior * general.T @ general + self.ridge * identity(general.shape[1])
        weights = {}
        for name, weight in request.model.denoiser.stored_weights():
            w = weight.double()
            v = balanced(_directions(kept @ w.T))
            stays = self.keep * words * v.T @ v + w @ read @ w.T
            weights[name] = rotation(concept @ w.T, instead @ w.T, stays, self.erase) @ w
        return overwritten(weights)


def rotation(concept: Tensor, instead: Tensor, stays: Tensor, erase: float) -> Tensor:
    """R [out, out] for rows W c and W c* [n, out] and the rest of M, [out, out]."""
    gone, guide = (_projector(_directions(rows)) for rows in (concept, instead))
    left, _, right = torch.linalg.svd(stays - erase * (identity(len(stays)) - guide) @ gone)
    return left @ right


def _directions(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _projector(rows: Tensor) -> Tensor:
    basis = row_space(rows, _PARALLEL)
    return basis.T @ basis
