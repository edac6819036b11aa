"""AdvUnlearn: Defensive Unlearning with Adversarial Training (Zhang et al. 2024, arXiv
2405.15234), shortened.

The text encoder is trained to have the denoiser predict what ESD aims at, not for the concept's
name but for the name behind a token that was learned, a moment ago, to bring the concept back;
and to have it predict the same as before for captions of other things. The paper trains for 1,000
steps, of which 200 without such a token, learns it in 30 steps every 20 and takes hours; here all
are a fifth to a third of that, and the learning rate is tuned to it. The weight matrices of all
layers are trained, not biases, norms and embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.clip_layers import as_edit, learning
from benchmarks.peers.esd import away, drawn, predicted
from benchmarks.peers.interface import Edit, Request
from sepme_cli.attacks.tokens import spliced

_CAPTIONS = 40
_DRAWN = 10


@dataclass(frozen=True)
class AdvUnlearn:
    """eta: how far away from the concept. retain: the weight of what stays. warm_up: steps before
    the first attack; then one every `every` steps, of `attack_steps` steps."""

    lr: float = 1e-4
    eta: float = 1.0
    retain: float = 0.3
    guidance: float = 3.0
    steps: int = 200
    warm_up: int = 40
    every: int = 20
    attack_steps: int = 10
    attack_lr: float = 1e-2
    batch: int = 8

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lr": (1e-5, 3e-5, 1e-4, 3e-4)}

    def edit(self, request: Request) -> Edit:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            return Training(self, request).edit()


class Training:
    """One training."""

    def __init__(self, settings: AdvUnlearn, request: Request) -> None:
        self.settings, self.model = settings, request.model
        self.clip = self.model.text.clips[0]
        self.names = request.names
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.blank = self.clip.encode_tokens(self.clip.tokens([""]))[0]
            self.told = self.clip.encode_tokens(self.clip.tokens(list(self.names)))[0]
            self.captions = self.clip.tokens(request.general[:_CAPTIONS])
            self.read = self.clip.encode_tokens(self.captions)[0]
            contexts = torch.cat([self.read, self.blank])
            self.others = drawn(self.model, contexts, range(_CAPTIONS), settings.guidance)

    def edit(self) -> Edit:
        """Train, and put the text encoder back as it was."""
        settings = self.settings
        with learning(self.clip, lambda name: True) as weights:
            optimiser = torch.optim.Adam(weights.values(), lr=settings.lr)
            ids, free = self.clip.tokens(list(self.names)), None
            for step in range(settings.steps):
                if step % settings.every == 0:
                    seen = self.draw(step)
                    if step >= settings.warm_up:
                        ids, free = self.attack(seen)
                loss = self._erase(seen, ids, free) + settings.retain * self._keep()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return as_edit(self.clip, weights)

    def draw(self, step: int) -> list[Tensor]:
        """Of the concepts as the text encoder now reads them."""
        with torch.no_grad():
            now = self.clip.encode_tokens(self.clip.tokens(list(self.names)))[0]
        contexts = torch.cat([now, self.blank])
        return drawn(self.model, contexts, range(step, step + _DRAWN), self.settings.guidance)

    def attack(self, seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """A token before each name, by which the denoiser predicts what the original does of the
        name alone: ids [names, positions], and its embeddings [names, 1, width]."""
        text = self.model.text
        ids = torch.cat([spliced(text, "", 1, name) for name in self.names])
        table = self.clip.token_embeddings
        start = torch.randint(len(table), (len(ids), 1), generator=self.generator)
        free = table[start].detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([free], lr=self.settings.attack_lr)
        for _ in range(self.settings.attack_steps):
            x, t, asked = self._batch(seen)
            with torch.no_grad():
                wanted = predicted(self.model, x, t, self.told[asked])
            states = self.clip.encode_tokens(ids[asked], free[asked])[0]
            loss = (predicted(self.model, x, t, states) - wanted).pow(2).mean()
            (free.grad,) = torch.autograd.grad(loss, [free])
            optimiser.step()
        return ids, free.detach()

    def _erase(self, seen: Sequence[Tensor], ids: Tensor, free: Tensor | None) -> Tensor:
        x, t, asked = self._batch(seen)
        blank = self.blank.expand(len(x), -1, -1)
        target = away(self.model, x, t, self.told[asked], blank, self.settings.eta)
        given = None if free is None else free[asked]
        states = self.clip.encode_tokens(ids[asked], given)[0]
        return (predicted(self.model, x, t, states) - target).pow(2).mean()

    def _keep(self) -> Tensor:
        x, t, asked = self._batch(self.others)
        with torch.no_grad():
            target = predicted(self.model, x, t, self.read[asked])
        states = self.clip.encode_tokens(self.captions[asked])[0]
        return (predicted(self.model, x, t, states) - target).pow(2).mean()

    def _batch(self, seen: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        count = self.settings.batch
        rows = torch.randint(len(seen[1]), (count,), generator=self.generator)
        x, t, asked = (part[rows] for part in seen)
        return x, t, asked
