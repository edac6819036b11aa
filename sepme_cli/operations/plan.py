"""What an erasure would do: `sepme erase --check`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Unpack

from patch_spec.increment import Increment
from sepme_cli.arguments import PlaceLike, Words
from sepme_cli.diffusion.eraser import closed_form_increment, expected_seconds
from sepme_cli.diffusion.pictures import load_pictures
from sepme_cli.diffusion.study import Strength, Study
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.prompts import AsKind, Kind
from sepme_cli.increments import interference
from sepme_cli.planning.neighbourhood import Near
from sepme_cli.planning.request import EraseRequest, Wishes
from sepme_cli.planning.survey import BaseSummary, Survey, surveyed
from sepme_cli.planning.vocabulary import vocabulary
from sepme_cli.progress import SILENT, Collector, Progress

_SHOWN = 5


@dataclass(frozen=True)
class Dragged:
    """A word that is not protected, and how much its keys and values would change, of 1."""

    word: str
    kind: Kind
    change: float


@dataclass(frozen=True)
class PlannedConcept:
    """What is foreseen of a concept.

    like: the word it will act like, None for nothing in its place. taken: dimensions of the
    embedding space in which something must stay as it is. leakage: of the closed form's
    increment. neighbours: the words that are protected for it beside those named. aliases: what
    goes with it. nearly: words that are nearly the same, to take in or to leave. drags: the common
    words that its increment changes most. collateral: what it does to held-out captions.
    """

    concept: str
    taken_for: AsKind
    slug: str
    rank: int
    like: str | None
    separability: float
    leakage: float | None
    taken: int
    neighbours: tuple[str, ...]
    aliases: tuple[str, ...]
    nearly: tuple[Near, ...]
    drags: tuple[Dragged, ...]
    collateral: Collateral | None


@dataclass(frozen=True)
class Crowding:
    """How much of what one concept's increment reads lies where the other's acts; see
    `sepme_cli.increments.interference`."""

    concepts: tuple[str, str]
    interference: float


@dataclass(frozen=True)
class ErasePlan:
    """What an erasure would do.

    width: dimensions of the embedding space. crowded: the pairs of concepts that are most in each
    other's way, the worst first. interference: all of them, as `sepme diff` has them.
    collateral: of all increments together. strengths: what more and less protection would come to;
    protection: the one that is chosen. refused: whether the run would want --force-collateral.
    expected_seconds: what the run is likely to take.
    """

    method: str
    base: BaseSummary
    recipe: str | None
    width: int
    concepts: tuple[PlannedConcept, ...]
    crowded: tuple[Crowding, ...]
    interference: Mapping[str, Mapping[str, float]]
    collateral: Collateral | None
    protection: float
    strengths: tuple[Strength, ...]
    refused: bool
    expected_seconds: float
    warnings: tuple[str, ...]


def plan_erasure(
    model: PlaceLike,
    concepts: Words = (),
    *,
    progress: Progress = SILENT,
    **wishes: Unpack[Wishes],
) -> ErasePlan:
    """Look at what `erase` would do with the same arguments, and write nothing.

    wishes: see `Wishes`. Raises what `erase` raises before it writes.
    """
    return plan(EraseRequest.of(model, concepts, **wishes), progress)


def plan(request: EraseRequest, progress: Progress) -> ErasePlan:
    """As `plan_erasure`.

    The closed form is so quick that it is done, and thrown away: its figures are those of the run.
    SepME's optimisation starts from it, in the same directions.
    """
    started, progress = time.monotonic(), Collector(progress)
    with surveyed(request, thorough=True, progress=progress) as survey:
        parts = [closed_form_increment(s, request.settings).increment for s in survey.studies]
        seconds = time.monotonic() - started
        if request.images is not None:  # which the run would fail on
            load_pictures(request.images, survey.network.image_size)
        if request.method.learns:
            seconds += expected_seconds(survey.network, len(parts), request.settings)
    shared = survey.studies[0].shared
    between = {a.concept: {b.concept: interference(a, b) for b in parts} for a in parts}
    return ErasePlan(
        method=request.method.name,
        base=survey.summary,
        recipe=request.digest,
        width=survey.base.width,
        concepts=tuple(_planned(survey, *each) for each in zip(parts, survey.studies, strict=True)),
        crowded=_crowded(between),
        interference=between,
        collateral=shared.strength.collateral,
        protection=shared.strength.protection,
        strengths=shared.tried,
        refused=survey.wrecks is not None,
        expected_seconds=seconds,
        warnings=progress.warnings,
    )


def _planned(survey: Survey, part: Increment, study: Study) -> PlannedConcept:
    styles = vocabulary("style")
    worst = () if study.collateral is None else study.collateral.worst
    return PlannedConcept(
        concept=part.concept,
        taken_for=study.concept.kind,
        slug=part.slug,
        rank=part.rank,
        like=study.concept.like,
        separability=study.space.separability,
        leakage=part.measured.leakage,
        taken=study.shared.ground.taken,
        neighbours=survey.around.neighbours.get(part.concept, ()),
        aliases=study.concept.names[1:],
        nearly=survey.around.aliases[part.concept],
        drags=tuple(
            Dragged(word, "style" if word in styles else "object", change) for word, change in worst
        ),
        collateral=study.collateral,
    )


def _crowded(between: Mapping[str, Mapping[str, float]]) -> tuple[Crowding, ...]:
    pairs = (
        Crowding((a, b), max(between[a][b], between[b][a])) for a, b in combinations(between, 2)
    )
    return tuple(sorted(pairs, key=lambda pair: -pair.interference)[:_SHOWN])
