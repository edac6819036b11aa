"""CURE: Concept Unlearning via Orthogonal Representation Editing in Diffusion Models (Das Biswas et
al. 2025, arXiv 2505.12677).

Of the embeddings to forget and of those to retain, the singular vectors V and the shares
r_i = s_i^2 / sum s^2 of their energy. Spectral expansion weighs each,
f(r) = alpha r / ((alpha - 1) r + 1), and P = V diag(f) V^T. What is peculiar to the concept,
P_dis = P_f - P_f P_r, is taken out in one step: W' = W (I - P_dis). Nothing takes its place.
An embedding is the mean over a prompt's tokens, or each of them. Retained are the words that are
named and the general captions; without either, P_r is zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers.interface import Edit, Request, identity, through
from benchmarks.peers.rows import Prompts, balanced, concept_prompts, kept_prompts, told_rows


@dataclass(frozen=True)
class CURE:
    """alpha, retain: of spectral expansion, for what is forgotten and for what is retained (the
    paper: 2 for objects and artists, 5 for what is unsafe). pooled: see `rows.told_rows`."""

    alpha: float = 2.0
    retain: float = 2.0
    pooled: bool = True
    prompts: Prompts = "phrases"

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "pooled": (True, False),
        "prompts": ("bare", "phrases"),
        "alpha": (2.0, 5.0, 50.0),
        "retain": (2.0, 5.0, 50.0),
    }

    def edit(self, request: Request) -> Edit:
        mine = [
            text
            for name in request.names
            for text in concept_prompts(request, name, name, self.prompts)
        ]
        words = [text for _, texts in kept_prompts(request, self.prompts) for text in texts]
        forget, named, general = (
            told_rows(request.model, texts, pooled=self.pooled)
            for texts in (mine, words, request.general)
        )
        erased, kept = expanded(forget, self.alpha), expanded(balanced(named, general), self.retain)
        width = forget.shape[1]
        return through(request.model, identity(width) - erased @ (identity(width) - kept))


def expanded(rows: Tensor, alpha: float) -> Tensor:
    """P [d, d] of rows [n, d], zero without rows."""
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    share = values.pow(2) / values.pow(2).sum()
    kept = alpha * share / ((alpha - 1) * share + 1)
    return directions.T * kept @ directions
