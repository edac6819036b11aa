"""What an erasure would do: `sepme erase --check`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from patch_spec.increment import Increment
from sepme_cli.arguments import (
    FilePath,
    PlaceLike,
    Places,
    Words,
    as_path,
    as_place,
    as_places,
    several,
)
from sepme_cli.diffusion.eraser import closed_form_increment, expected_seconds
from sepme_cli.diffusion.models import Prediction
from sepme_cli.diffusion.pictures import load_pictures
from sepme_cli.diffusion.study import Strength, Study
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.prompts import AsKind, Kind
from sepme_cli.erasure.settings import Settings
from sepme_cli.increments import interference
from sepme_cli.planning.neighbourhood import Aliases, Near
from sepme_cli.planning.request import MethodName, asked, chosen_method
from sepme_cli.planning.survey import BaseSummary, Outlook, outlook
from sepme_cli.planning.vocabulary import vocabulary
from sepme_cli.progress import SILENT, Progress
from sepme_cli.recipe import Recipe, as_recipe

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
    recipe: Recipe | FilePath | None = None,
    method: MethodName | None = None,
    kind: AsKind = "any",
    to: str | None = None,
    protect: Words = (),
    known: Places = (),
    images: FilePath | None = None,
    settings: Settings | None = None,
    low_memory: bool = False,
    joint: bool = False,
    text_encoders: Places = (),
    tokenizer: FilePath | None = None,
    prediction: Prediction | None = None,
    aliases: Aliases = "none",
    cache: bool = True,
    progress: Progress = SILENT,
) -> ErasePlan:
    """Look at what `erase` would do with the same arguments, and write nothing.

    The closed form is so quick that it is done, and thrown away: its figures are those of the run.
    SepME's optimisation starts from it, in the same directions.
    Raises what `erase` raises before it writes.
    """
    started = time.monotonic()
    policy, shown = None if recipe is None else as_recipe(recipe), as_path(images)
    wanted = asked(several(concepts), policy, kind=kind, to=to, protect=several(protect))
    method = chosen_method(method, wanted, shown, joint=joint)
    settings = settings or Settings.of(wanted.settings)
    with outlook(
        as_place(model),
        wanted,
        settings,
        learns=method == "sepme",
        low_memory=low_memory,
        known=as_places(known),
        text_encoders=as_places(text_encoders),
        tokenizer=as_path(tokenizer),
        prediction=prediction,
        aliases=aliases,
        cache=cache,
        thorough=True,
        progress=progress,
    ) as seen:
        parts = [closed_form_increment(s, seen.settings).increment for s in seen.studies]
        seconds = time.monotonic() - started
        if shown is not None:
            load_pictures(shown, seen.network.picture_size)  # which the run would fail on
        if method == "sepme":
            seconds += expected_seconds(seen.network, len(parts), settings)
    shared = seen.studies[0].shared
    between = {a.concept: {b.concept: interference(a, b) for b in parts} for a in parts}
    return ErasePlan(
        method=method,
        base=seen.summary,
        recipe=None if policy is None else policy.digest,
        width=seen.base.width,
        concepts=tuple(_planned(seen, *each) for each in zip(parts, seen.studies, strict=True)),
        crowded=_crowded(between),
        interference=between,
        collateral=shared.strength.collateral,
        protection=shared.strength.protection,
        strengths=shared.tried,
        refused=seen.wrecks is not None,
        expected_seconds=seconds,
        warnings=seen.warnings,
    )


def _planned(seen: Outlook, part: Increment, study: Study) -> PlannedConcept:
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
        neighbours=seen.around.neighbours.get(part.concept, ()),
        aliases=study.concept.names[1:],
        nearly=seen.around.aliases[part.concept],
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
