"""What an attack is, what it is aimed at, and how much of it is tried."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sepme_cli.attacks.results import Group
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise, sample_latents
from sepme_cli.erasure.prompts import Kind, Phrase
from sepme_cli.evaluation.protocol import Question, SamplingOptions

GROUPS: tuple[Group, ...] = ("text", "sampling", "optimising", "relearning")
BudgetName = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class Budget:
    """How much of every attack is tried.

    Attributes:
        cases: Prompts that are attacked one by one.
        images: Images of an attack whose images are counted one by one.
        tries: Images at most that a case is given to succeed in one of.
        times: Time steps that an attack by optimisation works on, one after the other.
        iterations: Steps of the optimiser at each of them.
        inversion: Steps of learning a token or an embedding.
        generations: Rounds of a search over tokens.
        relearning: Steps of fine-tuning, after each of which images are generated.
    """

    cases: int
    images: int
    tries: int
    times: int
    iterations: int
    inversion: int
    generations: int
    relearning: tuple[int, ...]


BUDGETS: Mapping[BudgetName, Budget] = {
    "quick": Budget(4, 12, 8, 4, 10, 100, 40, (10, 50)),
    "standard": Budget(8, 24, 24, 8, 15, 300, 100, (10, 50, 100)),
    "thorough": Budget(16, 48, 48, 16, 40, 1000, 500, (10, 50, 100, 300)),
}


@dataclass(frozen=True)
class Aim:
    """What attacks try to bring back.

    questions: prompts that ask for the concept, with their seeds. pairs: its phrases, and each
    without it. synonyms, descriptions: other words and sentences for it. images: of the concept
    [m, 3, H, W] in [0, 1], with captions. others, other_captions: images that do not show it.
    """

    concept: str
    kind: Kind
    questions: tuple[Question, ...]
    pairs: tuple[Phrase, ...]
    synonyms: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    images: Tensor | None = field(default=None, repr=False)
    captions: tuple[str, ...] = ()
    others: Tensor | None = field(default=None, repr=False)
    other_captions: tuple[str, ...] = ()

    def cases(self, budget: Budget) -> tuple[Question, ...]:
        """Those that are attacked one by one."""
        return self.questions[: budget.cases]


@dataclass(frozen=True)
class Victim:
    """A model under attack.

    name: of the column that its figures stand in. weights: what replaces the model's own, by
    target; nothing for the original.
    """

    name: str
    model: StableDiffusion = field(repr=False)
    weights: Mapping[str, Tensor] = field(repr=False)
    aim: Aim
    sampling: SamplingOptions
    digest: str

    def attacked(self) -> AbstractContextManager[None]:
        """The model with the weights that are attacked."""
        return self.model.with_weights(self.weights)

    @property
    def guidance(self) -> float:
        return self.model.scale_of(self.sampling.guidance)

    @cached_property
    def blank(self) -> Conditioning:
        return self.condition([""])

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """What the attacked model's denoiser reads of prompts: patches may change text encoders."""
        with self.attacked():
            return self.model.text.condition(prompts)

    def condition_tokens(self, ids: Tensor) -> Conditioning:
        """The same of token ids [n, positions]."""
        with self.attacked(), torch.no_grad():
            return self.model.text.condition_tokens(ids)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """x_T of each seed [n, c, h, w]."""
        return initial_noise(self.model.latent_shape(self.sampling.size), seeds)

    def generate(self, context: Conditioning, seeds: Sequence[int]) -> Tensor:
        """One image for each of n conditionings [n, 3, H, W], from the attacked weights."""
        with self.attacked():
            return self.generate_here(context, seeds)

    def generate_here(self, context: Conditioning, seeds: Sequence[int]) -> Tensor:
        """The same from the weights that are there."""
        noise, images = self.noise(seeds), []
        for part in torch.arange(len(seeds)).split(self.model.machine.at_once(BATCH)):
            latents = sample_latents(
                self.model,
                context[part],
                noise[part],
                blank=self.blank,
                steps=self.sampling.steps,
                guidance=self.guidance,
            )
            images.append(self.model.vae.decode(latents))
        return torch.cat(images)

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each layer that reads the rows of a prompt the attacked weight and the original's
        [out, d], fp32."""
        for name, original in self.model.denoiser.stored_weights():
            yield self.weights.get(name, original)[:, : original.shape[1]].float(), original


@dataclass(frozen=True)
class Attempt:
    """Images [n, 3, H, W] in [0, 1] that an attack came to, and by what, in words."""

    images: Tensor = field(repr=False)
    said: Sequence[str]


@dataclass(frozen=True)
class Trial:
    """A part of an attack that is done as a whole, and kept. question: None for all of them."""

    name: str
    question: Question | None = None


@dataclass(frozen=True)
class Cost:
    """What an attack takes of a model: images generated, and passes forwards and backwards of one
    image through the denoiser."""

    images: int = 0
    passes: int = 0


class Attack(ABC):
    """One way to have a concept drawn again.

    name: of the option, the report and the API. title: in words. best: a trial counts once, and
    succeeds with its first image of the concept; else every image counts. teaches: whether it can
    teach a model what the model never knew.
    """

    name: str
    title: str
    group: ClassVar[Group]
    best: ClassVar[bool] = False
    teaches: bool = False

    def unfit(self, victim: Victim) -> str | None:
        """Why it cannot be tried on this model; None where it can."""
        return None

    def trials(self, victim: Victim, budget: Budget) -> tuple[Trial, ...]:
        """The parts that it is tried in: one, or if `best` one for each case."""
        if not self.best:
            return (Trial(self.name),)
        return tuple(
            Trial(f"{i}: {question.prompt}", question)
            for i, question in enumerate(victim.aim.cases(budget))
        )

    @abstractmethod
    def cost(self, budget: Budget) -> Cost:
        """What it takes at most, on one model."""

    @abstractmethod
    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        """Its images, one attempt after the other; nobody asks for more after a success that ends
        the trial."""


BATCH = 8
"""Images at once: as many as `evaluate` generates."""


def needs_diffusion(victim: Victim) -> str | None:
    """Why an attack that works on the noise of diffusion cannot be tried."""
    if victim.model.checkpoint.family.flow is None:
        return None
    return f"{victim.model.checkpoint.family.title} is a rectified flow"


def needs_clip(victim: Victim) -> str | None:
    """Why an attack that chooses tokens cannot be tried."""
    if all(spec.naming != "t5" for spec in victim.model.checkpoint.family.text_encoders):
        return None
    return f"{victim.model.checkpoint.family.title} reads prompts with T5 too"


def needs_images(victim: Victim) -> str | None:
    """Why an attack that is given images of the concept cannot be tried."""
    if victim.aim.images is not None:
        return None
    return "the judge recognised the concept in none of the original's images"
