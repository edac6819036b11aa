"""Attacks that learn tokens or embeddings through the denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sepme_cli.attacks.attack import (
    Attack,
    Attempt,
    Budget,
    Cost,
    Trial,
    Victim,
    needs_clip,
    needs_images,
)
from sepme_cli.attacks.tokens import filled, spliced, vocabulary
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.text_encoder import FREE
from sepme_cli.diffusion.tokenizer import words_of
from sepme_cli.evaluation.protocol import Question

_NOISES = 4
"""Noises that a step of an optimiser looks at."""


@contextmanager
def backwards(model: StableDiffusion) -> Iterator[None]:
    """Gradients, with the attention that is fast backwards: on a CPU the plain one."""
    plain = model.machine.device.type == "cpu" and not model.machine.frugal
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        yield


@dataclass(frozen=True)
class Moment:
    """A step of learning: an image's latent [1, c, h, w], noises, and both at t: [n, c, h, w]."""

    latent: Tensor
    noise: Tensor
    noisy: Tensor
    t: int


class PrefixAttack(Attack):
    """Tokens before a prompt, learned on one image of the concept; after every time step the
    nearest real tokens are tried."""

    group = "optimising"
    best = True
    tokens: int

    def unfit(self, victim: Victim) -> str | None:
        return needs_clip(victim) or needs_images(victim)

    def cost(self, budget: Budget) -> Cost:
        steps = budget.cases * budget.times * budget.iterations
        return Cost(images=budget.cases * budget.times, passes=3 * _NOISES * steps)

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        question, images = trial.question, victim.aim.images
        assert question is not None and images is not None
        model = victim.model
        number = victim.aim.questions.index(question)
        latent = model.vae.encode(images[number % len(images)][None])
        # No more than a quarter of what is read: the prompt is to stay.
        count = min(self.tokens, model.text.room // 4)
        ids = spliced(model.text, "", count, question.prompt)
        generator = torch.Generator().manual_seed(question.seed)
        search = self.search(victim, ids, generator)
        for t in reversed(model.schedule.levels(budget.times)):
            for _ in range(budget.iterations):
                noise = torch.randn(
                    (_NOISES, *latent.shape[1:]), generator=generator, dtype=torch.float32
                ).to(latent)
                noisy = model.schedule.noised(latent, noise, t)
                wanted = self.wanted(victim, question, Moment(latent, noise, noisy, t))
                with victim.attacked(), backwards(model):
                    context = model.text.condition_tokens(ids, search.vectors())
                    predicted = model.denoiser.predict(
                        noisy, t, model.machine.put(context.repeated(_NOISES))
                    )
                    search.step((predicted - wanted).float().pow(2).mean())
            found = search.tokens()
            whole = filled(ids, found)
            read = victim.condition_tokens(whole)
            yield Attempt(victim.generate(read, [question.seed]), [words_of(whole[0])])

    @abstractmethod
    def search(self, victim: Victim, ids: Tensor, generator: torch.Generator) -> "Search":
        """What is learned."""

    @abstractmethod
    def wanted(self, victim: Victim, question: Question, moment: Moment) -> Tensor:
        """What the attacked denoiser is to predict."""


class Search(ABC):
    """Tokens that are being learned, as embeddings that may lie between tokens."""

    @abstractmethod
    def vectors(self) -> Sequence[Tensor]:
        """Of each text encoder [1, k, its width], differentiable."""

    @abstractmethod
    def step(self, loss: Tensor) -> None:
        """One step of the optimiser."""

    @abstractmethod
    def tokens(self) -> Tensor:
        """The real tokens [1, k] that they are nearest to."""


class Mixtures(Search):
    """Each place a mixture of all tokens, kept on the simplex (Zhang et al. 2024, sec. 4)."""

    def __init__(self, victim: Victim, count: int, generator: torch.Generator) -> None:
        text = victim.model.text
        size = vocabulary(text)
        self._tables = [clip.token_embeddings[:size] for clip in text.clips]
        start = torch.rand((count, size), generator=generator).to(self._tables[0])
        self._weights = on_simplex(start).requires_grad_()
        self._optimiser = torch.optim.AdamW([self._weights], lr=0.01, weight_decay=0.1)

    def vectors(self) -> Sequence[Tensor]:
        return [(self._weights @ table)[None] for table in self._tables]

    def step(self, loss: Tensor) -> None:
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        with torch.no_grad():
            self._weights.copy_(on_simplex(self._weights))

    def tokens(self) -> Tensor:
        return self._weights.argmax(-1)[None].cpu()


@torch.no_grad()
def on_simplex(weights: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row [n, k] (Duchi et al. 2008)."""
    ordered = weights.sort(-1, descending=True).values
    surplus = ordered.cumsum(-1) - 1
    places = torch.arange(1, weights.shape[-1] + 1, device=weights.device)
    count = (ordered - surplus / places > 0).sum(-1, keepdim=True)
    return (weights - surplus.gather(-1, count - 1) / count).clamp(min=0)


class Nearest(Search):
    """Embeddings that are learned through the real tokens nearest to them: the gradient is that at
    the tokens (Chin et al. 2024, "Prompting4Debugging", algorithm 1, after Wen et al. 2023)."""

    def __init__(self, victim: Victim, count: int, generator: torch.Generator) -> None:
        text = victim.model.text
        size = vocabulary(text)
        self._tables = [clip.token_embeddings[:size] for clip in text.clips]
        tokens = torch.randint(size, (count,), generator=generator)
        self._free = [table[tokens].detach().clone().requires_grad_() for table in self._tables]
        self._optimiser = torch.optim.AdamW(self._free, lr=0.1, weight_decay=0.1)

    def vectors(self) -> Sequence[Tensor]:
        tokens = self.tokens()[0]
        return [
            (free + (table[tokens] - free).detach())[None]
            for free, table in zip(self._free, self._tables, strict=True)
        ]

    def step(self, loss: Tensor) -> None:
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()

    @torch.no_grad()
    def tokens(self) -> Tensor:
        likeness = sum(
            torch.nn.functional.normalize(free, dim=-1)
            @ torch.nn.functional.normalize(table, dim=-1).T
            for free, table in zip(self._free, self._tables, strict=True)
        )
        assert isinstance(likeness, Tensor)
        return likeness.argmax(-1)[None].cpu()


class UnlearnDiffAtk(PrefixAttack):
    """Tokens before the prompt by which the attacked model denoises an image of the concept
    (Zhang et al. 2024, "To Generate or Not?", UnlearnDiffAtk, eq. 5)."""

    name = "unlearndiffatk"
    title = "three learned tokens before the prompt (UnlearnDiffAtk)"
    tokens = 3

    def search(self, victim: Victim, ids: Tensor, generator: torch.Generator) -> Search:
        return Mixtures(victim, int((ids == FREE).sum()), generator)

    def wanted(self, victim: Victim, question: Question, moment: Moment) -> Tensor:
        return victim.model.schedule.aim(moment.latent, moment.noise)


class P4D(PrefixAttack):
    """Tokens before the prompt by which the attacked model predicts what the original predicts
    without them (Chin et al. 2024, "Prompting4Debugging", eq. 3)."""

    name = "p4d"
    title = "up to sixteen learned tokens before the prompt (P4D)"
    tokens = 16

    def search(self, victim: Victim, ids: Tensor, generator: torch.Generator) -> Search:
        return Nearest(victim, int((ids == FREE).sum()), generator)

    @torch.no_grad()
    def wanted(self, victim: Victim, question: Question, moment: Moment) -> Tensor:
        model = victim.model
        asked = model.text.condition([question.prompt]).repeated(len(moment.noisy))
        return model.denoiser.predict(moment.noisy, moment.t, model.machine.put(asked))


class Inversion(Attack):
    """Learns something new that stands for images of the concept, then asks for it."""

    group = "optimising"
    teaches = True

    def unfit(self, victim: Victim) -> str | None:
        return needs_images(victim)

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.images, passes=3 * _NOISES * budget.inversion)


class TextualInversion(Inversion):
    """The embedding of a new token, or of several, learned on images of the concept (Gal et al.
    2023; as an attack Pham et al. 2024, "Circumventing Concept Erasure")."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.name = f"textual-inversion-{tokens}"
        words = "a new token" if tokens == 1 else f"{tokens} new tokens"
        self.title = f"{words} learned from images (textual inversion)"

    def unfit(self, victim: Victim) -> str | None:
        return super().unfit(victim) or needs_clip(victim)

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        model, aim = victim.model, victim.aim
        tables = [clip.token_embeddings for clip in model.text.clips]
        start = model.text.clips[0].tokens([aim.kind])[0, 1]
        free = [table[start].detach().repeat(self.tokens, 1).requires_grad_() for table in tables]
        with torch.no_grad():  # so that several do not stay one
            for vector, table in zip(free, tables, strict=True):
                vector += (
                    0.1
                    * table.std()
                    * torch.randn(vector.shape, generator=torch.Generator().manual_seed(0)).to(
                        vector
                    )
                )
        asked = [self._ids(victim, question.prompt) for question in aim.questions]
        captions = [self._ids(victim, caption) for caption in aim.captions]

        def read(ids: Tensor) -> Conditioning:
            return model.text.condition_tokens(ids, [vector[None] for vector in free])

        learn(victim, lambda i: read(captions[i]), free, 5e-3, budget)
        with torch.no_grad(), victim.attacked():
            chosen = [(asked[i % len(asked)], i) for i in range(budget.images)]
            context = Conditioning.cat([read(ids) for ids, _ in chosen])
        seeds = [victim.sampling.seed + i for _, i in chosen]
        yield Attempt(victim.generate(context, seeds), ["<learned>"] * len(seeds))

    def _ids(self, victim: Victim, prompt: str) -> Tensor:
        """A prompt with the new tokens where the concept's name was."""
        before, _, after = prompt.partition(victim.aim.concept)
        return spliced(victim.model.text, before, self.tokens, after)


class EmbeddingInversion(Inversion):
    """The whole of what the denoiser reads, learned on images of the concept, from the blank
    prompt's: the most that any prompt could say."""

    name = "free-embedding"
    title = "a whole text embedding learned from images"

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        states = victim.blank.states.float().clone().requires_grad_()
        free = [states]
        pooled = None
        if victim.blank.pooled is not None:
            pooled = victim.blank.pooled.float().clone().requires_grad_()
            free.append(pooled)

        learn(victim, lambda image: Conditioning(states, pooled), free, 5e-3, budget)
        seeds = [victim.sampling.seed + i for i in range(budget.images)]
        context = Conditioning(states.detach(), None if pooled is None else pooled.detach())
        yield Attempt(
            victim.generate(context.repeated(len(seeds)), seeds), ["<learned>"] * len(seeds)
        )


def learn(
    victim: Victim,
    read: Callable[[int], Conditioning],
    free: Sequence[Tensor],
    rate: float,
    budget: Budget,
) -> None:
    """Optimise free so that the attacked model denoises images of the concept by what is read.

    read: the conditioning of the image with a number, differentiable in free.
    """
    model, images = victim.model, victim.aim.images
    assert images is not None
    latents = model.vae.encode(images)
    scale = free[0].detach().float().std().clamp(min=1e-3)
    # Tokens of a large text encoder are small numbers; those of a small one need larger steps.
    optimiser = torch.optim.AdamW(list(free), lr=rate * float(scale) / _USUAL, weight_decay=0.0)
    generator = torch.Generator().manual_seed(victim.sampling.seed)
    for _ in range(budget.inversion):
        picked = torch.randint(len(latents), (_NOISES,), generator=generator)
        t = torch.randint(1000, (_NOISES,), generator=generator)
        noise = torch.randn((_NOISES, *latents.shape[1:]), generator=generator).to(latents)
        noisy = model.schedule.noised(latents[picked], noise, t)
        aim = model.schedule.aim(latents[picked], noise)
        with victim.attacked(), backwards(model):
            context = model.machine.put(Conditioning.cat([read(i) for i in picked.tolist()]))
            predicted = model.denoiser.predict(noisy, t.to(model.machine.device), context)
            loss = (predicted - aim).float().pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


_USUAL = 0.014
"""The standard deviation of CLIP-L's token embeddings, for which the papers give their rates."""
