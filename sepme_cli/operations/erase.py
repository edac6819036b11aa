"""Compute a patch that takes concepts out of a checkpoint."""

import io
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO, Unpack

from patch_spec.container import patch_bytes
from patch_spec.manifest import Patch
from sepme_cli.arguments import FilePath, PlaceLike, Words, as_output, as_path
from sepme_cli.checkpoints.disk.output import (
    check_output,
    moment_of_making,
    output_name,
    write_output,
)
from sepme_cli.checkpoints.hub.cache import check_publishable, publish
from sepme_cli.diffusion.eraser import Made
from sepme_cli.diffusion.pictures import load_pictures
from sepme_cli.diffusion.study import Study
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.errors import SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.places import HubPlace
from sepme_cli.planning.request import EraseRequest, Wishes
from sepme_cli.planning.survey import BaseSummary, Survey, surveyed
from sepme_cli.progress import SILENT, Collector, Progress
from sepme_cli.version import __version__


@dataclass(frozen=True)
class Correlation:
    """Of the edited representation with the original one, 1 where nothing is erased."""

    start: float | None
    end: float | None


@dataclass(frozen=True)
class IncrementSummary:
    """One concept's increment: what was done and what was measured.

    taken_for: "style", "object" or "any". aliases: erased with it. neighbours: protected for it.
    like: what it acts like now. collateral: what this increment alone does to others.
    """

    concept: str
    taken_for: AsKind
    aliases: tuple[str, ...]
    neighbours: tuple[str, ...]
    slug: str
    kind: str
    rank: int
    method: str
    steps: int | None
    stopped: str | None
    correlation: Correlation
    leakage: float | None
    separability: float | None
    collateral: Collateral | None
    like: str | None
    seconds: float


@dataclass(frozen=True)
class EraseResult:
    """patch: where it was written, "-" for a stream. model: what it was made from, of one on the
    hub with the commit. recipe: the digest of the recipe it was made by. collateral: what the
    closed forms of all increments together do to others. protection: its price. applied: the
    sanitized checkpoint, if any."""

    patch: str
    model: str
    bytes: int
    base: BaseSummary
    recipe: str | None
    increments: tuple[IncrementSummary, ...]
    collateral: Collateral | None
    protection: float
    seconds: float
    applied: str | None
    warnings: tuple[str, ...]


def erase(
    model: PlaceLike,
    concepts: Words = (),
    *,
    output: PlaceLike | BinaryIO | None = None,
    apply_to: FilePath | None = None,
    force_collateral: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **wishes: Unpack[Wishes],
) -> EraseResult:
    """Make a patch with one increment for each concept.

    Every increment leaves the blank prompt, the other concepts and the concepts of known patches
    as they are. wishes: see `Wishes`. output: a file, a stream, or a file on the hub, in a
    repository that is there; the recipe's or the first concept's name in the current folder if
    left out. apply_to: also write the model with the patch applied. force_collateral: make the
    patch also where it changes much that nobody named. force: the outputs may replace files.
    Raises UsageError, RefusedError (nothing left to erase, or too much else would change),
    MismatchError (a known patch of another model), and what opening and writing files raises.
    """
    started, progress = time.monotonic(), Collector(progress)
    request = EraseRequest.of(model, concepts, **wishes)
    target = as_output(output) or Path(f"{request.name}.sepme")
    if isinstance(target, HubPlace):
        check_publishable(target, force=force)
    for path in (target, as_path(apply_to)):
        check_output(path, (model, *request.read, wishes.get("recipe")), force=force)
    with surveyed(request, progress=progress) as survey:
        if survey.wrecks is not None and not force_collateral:
            raise survey.wrecks
        made = _made(survey, progress)
    shared = survey.studies[0].shared
    patch = Patch(
        base=survey.base,
        increments=tuple(m.increment for m in made),
        separable_from=shared.separable,
        protected=shared.protected,
        tool=f"sepme {__version__}",
        created=moment_of_making(),
        recipe=request.digest,
    )
    data = patch_bytes(patch)
    if isinstance(target, HubPlace):
        _publish(target, data, patch, progress, force=force)
    else:
        write_output(target, data, force=force, progress=progress)
    if apply_to is not None:
        apply(request.model, [io.BytesIO(data)], apply_to, force=force, progress=progress)
    return EraseResult(
        patch=str(target) if isinstance(target, HubPlace) else output_name(target),
        model=survey.model,
        bytes=len(data),
        base=survey.summary,
        recipe=patch.recipe,
        increments=tuple(
            _summary(m, study, survey.around.neighbours.get(study.concept.name, ()))
            for m, study in zip(made, survey.studies, strict=True)
        ),
        collateral=shared.strength.collateral,
        protection=shared.strength.protection,
        seconds=time.monotonic() - started,
        applied=None if apply_to is None else str(apply_to),
        warnings=progress.warnings,
    )


def _made(survey: Survey, progress: Progress) -> list[Made]:
    request, network = survey.request, survey.network
    images = None
    if request.images is not None:
        images = load_pictures(request.images, network.image_size)
    groups = [survey.studies] if request.joint else [(study,) for study in survey.studies]
    return [
        made
        for group in groups
        for made in request.method.increments(network, group, request.settings, images, progress)
    ]


def _publish(
    target: HubPlace, data: bytes, patch: Patch, progress: Progress, *, force: bool
) -> None:
    """Publish a patch; what that fails for must not cost the work, so it is kept then."""
    names = ", ".join(part.concept for part in patch.increments)
    try:
        progress.say(f"published: {publish(target, data, f'Take out {names}', force=force)}")
    except SystemFailure as error:
        kept = Path(mkdtemp(prefix="sepme-")) / Path(target.file).name
        kept.write_bytes(data)
        raise SystemFailure(
            f"{error.message}. The patch is made, and kept as {kept}",
            file=target,
            expected=error.expected,
            found=error.found,
        ) from error


def _summary(made: Made, study: Study, neighbours: tuple[str, ...]) -> IncrementSummary:
    increment, measured = made.increment, made.increment.measured
    return IncrementSummary(
        concept=increment.concept,
        taken_for=study.concept.kind,
        aliases=study.concept.names[1:],
        neighbours=neighbours,
        slug=increment.slug,
        kind=increment.kind,
        rank=increment.rank,
        method=increment.method.name,
        steps=measured.steps,
        stopped=measured.stopped,
        correlation=Correlation(measured.correlation_start, measured.correlation_end),
        leakage=measured.leakage,
        separability=measured.separability,
        collateral=study.collateral,
        like=made.like,
        seconds=made.seconds,
    )
