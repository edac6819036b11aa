"""The method on a loaded model: concepts in, increments out."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from patch_spec.manifest import Increment, Measured, Method, slugify
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.moments import pictured_moments, sampled_moments
from sepme_cli.diffusion.predictor import EditedPredictor
from sepme_cli.erasure.concept import Concept, Lexicon, Protected, describe
from sepme_cli.erasure.increment import (
    BLANK,
    GOOD_SEPARABILITY,
    Admissible,
    Witnesses,
    additive_factors,
    admissible,
    operator_factors,
)
from sepme_cli.erasure.optimise import Outcome, Task, optimise
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import Ground, Weighing
from sepme_cli.errors import RefusedError
from sepme_cli.progress import SILENT, Progress
from sepme_cli.recipe import Item

_PROMPTS = 600
"""About how many prompts all concepts of a patch have together, so that a hundred concepts are
encoded in seconds; but each has some."""
_FEWEST = 6


@dataclass(frozen=True)
class Study:
    """A concept, and where what must stay leaves its increment room to act.

    separable: prompts outside of the patch that it does not change. protected: prompts it changes
    little. like: the word it is to act like, None for nothing in its place. shared: what it has in
    common with the concepts that are erased beside it.
    """

    concept: Concept
    separable: tuple[str, ...]
    protected: tuple[str, ...]
    space: Admissible
    like: str | None
    shared: "Shared" = field(repr=False)

    @property
    def warning(self) -> str | None:
        """What a user should know before the work begins."""
        if self.space.separability >= GOOD_SEPARABILITY:
            return None
        return (
            f"{self.concept.name!r} is hard to tell from what must stay (separability "
            f"{self.space.separability:.2f} of 1): part of it may remain"
        )


@dataclass(frozen=True)
class Made:
    """An increment, what the concept acts like with it, and the seconds it took."""

    increment: Increment
    like: str | None
    seconds: float


@dataclass(frozen=True)
class Shared:
    """What all concepts of a study have in common.

    gram: the sum of W^T W over all layers, [d, d]. witnesses: the blank, all concepts' prompts and
    those of concepts erased before. taken: in how many dimensions something must stay.
    """

    ground: Ground
    gram: Tensor
    witnesses: Witnesses


def study(
    model: StableDiffusion,
    items: Sequence[Item],
    protected: Protected,
    known: Sequence[Sequence[str]],
    settings: Settings,
) -> list[Study]:
    """Look at concepts together: each must leave the blank, the others and the known ones alone.

    known: the prompts of each concept that was erased before.
    Raises RefusedError for a concept that lies in what must stay.
    """
    _check_not_protected(items, protected)
    # What a concept comes to act like must not move itself.
    kept = protected.beside((item.like, item.kind) for item in items if item.like is not None)
    most = max(_FEWEST, _PROMPTS // max(1, len(items)))
    concepts = [describe(item, kept, most) for item in items]
    return study_concepts(model, concepts, kept, known, settings)


def study_concepts(
    model: StableDiffusion,
    concepts: Sequence[Concept],
    kept: Protected,
    known: Sequence[Sequence[str]],
    settings: Settings,
) -> list[Study]:
    """The same for concepts that are described already."""
    groups = [concept.prompts for concept in concepts] + [tuple(prompts) for prompts in known]
    apart = _all([BLANK], *groups)
    dear = tuple(prompt for prompt in kept.prompts() if prompt not in {*apart})
    answers = (
        prompt for c in concepts for phrases in c.counterparts.values() for prompt in phrases
    )
    words = Lexicon(model, chain(apart, dear, answers))
    wanted = [words.wanted(concept) for concept in concepts]
    ground = Ground.of(
        model.encode([BLANK])[0].cpu(),
        [one.concept for one in wanted] + [words.rows(prompts) for prompts in known],
        words.rows(dear),
        Weighing(settings.insistence, settings.protection, settings.ridge),
    )
    gram = _gram(weight for _, weight in model.stored_weights())
    shared = Shared(ground, gram, Witnesses.of(apart, words.states(apart), gram))
    outside = _all([BLANK], *known)
    return [
        Study(
            concept,
            outside,
            dear,
            admissible(concept.name, one, ground, settings),
            one.like,
            shared,
        )
        for concept, one in zip(concepts, wanted, strict=True)
    ]


def leakages(
    model: StableDiffusion, increments: Sequence[Increment], outside: Sequence[str]
) -> list[float]:
    """The leakage of each increment of one patch, from its factors alone.

    outside: prompts that they all must leave alone, beside those of the other increments.
    """
    apart = _all(outside, *(part.prompts for part in increments))
    gram = _gram(weight for _, weight in model.stored_weights())
    witnesses = Witnesses.of(apart, Lexicon(model, apart).states(apart), gram)
    return [
        witnesses.leakage(torch.tensor(part.basis), _inner(part, gram), frozenset(part.prompts))
        for part in increments
    ]


def _inner(part: Increment, gram: Tensor) -> Tensor:
    """The sum of F^T F over all layers [r, r], where dW = F @ basis. gram: of the layers' W."""
    if part.shift is not None:
        shift = torch.from_numpy(np.ldexp(part.shift, part.shift_exponent))
        return shift.T @ gram @ shift
    factors = (np.ldexp(up.astype(np.float32), part.exponents[n]) for n, up in part.up.items())
    return _gram(torch.from_numpy(factor) for factor in factors)


def _all(*groups: Sequence[str]) -> tuple[str, ...]:
    """All prompts of some lists, each once."""
    return tuple(dict.fromkeys(chain.from_iterable(groups)))


