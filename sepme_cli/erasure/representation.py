"""Concept-irrelevant representations and their correlation."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """What the original model predicts for noisy pictures of a concept.

    noisy: x_t [n, c, h, w]. steps: t [n]. prompts: for each row, which of the concept's phrases
    it was drawn with [n]. without: eps(x_t, c0) [n, c, h, w], the prediction for the same phrase
    without its concept. representation: r = eps(x_t, c) - eps(x_t, c0).
    """

    noisy: Tensor
    steps: Tensor
    prompts: Tensor
    without: Tensor
    representation: Tensor

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, rows: Tensor) -> "Sample":
        return Sample(
            self.noisy[rows],
            self.steps[rows],
            self.prompts[rows],
            self.without[rows],
            self.representation[rows],
        )


def correlation(edited: Tensor, original: Tensor) -> Tensor:
    """(r' . r) / (r . r) for each of n representations [n, c, h, w]: one at the start, on every
    model; the paper's L_cor divides by h w d instead. Returns [n]."""
    return (edited * original).flatten(1).sum(1) / original.flatten(1).pow(2).sum(1)
