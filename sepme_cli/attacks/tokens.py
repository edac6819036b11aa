"""Attacks that search over tokens: what the text encoder makes of them decides, no image does."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sepme_cli.attacks.attack import Attack, Attempt, Budget, Cost, Trial, Victim, needs_clip
from sepme_cli.attacks.text import concept_direction, grams, without
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.text import TextEncoders
from sepme_cli.diffusion.text_encoder import FREE
from sepme_cli.diffusion.tokenizer import END, START, words_of
from sepme_cli.erasure.reachability import Grams

_LENGTH = 8
"""Tokens that a search writes; the paper's 16 say no more to a short prompt."""


def spliced(text: TextEncoders, before: str, count: int, after: str) -> Tensor:
    """Token ids [1, positions] of a prompt with `count` tokens FREE between two texts."""
    clip = text.clips[0]
    rows = [row[1 : int((row == END).int().argmax())] for row in clip.tokens([before, after])]
    free = torch.full((count,), FREE)
    inside = torch.cat([rows[0], free, rows[1]])[: clip.positions - 2]
    ids = torch.full((1, clip.positions), END)
    ids[0, 0] = START
    ids[0, 1 : 1 + len(inside)] = inside
    return ids


def filled(ids: Tensor, tokens: Tensor) -> Tensor:
    """Prompts [n, positions] of one [1, positions] with its FREE tokens chosen [n, k]."""
    whole = ids.repeat(len(tokens), 1)
    whole[whole == FREE] = tokens.flatten()
    return whole


def vocabulary(text: TextEncoders) -> int:
    """How many tokens there are to choose from: all but the start, the end and what was added."""
    return min(START, *(len(clip.token_embeddings) for clip in text.clips))


@dataclass(frozen=True)
class Goal:
    """How far embeddings are from a goal, in the attacked layers or in the text encoder.

    wanted: the goal [1, …]. grams: of the attacked layers; None for the text encoder.
    """

    wanted: Conditioning
    grams: Grams | None = None

    def distance(self, read: Conditioning) -> Tensor:
        """The squared distance of each of n embeddings [n], but for a constant."""
        x, y = read.states, self.wanted.states
        if self.grams is None:
            return (x - y).pow(2).mean((1, 2))
        after, across = (part.to(x) for part in (self.grams.after, self.grams.across))
        # |W'x - Wy|^2 over all layers and rows, without what does not depend on x.
        return ((x @ after) * x - 2 * (y @ across.T) * x).sum((1, 2))


class TokenSearch(Attack):
    """Two searches for tokens a case."""

    group = "text"
    best = True

    def unfit(self, victim: Victim) -> str | None:
        return needs_clip(victim)

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases * 2)


class RingABellTokens(TokenSearch):
    """A genetic search for tokens whose text embedding is that of the prompt without the concept,
    moved in the concept's direction (Tsai et al. 2024, "Ring-A-Bell!", algorithm 1)."""

    name = "ring-a-bell-tokens"
    title = "tokens that say it (Ring-A-Bell, hard)"

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        assert trial.question is not None
        text, question = victim.model.text, trial.question
        start, along = text.condition([without(victim, question)]), concept_direction(victim)
        for strength in (1.0, 2.0):
            goal = Goal(Conditioning(start.states + strength * along.states))
            ids = spliced(text, "", _LENGTH, "")
            tokens = evolved(text, goal, ids, budget.generations, question.seed)
            yield _attempt(victim, ids, tokens, question.seed)


@torch.no_grad()
def evolved(
    text: TextEncoders, goal: Goal, ids: Tensor, generations: int, seed: int, size: int = 40
) -> Tensor:
    """The best tokens [1, k] of a genetic search: crossover at one place, mutation of a quarter,
    and the better half goes on."""
    generator = torch.Generator().manual_seed(seed)
    count, length = vocabulary(text), int((ids == FREE).sum())

    def drawn(*shape: int) -> Tensor:
        return torch.randint(count, shape, generator=generator)

    def distances(tokens: Tensor) -> Tensor:
        return goal.distance(text.condition_tokens(filled(ids, tokens))).cpu()

    alive = drawn(size, length)
    scores = distances(alive)
    for _ in range(generations):
        best = scores.argsort()[: size // 2]
        alive, scores = alive[best], scores[best]
        parents = torch.randint(len(alive), (2, size // 2), generator=generator)
        cut = torch.randint(1, length, (size // 2, 1), generator=generator)
        children = torch.where(torch.arange(length) < cut, alive[parents[0]], alive[parents[1]])
        mutates = torch.rand(children.shape, generator=generator) < 0.25
        children = torch.where(mutates, drawn(*children.shape), children)
        alive = torch.cat([alive, children])
        scores = torch.cat([scores, distances(children)])
    return alive[scores.argmin()][None]


class Record(TokenSearch):
    """A coordinate search for tokens from which the attacked keys and values are those that the
    original makes of the prompt: for one place after the other, the vocabulary is ranked by the
    linearised distance, and the best are tried (after RECORD, Kusumba et al. 2025, whose distance
    is that of the predicted noise)."""

    name = "record"
    title = "tokens that reach its keys and values (after RECORD)"

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        assert trial.question is not None
        text, question = victim.model.text, trial.question
        wanted = text.condition([question.prompt])
        goal = Goal(wanted, grams(victim))
        for before, length in ((question.prompt, 4), ("", _LENGTH)):
            ids = spliced(text, before, length, "")
            passes = max(1, budget.generations // 40)
            with victim.attacked():
                tokens = descended(text, goal, ids, passes, question.seed)
            yield _attempt(victim, ids, tokens, question.seed)


def descended(
    text: TextEncoders, goal: Goal, ids: Tensor, passes: int, seed: int, tried: int = 16
) -> Tensor:
    """The tokens [1, k] that coordinate descent comes to, from random ones."""
    generator = torch.Generator().manual_seed(seed)
    count, length = vocabulary(text), int((ids == FREE).sum())
    tables = [clip.token_embeddings[:count] for clip in text.clips]
    tokens = torch.randint(count, (1, length), generator=generator)
    for _ in range(passes):
        for place in range(length):
            free = [table[tokens].detach().requires_grad_() for table in tables]
            with torch.enable_grad():
                distance = goal.distance(text.condition_tokens(ids, free)).sum()
                slopes = torch.autograd.grad(distance, free)
            ranked = sum(
                table @ slope[0, place] for table, slope in zip(tables, slopes, strict=True)
            )
            assert isinstance(ranked, Tensor)
            candidates = tokens.repeat(tried + 1, 1)
            candidates[1:, place] = ranked.topk(tried, largest=False).indices.cpu()
            with torch.no_grad():
                found = goal.distance(text.condition_tokens(filled(ids, candidates)))
            tokens = candidates[int(found.argmin())][None]
    return tokens


def _attempt(victim: Victim, ids: Tensor, tokens: Tensor, seed: int) -> Attempt:
    whole = filled(ids, tokens)
    return Attempt(victim.generate(victim.condition_tokens(whole), [seed]), [words_of(whole[0])])
