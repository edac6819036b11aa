"""The method on a loaded model: concepts in, increments out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patch_spec.increment import Factors, Increment
from patch_spec.provenance import Collateral as Recorded
from patch_spec.provenance import Measurements, Method
from patch_spec.streams import Stream
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.moments import image_moments, sampled_moments
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
class ComputedIncrement:
    """An increment, the concept's anchor, the seconds it took, and what it alone does to captions
    that name no concept."""

    increment: Increment
    like: str | None
    seconds: float
    collateral: Collateral | None


def closed_form_increment(study: Study, settings: Settings) -> ComputedIncrement:
    """The closed form's increment: no image, no UNet pass."""
    started = time.monotonic()
    leakages: list[float] = []
    factors: dict[Stream, Factors] = {}
    for stream, one in study.streams.items():
        shift, exponent = operator_factors(one.space.shift)
        factors[stream] = Factors(one.space.basis.float().numpy(), shift, exponent)
        moved = one.space.shift.float()
        leakages.append(one.leakage(moved.T @ one.shared.gram @ moved))
    measured = Measurements(
        leakage=max(leakages),
        separability=study.separability,
        collateral=recorded(_largest([one.collateral for one in study.streams.values()])),
    )
    increment = Increment(
        kind="operator",
        **_description(study, "closed-form", settings, measured),
        **_on_streams(factors, study),
        exponents={},
        up={},
    )
    seconds = time.monotonic() - started
    return ComputedIncrement(increment, study.concept.like, seconds, study.collateral)


def _on_streams(factors: Mapping[Stream, Factors], study: Study) -> dict[str, Any]:
    """The factors as an increment has them."""
    tokens, pooled = factors.get("tokens"), factors.get("pooled")
    if tokens is None:
        # The stream that all patches have, which this one leaves alone.
        tokens = Factors(np.zeros((0, study.shared.width), np.float32))
    found: dict[str, Any] = {
        "rank": len(tokens.basis),
        "basis": tokens.basis,
        "shift": tokens.shift,
        "shift_exponent": tokens.exponent,
    }
    if pooled is not None:
        found |= {
            "pooled_rank": len(pooled.basis),
            "pooled_basis": pooled.basis,
            "pooled_shift": pooled.shift,
            "pooled_exponent": pooled.exponent,
        }
    return found


def _largest(found: Sequence[Collateral | None]) -> Collateral | None:
    """Of a concept on several streams, where most moves."""
    known = [one for one in found if one is not None]
    return max(known, key=lambda one: one.p95, default=None)


def closed_form_increments(
    model: StableDiffusion,
    studies: Sequence[Study],
    settings: Settings,
    images: Tensor | None = None,
    progress: Progress = SILENT,
) -> list[ComputedIncrement]:
    """The same of several; nothing of the model is needed but what the studies hold."""
    return [closed_form_increment(study, settings) for study in studies]


def sepme_increments(
    model: StableDiffusion,
    studies: Sequence[Study],
    settings: Settings,
    images: Tensor | None = None,
    progress: Progress = SILENT,
) -> list[ComputedIncrement]:
    """SepME's increments, optimised together. images: of the concept, [n, 3, H, W] in [0, 1],
    instead of ones that the model generates."""
    started = time.monotonic()
    announce(expected_seconds(model, len(studies), settings), model, progress)
    tasks = [_task(model, study, images, settings, progress) for study in studies]
    outcomes = optimise(tasks, settings, progress)
    seconds = (time.monotonic() - started) / len(studies)
    return [
        ComputedIncrement(
            _additive(model, study, outcome, settings),
            study.concept.like,
            seconds,
            study.collateral,
        )
        for study, outcome in zip(studies, outcomes, strict=True)
    ]


def announce(seconds: float, model: StableDiffusion, progress: Progress) -> None:
    """Say how long a method is likely to take, where that is long, and what would be faster."""
    minutes = seconds / 60
    if minutes > 1:
        progress.say(
            f"this will take about {minutes:.0f} minutes on {model.machine.device.type}; a GPU is "
            "faster, and --method closed-form takes seconds anywhere"
        )