def _gram(weights: Iterable[Tensor]) -> Tensor:
    """The sum of W^T W [d, d] over weights [out, d]."""
    return cast(Tensor, sum(weight.T @ weight for weight in weights))


def _check_not_protected(items: Sequence[Item], protected: Protected) -> None:
    kept = {slugify(word) for word in (*protected.styles, *protected.objects)}
    both = [name for item in items for name in item.names if slugify(name) in kept]
    if both:
        raise RefusedError(
            f"{', '.join(map(repr, both))} cannot be erased and protected at once: nothing would "
            "be left to erase with",
            expected="concepts that are not protected",
            found=", ".join(both),
        )


def closed_form_increment(study: Study, settings: Settings) -> Made:
    """The closed form's increment: no picture, no UNet pass."""
    started = time.monotonic()
    shift, exponent = operator_factors(study.space.shift)
    basis = study.space.basis.float().numpy()
    moved = study.space.shift.float()
    measured = Measured(
        leakage=_leakage(study, moved.T @ study.shared.gram @ moved),
        separability=study.space.separability,
    )
    increment = Increment(
        kind="operator",
        **_description(study, "closed-form", settings, measured),
        exponents={},
        shift_exponent=exponent,
        basis=basis,
        up={},
        shift=shift,
    )
    return Made(increment, study.like, time.monotonic() - started)


def _leakage(study: Study, inner: Tensor) -> float:
    """On all that must stay but the concept's own prompts; see `Witnesses.leakage`."""
    own = frozenset(study.concept.prompts)
    return study.shared.witnesses.leakage(study.space.basis, inner, own)


def sepme_increments(
    model: StableDiffusion,
    studies: Sequence[Study],
    settings: Settings,
    pictures: Tensor | None = None,
    progress: Progress = SILENT,
) -> list[Made]:
    """SepME's increments, optimised together. pictures: of the concept, [n, 3, H, W] in [0, 1],
    instead of ones that the model draws."""
    started = time.monotonic()
    _announce(model, len(studies), settings, progress)
    tasks = [_task(model, study, pictures, settings, progress) for study in studies]
    outcomes = optimise(tasks, settings, progress)
    seconds = (time.monotonic() - started) / len(studies)
    return [
        Made(_additive(study, outcome, settings), study.like, seconds)
        for study, outcome in zip(studies, outcomes, strict=True)
    ]


def _announce(
    model: StableDiffusion, concepts: int, settings: Settings, progress: Progress
) -> None:
    """Say how long it is likely to take, where that is long, and what would be faster."""
    minutes = expected_seconds(model, concepts, settings) / 60
    if minutes > 1:
        progress.say(
            f"this will take about {minutes:.0f} minutes on {model.device.type}; a GPU is faster, "
            "and --method closed-form takes seconds anywhere"
        )


def expected_seconds(model: StableDiffusion, concepts: int, settings: Settings) -> float:
    """How long SepME's optimisation is likely to take, from one pass through the UNet."""
    context = model.condition([BLANK]).to(model.device, model.dtype)
    noisy = torch.zeros(1, *model.latent_shape(), device=model.device, dtype=model.dtype)
    with torch.no_grad():
        model.predict(noisy, 0, context)  # the first pass pays for warming up
        started = time.monotonic()
        model.predict(noisy, 0, context)
    a_pass = time.monotonic() - started
    drawing = 3 * settings.pictures * settings.sampling_steps
    # Backwards costs about twice forwards; most concepts stop in a third of the steps.
    optimising = 3 * settings.batch_size * settings.steps / 3
    return concepts * a_pass * (drawing + optimising)


def _task(
    model: StableDiffusion,
    study: Study,
    pictures: Tensor | None,
    settings: Settings,
    progress: Progress,
) -> Task:
    phrases = study.concept.phrases
    if pictures is None:
        sample = sampled_moments(model, phrases, settings, progress)
    else:
        sample = pictured_moments(model, phrases, pictures, settings, progress)
    weights = dict(model.stored_weights())
    shift = settings.start * study.space.shift
    return Task(
        sample=sample,
        predict=EditedPredictor(model, model.condition(study.concept.prompts)),
        basis=study.space.basis.float(),
        cost=study.space.cost,
        scales={name: float(w.float().pow(2).mean().sqrt()) for name, w in weights.items()},
        start={name: w.double().cpu() @ shift for name, w in weights.items()},
    )


def _additive(study: Study, outcome: Outcome, settings: Settings) -> Increment:
    up, exponents = additive_factors(outcome.up)
    basis = study.space.basis.float().numpy()
    inner = _gram(factor.float().cpu() for factor in outcome.up.values())
    start, end = outcome.correlation
    measured = Measured(
        correlation_start=start,
        correlation_end=end,
        leakage=_leakage(study, inner),
        separability=study.space.separability,
        steps=outcome.steps,
        stopped=outcome.stopped,
    )
    return Increment(
        kind="additive",
        **_description(study, "sepme", settings, measured),
        exponents=exponents,
        basis=basis,
        up=up,
    )


def _description(
    study: Study, method: str, settings: Settings, measured: Measured
) -> dict[str, Any]:
    """What a manifest tells of an increment whatever its kind."""
    return {
        "concept": study.concept.name,
        "slug": slugify(study.concept.name),
        "rank": len(study.space.basis),
        "prompts": study.concept.prompts,
        "method": Method(method, {**settings.recorded(), "like": study.like}),
        "measured": measured,
    }
