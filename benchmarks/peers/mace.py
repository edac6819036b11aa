"""MACE: Mass Concept Erasure in Diffusion Models (Lu et al. 2024, arXiv 2403.06135), the parts
that are solved in closed form.

Closed-form cross-attention refinement, for each concept by itself: in prompts that hold the
concept, the embeddings e^f of the *other* words, which carry a residue of it, are to act like the
same words' embeddings e^g beside a general word,
sum |W' e^f - W e^g|^2 + lambda_1 sum |W' e^p - W e^p|^2 over the prior p: the words that are named
and general captions (the paper's are COCO's).
Fusion, of the concepts' W_i into one: sum_i sum_j |W' e_j^f - W_i e_j^f|^2 + lambda_2 sum
|W' e^p - W e^p|^2.
Between the two, MACE trains a LoRA per concept on masked attention maps, which removes the
concept's own words: `mace_lora`. Without it, `tokens` "all" lets the refinement act on them too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.peers.interface import Edit, Request, through
from benchmarks.peers.least_squares import least_squares
from benchmarks.peers.rows import (
    Tokens,
    Toward,
    balanced,
    concept_rows,
    general_rows,
    kept_rows,
)

#: Keeps the normal equations invertible where the rows do not span the space.
RIDGE = 1e-3


@dataclass(frozen=True)
class MACE:
    """prior, fusion: lambda_1 and lambda_2, where every sum is a mean, so that they say the same
    whatever the number of prompts."""

    prior: float = 0.1
    fusion: float = 0.1
    tokens: Tokens = "context"
    toward: Toward = "neutral"

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tokens": ("context", "all"),
        "toward": ("neutral", "sibling"),
        "prior": (0.1, 1.0, 10.0),
        "fusion": (0.1, 1.0, 10.0),
    }

    def edit(self, request: Request) -> Edit:
        kept = balanced(kept_rows(request, "all", "phrases"), general_rows(request, "all"))
        found, wanted = [], []
        for name in request.names:
            rows, instead = concept_rows(request, name, self.tokens, self.toward, "phrases")
            scale = len(rows) ** -0.5
            refined = least_squares(
                rows * scale, instead * scale, kept, erase=1.0, keep=self.prior, ridge=RIDGE
            )
            found.append(rows * scale)
            wanted.append(rows * scale @ refined.T)
        if len(request.names) == 1:
            return through(request.model, refined)
        fused = least_squares(
            torch.cat(found), torch.cat(wanted), kept, erase=1.0, keep=self.fusion, ridge=RIDGE
        )
        return through(request.model, fused)
