"""What an erasure would do: `sepme erase --check`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Unpack

from patch_spec.increment import Increment
from sepme_cli.arguments import PlaceLike, Words
from sepme_cli.diffusion.eraser import closed_form_increment
from sepme_cli.diffusion.images import load_images
from sepme_cli.diffusion.protection import Strength
from sepme_cli.diffusion.study import Study
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.prompts import AsKind, Kind
from sepme_cli.increments import interferences
from sepme_cli.planning.neighbourhood import NearWord
from sepme_cli.planning.request import EraseOptions, EraseRequest
from sepme_cli.planning.survey import BaseSummary, Survey, surveyed
from sepme_cli.planning.vocabulary import vocabulary
from sepme_cli.progress import SILENT, Collector, Progress

_MOST_THOROUGH = 100
"""With more concepts no further strength of protection is looked at than a run would."""
_SHOWN = 5


@dataclass(frozen=True)
class WordChange:
    """A word that is not protected, and how much its keys and values would change, of 1."""

    word: str
    kind: Kind
    change: float


@dataclass(frozen=True)
class PlannedConcept:
    """What `erase` would do to one concept.

    Attributes:
        concept: Its name.
        taken_for: Its kind, given or detected: "style", "object" or "any".
        slug: Name for files and tensors.
        rank: Rank of the increment, on all streams together.
        like: The anchor: what would be generated instead; None for nothing.
        separability: How far the concept can be moved to its anchor, 0 to 1.
        leakage: Largest relative change of keys and values for prompts of other concepts, with the
            closed form.
        taken: Dimensions of the text embedding that hold something protected.
        neighbours: Nearest words that would be protected.
        aliases: Other names that would be erased with it.
        nearly: Words that are nearly the same, neither erased nor protected.
        drags: Common words that would change most.
        collateral: Change of captions that name no concept, for this increment alone.
        reachability: How far an adversary's embeddings stay from the concept's keys and values: 0
            where they restore all, 1 where they come no nearer than the anchor; None without
            the setting `robust`.
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
    nearly: tuple[NearWord, ...]
    drags: tuple[WordChange, ...]
    collateral: Collateral | None
    reachability: float | None


@dataclass(frozen=True)
class PairInterference:
    """How much of what one concept's increment reads lies where the other's acts; see
    `sepme_cli.increments.interference`."""

    concepts: tuple[str, str]
    interference: float


@dataclass(frozen=True)
class ErasePlan:
    """Result of `plan_erasure`.

    Attributes:
        method: Name of the method.
        base: Family of the model, and number of weights that the patch may change.
        recipe: Digest of the recipe, or None.
        width: Dimensions of the text embedding.
        concepts: One entry per concept.
        crowded: Pairs of concepts with the largest interference, the largest first.
        interference: For each concept, the share of its increment that acts on each other one.
        collateral: Change of captions that name no concept, for all increments together.
        protection: Weight of what is protected that was chosen.
        strengths: Separability and collateral at more and less protection.
        refused: Whether `erase` would refuse without `force_collateral`.
        expected_seconds: Estimated duration of `erase`.
        warnings: All warnings of the run.
    """

    method: str
    base: BaseSummary
    recipe: str | None
    width: int
    concepts: tuple[PlannedConcept, ...]
    crowded: tuple[PairInterference, ...]
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
    **options: Unpack[EraseOptions],
) -> ErasePlan:
    """Show what `erase` would do with the same arguments, and write nothing.

    Args:
        model: Checkpoint: a file, a folder, or a place on the hub.
        concepts: Names of the concepts, as prompts have them; empty with a recipe.
        progress: Receives progress and warnings.
        **options: More options; see `EraseOptions`.

    Returns:
        What would be done, and what it would change.

    Raises:
        UsageError: Options contradict each other.
        RefusedError: The model is patched already, or a concept cannot be separated from what is
            protected.
        MismatchError: A known patch is for another model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The model is of a kind that is not supported.
        SystemFailure: A file cannot be read.
    """
    return plan(EraseRequest.of(model, concepts, **options), progress)


def plan(request: EraseRequest, progress: Progress) -> ErasePlan:
    """As `plan_erasure`.

    The closed form is so quick that it is done, and thrown away: its figures are those of the run.
    SepME's optimisation starts from it, in the same directions.
    """
    started, progress = time.monotonic(), Collector(progress)
    thorough = len(request.recipe.concepts) <= _MOST_THOROUGH
    with surveyed(request, thorough=thorough, progress=progress) as survey:
        parts = [closed_form_increment(s, request.settings).increment for s in survey.studies]
        seconds = time.monotonic() - started
        if request.method.layers:
            progress.warn(
                "separability, leakage and collateral here are the closed form's; "
                f"--method {request.method.name} has its own, which the run reports"
            )
        if request.images is not None:  # which the run would fail on
            load_images(request.images, survey.network.image_size)
        if (expected := request.method.expected_seconds) is not None:
            seconds += expected(survey.network, len(parts), request.settings)
    shared = survey.studies[0].worst.shared
    names = [part.concept for part in parts]
    rows = interferences(parts, parts).tolist()
    between = {
        name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)
    }
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
        rank=part.rank + part.pooled_rank,
        like=study.concept.like,
        separability=study.separability,
        leakage=part.measured.leakage,
        taken=study.shared.preservation.taken,
        neighbours=survey.around.neighbours.get(part.concept, ()),
        aliases=study.concept.names[1:],
        nearly=survey.around.aliases[part.concept],
        drags=tuple(
            WordChange(word, "style" if word in styles else "object", change)
            for word, change in worst
        ),
        collateral=study.collateral,
        reachability=study.reachability,
    )


def _crowded(between: Mapping[str, Mapping[str, float]]) -> tuple[PairInterference, ...]:
    pairs = (
        PairInterference((a, b), max(between[a][b], between[b][a]))
        for a, b in combinations(between, 2)
    )
    return tuple(sorted(pairs, key=lambda pair: -pair.interference)[:_SHOWN])