def expected_seconds(model: StableDiffusion, concepts: int, settings: Settings) -> float:
    """How long SepME's optimisation is likely to take, from one pass through the UNet."""
    sampling = 3 * settings.pictures * settings.sampling_steps
    # Backwards costs about twice forwards; most concepts stop in a tenth of the steps.
    optimising = 3 * settings.batch_size * settings.steps / 10
    return concepts * seconds_of_a_pass(model) * (sampling + optimising)


def seconds_of_a_pass(model: StableDiffusion) -> float:
    """Of one prompt through the UNet."""
    context = model.machine.put(model.text.condition([BLANK]))
    noisy = model.machine.put(torch.zeros(1, *model.latent_shape()))
    with torch.no_grad():
        model.denoiser.predict(noisy, 0, context)  # the first pass pays for warming up
        started = time.monotonic()
        model.denoiser.predict(noisy, 0, context)
    return time.monotonic() - started


def _task(
    model: StableDiffusion,
    study: Study,
    images: Tensor | None,
    settings: Settings,
    progress: Progress,
) -> Task:
    phrases = study.concept.phrases
    if images is None:
        sample = sampled_moments(model, phrases, settings, progress)
    else:
        sample = image_moments(model, phrases, images, settings, progress)
    # A layer of zeros has no scale to learn at; no prompt does anything there, and it stays.
    weights = {name: weight for name, weight in model.denoiser.stored_weights() if weight.any()}
    shift = settings.start * study.space.shift
    return Task(
        sample=sample,
        predict=EditedPredictor(model.denoiser, _context(model, study)),
        basis=study.space.basis.float(),
        cost=study.space.cost,
        scales={name: float(w.float().pow(2).mean().sqrt()) for name, w in weights.items()},
        start={name: w.double().cpu() @ shift for name, w in weights.items()},
    )


def _context(model: StableDiffusion, study: Study) -> Conditioning:
    """What the edited denoiser reads of the concept's prompts, before its keys and values change:
    of a stream that is not optimised on, what the closed form makes of it."""
    context = model.text.condition(study.concept.prompts)
    vector = study.streams.get("pooled")
    if vector is None or context.pooled is None:
        return context
    shift, basis = (part.to(context.pooled) for part in (vector.space.shift, vector.space.basis))
    return replace(context, pooled=context.pooled + context.pooled @ basis.T @ shift.T)


def _additive(
    model: StableDiffusion, study: Study, outcome: Outcome, settings: Settings
) -> Increment:
    """As optimised; of a stream that was not optimised on, the closed form's."""
    ups: dict[Stream, dict[str, Tensor]] = {"tokens": dict(outcome.up)}
    for stream, one in study.streams.items():
        if stream != "tokens":
            stored = model.denoiser.stored_weights(stream)
            ups[stream] = {name: (w.double() @ one.space.shift).float() for name, w in stored}
    inners = {
        stream: layers_gram(factor.float().cpu() for factor in up.values())
        for stream, up in ups.items()
    }
    up, exponents = additive_factors({n: u for found in ups.values() for n, u in found.items()})
    start, end = outcome.correlation
    measured = Measurements(
        correlation_start=start,
        correlation_end=end,
        leakage=max(study.streams[stream].leakage(inner) for stream, inner in inners.items()),
        separability=study.separability,
        collateral=recorded(
            _largest([study.streams[stream].measure(inner) for stream, inner in inners.items()])
        ),
        steps=outcome.steps,
        stopped=outcome.stopped,
    )
    return Increment(
        kind="additive",
        **_description(study, "sepme", settings, measured),
        **_on_streams(
            {
                stream: Factors(one.space.basis.float().numpy())
                for stream, one in study.streams.items()
            },
            study,
        ),
        exponents=exponents,
        up=up,
    )


def recorded(collateral: Collateral | None) -> Recorded | None:
    """Collateral as a manifest has it."""
    if collateral is None:
        return None
    return Recorded(collateral.captions, collateral.median, collateral.p95, dict(collateral.worst))


def _description(
    study: Study, method: str, settings: Settings, measured: Measurements
) -> dict[str, Any]:
    """What a manifest tells of an increment whatever its kind."""
    return {
        "concept": study.concept.name,
        "slug": study.slug,
        "prompts": study.concept.prompts,
        "method": Method(method, {**settings.recorded, **study.chosen}),
        "measured": measured,
    }
