"""What a denoiser reads of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the UNet reads of prompts.

    states: e(c) [n, positions, d], for cross-attention. pooled: [n, p] one vector a prompt, which
    XL embeds beside the time step; None elsewhere.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Tensor) -> Self:
        pooled = None if self.pooled is None else self.pooled[index]
        return replace(self, states=self.states[index], pooled=pooled)

    def repeated(self, count: int) -> Self:
        """One prompt's conditioning, count times."""
        return self[torch.zeros(count, dtype=torch.long)]

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same, for a network that computes so."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return replace(self, states=self.states.to(device, dtype), pooled=pooled)

    @staticmethod
    def cat(parts: "Sequence[Conditioning]") -> "Conditioning":
        """Several one after the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(
            torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None
        )
