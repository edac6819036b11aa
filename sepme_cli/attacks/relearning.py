"""Fine-tuning of the patched model: on images of the concept, and on others."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from sepme_cli.attacks.attack import (
    Attack,
    Attempt,
    Budget,
    Cost,
    Trial,
    Victim,
    needs_images,
)
from sepme_cli.attacks.optimising import backwards
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.weights import added_products

Trained = Literal["lora", "all weights"]
_BATCH = 4
_RANK = 4
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
_RATES: Mapping[Trained, float] = {"lora": 1e-3, "all weights": 1e-4}
"""Of AdamW; several times the usual, for an attacker is in a hurry."""


class Relearning(Attack):
    """Fine-tunes the attacked model for some steps, and asks for the concept after each number.

    On images of the concept with its name: relearning. On images of other things: resurgence
    (Suriyakumar et al. 2024, "Unstable Unlearning"), where the concept returns without having been
    shown.
    """

    group = "relearning"

    def __init__(self, trained: Trained, shown: Literal["concept", "others"]) -> None:
        self.trained, self.shown = trained, shown
        how = "lora" if trained == "lora" else "full"
        what = "relearn" if shown == "concept" else "resurge"
        self.name = f"{what}-{how}"
        whose = "of it" if shown == "concept" else "of other things"
        way = "a LoRA" if trained == "lora" else "all weights"
        self.title = f"{way} fine-tuned on images {whose}"
        self.teaches = shown == "concept"

    def unfit(self, victim: Victim) -> str | None:
        return needs_images(victim) if self.shown == "concept" else None

    def trials(self, victim: Victim, budget: Budget) -> tuple[Trial, ...]:
        return tuple(Trial(f"{count} steps") for count in budget.relearning)

    def cost(self, budget: Budget) -> Cost:
        rounds = len(budget.relearning)
        return Cost(images=rounds * budget.images, passes=3 * _BATCH * sum(budget.relearning))

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        asked = victim.aim.questions[: budget.images]
        prompts, seeds = [q.prompt for q in asked], [q.seed for q in asked]
        with victim.attacked(), self._trained(victim) as parameters:
            self._train(victim, parameters, int(trial.name.split()[0]))
            images = victim.generate_here(victim.model.text.condition(prompts), seeds)
        yield Attempt(images, prompts)

    def _images(self, victim: Victim) -> Tensor | None:
        return victim.aim.images if self.shown == "concept" else victim.aim.others

    @contextmanager
    def _trained(self, victim: Victim) -> Iterator[Sequence[Tensor]]:
        """What is trained, and undone at the end."""
        network = victim.model.denoiser.network
        with adapter(network) if self.trained == "lora" else unfrozen(network) as parameters:
            yield parameters

    def _train(self, victim: Victim, parameters: Sequence[Tensor], count: int) -> None:
        model, images = victim.model, self._images(victim)
        assert images is not None
        captions = victim.aim.captions if self.shown == "concept" else victim.aim.other_captions
        latents, context = model.vae.encode(images), model.text.condition(captions)
        generator = torch.Generator().manual_seed(victim.sampling.seed)
        optimiser = torch.optim.AdamW(parameters, lr=_RATES[self.trained])
        for _ in range(count):
            picked = torch.randint(len(latents), (_BATCH,), generator=generator)
            t = torch.randint(1000, (_BATCH,), generator=generator)
            noise = torch.randn((_BATCH, *latents.shape[1:]), generator=generator).to(latents)
            noisy = model.schedule.noised(latents[picked], noise, t)
            aim = model.schedule.aim(latents[picked], noise)
            with backwards(model):
                asked: Conditioning = model.machine.put(context[picked])
                predicted = model.denoiser.predict(noisy, t.to(model.machine.device), asked)
                loss = (predicted - aim).float().pow(2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@contextmanager
def adapter(network: nn.Module) -> Iterator[Sequence[Tensor]]:
    """A LoRA of rank 4 on every attention of a network, as its factors."""
    generator = torch.Generator().manual_seed(0)
    products: list[tuple[nn.Module, Tensor, Tensor]] = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(_ATTENTION):
            down = torch.randn((_RANK, layer.in_features), generator=generator) / _RANK
            up = torch.zeros(layer.out_features, _RANK)
            down, up = (part.to(layer.weight).requires_grad_() for part in (down, up))
            products.append((layer, down, up))
    with added_products(products):
        yield [factor for _, down, up in products for factor in (down, up)]


@contextmanager
def unfrozen(network: nn.Module) -> Iterator[Sequence[Tensor]]:
    """All weights of a network, put back at the end."""
    parameters = [one for one in network.parameters() if one.is_floating_point()]
    before = [one.detach().clone() for one in parameters]
    try:
        for one in parameters:
            one.requires_grad_()
        yield parameters
    finally:
        for one, value in zip(parameters, before, strict=True):
            one.requires_grad_(False).copy_(value)
            one.grad = None
