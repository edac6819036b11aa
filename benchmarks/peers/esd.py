"""ESD-x: Erasing Concepts from Diffusion Models (Gandikota et al. 2023, arXiv 2303.07345).

The cross-attention is fine-tuned so that eps'(x_t, c) becomes what the original model predicts
when it is guided away from the concept:
eps(x_t, blank) - eta (eps(x_t, c) - eps(x_t, blank)),
on x_t that the edited model itself draws of c. All parameters of all cross-attentions are trained
(keys, values, queries, outputs), as the paper's ESD-x does. Of several concepts, each is drawn in
turn. The paper draws anew for every step; here a drawing's steps are all used, some drawings at a
time, and the learning rate is tuned for the small model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.interface import Edit, Request, overwritten
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise

_DDIM = 20


@dataclass(frozen=True)
class ESD:
    """eta: how far away from the concept. rounds: of drawing `drawn` pictures and training `steps`
    steps of `batch` noisy pictures on them."""

    eta: float = 1.0
    lr: float = 3e-4
    guidance: float = 3.0
    rounds: int = 5
    drawn: int = 10
    steps: int = 20
    batch: int = 12

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lr": (3e-4, 1e-3, 3e-3)}

    def edit(self, request: Request) -> Edit:
        model = request.model
        edited = {
            name: value.clone().requires_grad_()
            for name, value in model.denoiser.network.named_parameters()
            if ".attn2." in name
        }
        optimiser = torch.optim.Adam(edited.values(), lr=self.lr)
        contexts = model.text.condition([*request.names, ""]).states
        generator = torch.Generator().manual_seed(0)
        for nth in range(self.rounds):
            seeds = range(nth * self.drawn, (nth + 1) * self.drawn)
            seen = drawn(model, contexts, seeds, self.guidance, edited)
            for _ in range(self.steps):
                rows = torch.randint(len(seen[1]), (self.batch,), generator=generator)
                loss = self._loss(model, edited, contexts, [part[rows] for part in seen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return overwritten({name: value.detach() for name, value in edited.items()})

    def _loss(
        self,
        model: StableDiffusion,
        edited: Mapping[str, Tensor],
        contexts: Tensor,
        batch: Sequence[Tensor],
    ) -> Tensor:
        x, t, asked = batch
        told, blank = contexts[asked], contexts[-1:].expand(len(x), -1, -1)
        target = away(model, x, t, told, blank, self.eta)
        with sdpa_kernel(SDPBackend.MATH):
            return (predicted(model, x, t, told, edited) - target).pow(2).mean()


@torch.no_grad()
def away(
    model: StableDiffusion, x: Tensor, t: Tensor, told: Tensor, blank: Tensor, eta: float
) -> Tensor:
    """What the original model predicts when it is guided away from what it is told."""
    both = predicted(model, torch.cat([x, x]), torch.cat([t, t]), torch.cat([told, blank]))
    concept, without = both.chunk(2)
    return without - eta * (concept - without)


@torch.no_grad()
def drawn(
    model: StableDiffusion,
    contexts: Tensor,
    seeds: Sequence[int],
    guidance: float,
    edited: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[Tensor]:
    """x_t [n, c, h, w], t [n] and which prompt [n], at every step of some drawings.

    contexts: of the prompts, which are asked for in turn, and last of the blank one. seeds: of
    each drawing. edited: parameters of the UNet.
    """
    x = initial_noise(model.latent_shape(), list(seeds))
    asked = torch.tensor(seeds) % (len(contexts) - 1)
    both = torch.cat([contexts[asked], contexts[-1:].expand(len(asked), -1, -1)])
    trajectory = model.schedule.trajectory(_DDIM)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in trajectory.times:
        seen.append((x, torch.full((len(x),), t), asked))
        told, blank = predicted(model, torch.cat([x, x]), t, both, edited).chunk(2)
        x = trajectory.step(blank + guidance * (told - blank), t, x)
    return [torch.cat(part) for part in zip(*seen, strict=True)]


def predicted(
    model: StableDiffusion,
    x: Tensor,
    t: Tensor | float,
    told: Tensor,
    edited: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """eps(x_t, c), with edited parameters of the UNet in place of the original ones."""
    found: Tensor = functional_call(model.denoiser.network, dict(edited), (x, t, told)).sample
    return found
