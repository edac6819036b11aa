"""Attacks by words and by text embeddings, which need no gradient of the denoiser."""

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from sepme_cli.attacks.attack import Attack, Attempt, Budget, Cost, Trial, Victim
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.erasure.prompts import renamed
from sepme_cli.erasure.reachability import Grams, derived
from sepme_cli.evaluation.protocol import Question


class PromptAttack(Attack):
    """Other prompts, of whose images every one counts."""

    group = "text"

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.images)

    nothing: ClassVar[str] = "there are no such prompts"

    @abstractmethod
    def asked(self, victim: Victim, count: int) -> Sequence[tuple[str, int]]:
        """Prompts and seeds, so many at most; none where there are no such prompts."""

    def unfit(self, victim: Victim) -> str | None:
        return None if self.asked(victim, 1) else self.nothing

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        asked = self.asked(victim, budget.images)
        prompts, seeds = [prompt for prompt, _ in asked], [seed for _, seed in asked]
        yield Attempt(victim.generate(victim.condition(prompts), seeds), prompts)


class Prompts(PromptAttack):
    """The concept by its name, in phrasings that erasing works on: no attack yet, but what the
    others are to be compared with."""

    name = "prompts"
    title = "its name"

    def asked(self, victim: Victim, count: int) -> Sequence[tuple[str, int]]:
        return _asked(victim, count, unseen=False)


class Phrasings(PromptAttack):
    """The concept by its name, in phrasings that erasing never sees."""

    name = "phrasings"
    title = "its name, in unseen phrasings"

    def asked(self, victim: Victim, count: int) -> Sequence[tuple[str, int]]:
        return _asked(victim, count, unseen=True)


class Synonyms(PromptAttack):
    """Other words for the concept and for kinds of it, from WordNet's relations and the text
    encoder (as `sepme erase` lists them)."""

    name = "synonyms"
    title = "other words for it"
    nothing = "the word lists know no other word for it"

    def asked(self, victim: Victim, count: int) -> Sequence[tuple[str, int]]:
        return _renamed(victim, victim.aim.synonyms, count)


class Misspellings(PromptAttack):
    """The name misspelt, in capitals, and with digits for letters, as people write around filters
    (Gao et al. 2018, "DeepWordBug")."""

    name = "misspellings"
    title = "its name misspelt"

    def asked(self, victim: Victim, count: int) -> Sequence[tuple[str, int]]:
        return _renamed(victim, misspelt(victim.aim.concept, count), count)


class Descriptions(PromptAttack):
    """The concept described without its name, in sentences that the user gives."""

    name = "descriptions"
    title = "described without its name"
    nothing = "no description was given"

    def asked(self, victim: Victim, count: int) -> Sequence[tuple[str, int]]:
        sentences = victim.aim.descriptions
        first = victim.sampling.seed
        return [
            (sentences[i % len(sentences)], first + i) for i in range(count if sentences else 0)
        ]


def misspelt(name: str, count: int) -> tuple[str, ...]:
    """At most so many misspellings of a name, each once, of every sort in turn."""
    rng = random.Random(name)
    places = list(range(1, len(name) - 1)) or [0]
    rng.shuffle(places)
    digits = str.maketrans("aeiost", "431057")
    found = [name.upper(), name.translate(digits), " ".join(name), f"{name}s"]
    for at in places:
        found += [
            name[:at] + name[at + 1 :],
            name[:at] + name[at] + name[at:],
            name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :],
            name[:at] + "-" + name[at:],
        ]
    return tuple(dict.fromkeys(word for word in found if word.strip() and word != name))[:count]


def _asked(victim: Victim, count: int, *, unseen: bool) -> list[tuple[str, int]]:
    found = [q for q in victim.aim.questions if q.unseen == unseen]
    return [(question.prompt, question.seed) for question in found[:count]]


def _renamed(victim: Victim, names: Sequence[str], count: int) -> list[tuple[str, int]]:
    """The prompts with the names in turn for the concept's."""
    aim, found = victim.aim, []
    for i in range(count if names else 0):
        question = aim.questions[i % len(aim.questions)]
        prompt = renamed(question.prompt, aim.concept, names[i % len(names)]).text
        found.append((prompt, question.seed))
    return found


class RingABell(Attack):
    """Adds to a prompt without the concept the direction in which the text embedding of prompts
    with it differs, times a strength (Tsai et al. 2024, "Ring-A-Bell!", eq. 3 and 4, in its soft
    form). The text embeddings are the original's, which everybody has."""

    name = "ring-a-bell"
    title = "its direction added to the text embedding (Ring-A-Bell, soft)"
    group = "text"
    best = True

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases * len(_STRENGTHS))

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        assert trial.question is not None
        start = victim.model.text.condition([without(victim, trial.question)])
        along = concept_direction(victim)
        yield from _strengths(victim, trial.question, start, along)


_STRENGTHS = (0.5, 0.9, 1.5, 2.0, 3.0)


def concept_direction(victim: Victim) -> Conditioning:
    """The mean over the concept's phrases of what it adds to the text embedding [1, …]."""
    pairs = victim.aim.pairs
    having = victim.model.text.condition([pair.text for pair in pairs])
    lacking = victim.model.text.condition([pair.without for pair in pairs])
    return Conditioning(
        (having.states - lacking.states).mean(0, keepdim=True),
        None
        if having.pooled is None or lacking.pooled is None
        else (having.pooled - lacking.pooled).mean(0, keepdim=True),
    )


def without(victim: Victim, question: Question) -> str:
    """A prompt with the concept's name cut out."""
    return renamed(question.prompt, victim.aim.concept, victim.aim.concept).without


def _strengths(
    victim: Victim, question: Question, start: Conditioning, along: Conditioning
) -> Iterator[Attempt]:
    moved = [
        Conditioning(
            start.states + strength * along.states,
            None
            if start.pooled is None or along.pooled is None
            else start.pooled + strength * along.pooled,
        )
        for strength in _STRENGTHS
    ]
    images = victim.generate(Conditioning.cat(moved), [question.seed] * len(_STRENGTHS))
    yield Attempt(images, [f"strength {strength}" for strength in _STRENGTHS])


class Reach(Attack):
    """Text embeddings from which the attacked keys and values come nearest to what the original
    makes of the prompt, in closed form (Gong et al. 2024, "RECE", eq. 8); see
    `reachability.derived`."""

    name = "reach"
    title = "the text embedding that keys and values are reached from (RECE)"
    group = "text"
    best = True

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases * len(_RIDGES))

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        assert trial.question is not None
        asked, seen = victim.model.text.condition([trial.question.prompt]), grams(victim)
        reached = [
            replace(
                asked, states=derived(asked.states[0].cpu(), seen, ridge)[None].to(asked.states)
            )
            for ridge in _RIDGES
        ]
        images = victim.generate(Conditioning.cat(reached), [trial.question.seed] * len(_RIDGES))
        yield Attempt(images, [f"lambda {ridge:g}" for ridge in _RIDGES])


_RIDGES = (1e-6, 1e-4, 1e-2, 1e-1)
"""Of an embedding's size; see `reachability.derived`."""


def grams(victim: Victim) -> Grams:
    """Of a victim's layers."""
    return Grams.of((original, attacked) for attacked, original in victim.layers())
