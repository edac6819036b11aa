"""What increments do to words and captions that took no part in making them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sepme_cli.erasure.background import Background

_WORST = 5


@dataclass(frozen=True)
class Collateral:
    """How far keys and values move, as a share of what they are, over all layers together.

    captions: how many held-out captions were looked at. median, p95: of them. worst: the words of
    the vocabulary that move furthest, with how far each does.
    """

    captions: int
    median: float
    p95: float
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class HeldOut:
    """The held-out captions and the words of a background, and how large their keys and values are.

    ends: of both [n, k d], see `Background`. gram: the sum of W^T W over all layers, [d, d]. sizes:
    |W e|^2 of each caption, then each word.
    """

    background: Background
    ends: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, background: Background, gram: Tensor) -> "HeldOut":
        ends = torch.cat([background.ends, background.word_ends]).float()
        return cls(background, ends, _squared(ends, gram.float()))

    def changes(self, basis: Tensor, inner: Tensor) -> Tensor:
        """|dW e| / |W e| of each, [n], of an increment dW = F @ basis.

        basis: [r, d]. inner: the sum of F^T F over all layers, [r, r].
        """
        encoders = self.ends.shape[1] // basis.shape[1]
        seen = self.ends.reshape(-1, basis.shape[1]) @ basis.float().T
        moved = _squared(seen.reshape(-1, encoders * len(basis)), inner.float())
        return (moved.clamp(min=0) / self.sizes).sqrt()

    def collateral(self, basis: Tensor, inner: Tensor, erased: Callable[[str], bool]) -> Collateral:
        """erased: whether a text asks for what is erased; captions and words that do are left
        out."""
        return self._collateral(self.changes(basis, inner), erased)

    def moved(self, ends: Tensor, gram: Tensor, erased: Callable[[str], bool]) -> Collateral:
        """The same of a text encoder that has changed. ends: what it makes of both now."""
        moved = _squared(ends.float() - self.ends, gram.float()).clamp(min=0)
        return self._collateral((moved / self.sizes).sqrt(), erased)

    def _collateral(self, changes: Tensor, erased: Callable[[str], bool]) -> Collateral:
        captions, words = self.background.captions, self.background.words
        others = torch.tensor([not erased(text) for text in captions], dtype=torch.bool)
        beside = changes[: len(captions)][others]
        found = changes[len(captions) :]
        order = found.argsort(descending=True, stable=True).tolist()
        worst = [(words[i], float(found[i])) for i in order[:100] if not erased(words[i])]
        return Collateral(
            len(beside),
            float(beside.median()),
            float(beside.quantile(0.95)),
            tuple(worst[:_WORST]),
        )


def _squared(rows: Tensor, inner: Tensor) -> Tensor:
    """x^T inner x of each row [n, k d], summed over its k parts [d]."""
    parts = rows.reshape(-1, len(inner))
    return ((parts @ inner) * parts).sum(1).reshape(len(rows), -1).sum(1)
