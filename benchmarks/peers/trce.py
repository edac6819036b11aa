"""TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models (Chen et al.
2025, arXiv 2503.07389), its first stage.

UCE's normal equations on the embeddings of the end of the text, which hold what a whole prompt
says: of prompts that name the concept, e^m, and of the same prompts with a safe concept, e^s,
min sum |W' e^m - W e^s|^2 + eta sum |W' e^p - W e^p|^2.
The paper's prompts are 15 templates, each with 20 synonyms from a language model; here they are
sepme's phrases, with the synonyms that are handed over, if any. Preserved are the words that are
named and the general captions. The second stage, which fine-tunes queries on pictures, is not
here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class TRCE:
    """preserve: eta, where every sum is a mean, so that it says the same whatever the number of
    prompts. ridge: of staying the same, as in UCE. kept: which rows of what is preserved, e^p."""

    preserve: float = 1.0
    ridge: float = 1e-2
    toward: Toward = "neutral"
    kept: Tokens = "all"

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "toward": ("neutral", "sibling"),
        "kept": ("end", "all"),
        "preserve": (0.1, 1.0, 10.0),
        "ridge": (1e-1, 1e-2, 1e-3),
    }

    def edit(self, request: Request) -> Edit:
        concept, instead = self.ends(request)
        kept = balanced(kept_rows(request, self.kept, "phrases"), general_rows(request, self.kept))
        concept, instead = balanced(concept), balanced(instead)
        operator = least_squares(
            concept, instead, kept, erase=1.0, keep=self.preserve, ridge=self.ridge
        )
        return through(request.model, operator)

    def ends(self, request: Request) -> tuple[Tensor, Tensor]:
        """e^m and e^s [n, d]: a row for each phrase of each name of each concept."""
        pairs = [
            concept_rows(request, name, "end", self.toward, "phrases", called)
            for name in request.names
            for called in (name, *request.synonyms.get(name, ()))
        ]
        concept, instead = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        return concept, instead
