"""The method on a loaded model: concepts in, increments out."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from patch_spec.increment import Increment
from patch_spec.provenance import Collateral as Recorded
from patch_spec.provenance import Measured, Method
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.moments import pictured_moments, sampled_moments
from sepme_cli.diffusion.predictor import EditedPredictor
from sepme_cli.diffusion.study import Study, layers_gram
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.increment import (
    BLANK,
    additive_factors,
    operator_factors,
)
from sepme_cli.erasure.optimise import Outcome, Task, optimise
from sepme_cli.erasure.settings import Settings
from sepme_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class Made:
    """An increment, what the concept acts like with it, and the seconds it took."""

    increment: Increment
    like: str | None
    seconds: float


def closed_form_increment(study: Study, settings: Settings) -> Made:
    """The closed form's increment: no picture, no UNet pass."""
    started = time.monotonic()
    shift, exponent = operator_factors(study.space.shift)
    basis = study.space.basis.float().numpy()
    moved = study.space.shift.float()
    measured = Measured(
        leakage=study.leakage(moved.T @ study.shared.gram @ moved),
        separability=study.space.separability,
        collateral=_recorded(study.collateral),
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
    return Made(increment, study.concept.like, time.monotonic() - started)


def closed_form_increments(
    model: StableDiffusion,
    studies: Sequence[Study],
    settings: Settings,
    pictures: Tensor | None = None,
    progress: Progress = SILENT,
) -> list[Made]:
    """The same of several; nothing of the model is needed but what the studies hold."""
    return [closed_form_increment(study, settings) for study in studies]


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
        Made(_additive(study, outcome, settings), study.concept.like, seconds)
        for study, outcome in zip(studies, outcomes, strict=True)
    ]


def _announce(
    model: StableDiffusion, concepts: int, settings: Settings, progress: Progress
) -> None:
    """Say how long it is likely to take, where that is long, and what would be faster."""
    minutes = expected_seconds(model, concepts, settings) / 60
    if minutes > 1:
        progress.say(
            f"this will take about {minutes:.0f} minutes on {model.machine.device.type}; a GPU is "
            "faster, and --method closed-form takes seconds anywhere"
        )


def expected_seconds(model: StableDiffusion, concepts: int, settings: Settings) -> float:
    """How long SepME's optimisation is likely to take, from one pass through the UNet."""
    context = model.machine.put(model.text.condition([BLANK]))
    noisy = model.machine.put(torch.zeros(1, *model.latent_shape()))
    with torch.no_grad():
        model.denoiser.predict(noisy, 0, context)  # the first pass pays for warming up
        started = time.monotonic()
        model.denoiser.predict(noisy, 0, context)
    a_pass = time.monotonic() - started
    drawing = 3 * settings.pictures * settings.sampling_steps
    # Backwards costs about twice forwards; most concepts stop in a tenth of the steps.
    optimising = 3 * settings.batch_size * settings.steps / 10
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
    # A layer of zeros has no scale to learn at; no prompt does anything there, and it stays.
    weights = {name: weight for name, weight in model.denoiser.stored_weights() if weight.any()}
    shift = settings.start * study.space.shift
    return Task(
        sample=sample,
        predict=EditedPredictor(model.denoiser, model.text.condition(study.concept.prompts)),
        basis=study.space.basis.float(),
        cost=study.space.cost,
        scales={name: float(w.float().pow(2).mean().sqrt()) for name, w in weights.items()},
        start={name: w.double().cpu() @ shift for name, w in weights.items()},
    )


def _additive(study: Study, outcome: Outcome, settings: Settings) -> Increment:
    up, exponents = additive_factors(outcome.up)
    basis = study.space.basis.float().numpy()
    inner = layers_gram(factor.float().cpu() for factor in outcome.up.values())
    start, end = outcome.correlation
    measured = Measured(
        correlation_start=start,
        correlation_end=end,
        leakage=study.leakage(inner),
        separability=study.space.separability,
        collateral=_recorded(study.measure(inner)),
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


def _recorded(collateral: Collateral | None) -> Recorded | None:
    """Collateral as a manifest has it."""
    if collateral is None:
        return None
    return Recorded(collateral.captions, collateral.median, collateral.p95, dict(collateral.worst))


def _description(
    study: Study, method: str, settings: Settings, measured: Measured
) -> dict[str, Any]:
    """What a manifest tells of an increment whatever its kind."""
    return {
        "concept": study.concept.name,
        "slug": study.slug,
        "rank": len(study.space.basis),
        "prompts": study.concept.prompts,
        "method": Method(method, {**asdict(settings), **study.chosen}),
        "measured": measured,
    }
