"""HiRM: Localized Concept Erasure via High-Level Representation Misdirection (Lee et al. 2026,
arXiv 2602.19631).

The first layer of the CLIP text encoder is trained so that its last layer gives the concept
another direction: a random one, or that of the word for its kind. Nothing is kept by the loss;
that only one layer moves, and little, is what is to keep the rest. The rows that are misdirected
are the name's and what follows, up to the end of the text. Its weight matrices are trained, not its
biases and norms, and the learning rate is tuned for the small model; the paper's is 5e-5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.peers.clip_layers import as_edit, last_layer, learning
from benchmarks.peers.interface import Edit, Request
from benchmarks.peers.rows import concept_prompts, counterpart, end_of_name, name_length


@dataclass(frozen=True)
class HiRM:
    """direction: "random", scaled by `scale`, or the kind's word. steps: over all prompts of a
    concept at once."""

    lr: float = 5e-5
    direction: Literal["random", "kind"] = "kind"
    scale: float = 500.0
    steps: int = 40

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "direction": ("random", "kind"),
        "lr": (5e-6, 1e-5, 2e-5, 5e-5, 2e-4),
    }

    def edit(self, request: Request) -> Edit:
        clip = request.model.text.clips[0]
        wanted = [self._wanted(request, name) for name in request.names]
        with (
            torch.enable_grad(),
            learning(clip, lambda name: name.startswith("encoder.layers.0.")) as weights,
        ):
            optimiser = torch.optim.Adam(weights.values(), lr=self.lr)
            for _ in range(self.steps):
                optimiser.zero_grad()
                for ids, chosen, target in wanted:
                    (last_layer(clip, ids)[chosen] - target).pow(2).mean().backward()
                optimiser.step()
            return as_edit(clip, weights)

    @torch.no_grad()
    def _wanted(self, request: Request, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [n, positions], which of their rows are misdirected [n, positions], m in all,
        and where to [m, width] or [width]."""
        clip = request.model.text.clips[0]
        prompts = concept_prompts(request, name, name, "phrases")
        ids = clip.tokens(prompts)
        ends = [end_of_name(request.model, row, name) for row in ids]
        first = torch.tensor(ends) - name_length(request.model, name) + 1
        every = torch.arange(ids.shape[1])
        chosen = (every >= first[:, None]) & (every <= ids.argmax(1)[:, None])
        if self.direction == "random":
            generator = torch.Generator().manual_seed(0)
            random = torch.rand(clip.config["hidden_size"], generator=generator)
            return ids, chosen, self.scale * random / random.norm()
        word = counterpart(request, name, "neutral")
        other = clip.tokens([word])
        return ids, chosen, last_layer(clip, other)[0, int(other[0].argmax()) - 1]
