"""Compute a patch that takes concepts out of a checkpoint."""

import io
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

from patch_spec.container import patch_bytes
from patch_spec.manifest import Patch
from sepme_cli.arguments import (
    FilePath,
    PlaceLike,
    Places,
    Words,
    as_output,
    as_path,
    as_place,
    as_places,
    several,
)
from sepme_cli.checkpoints.disk.files import check_writable
from sepme_cli.checkpoints.disk.output import moment_of_making, output_name, write_output
from sepme_cli.checkpoints.hub.cache import check_publishable, publish
from sepme_cli.diffusion.eraser import Made, closed_form_increment, sepme_increments
from sepme_cli.diffusion.models import Prediction
from sepme_cli.diffusion.pictures import load_pictures
from sepme_cli.diffusion.study import Study
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.places import HubPlace
from sepme_cli.planning.neighbourhood import Aliases
from sepme_cli.planning.request import MethodName, asked, chosen_method
from sepme_cli.planning.survey import BaseSummary, Outlook, outlook
from sepme_cli.progress import SILENT, Progress
from sepme_cli.recipe import Recipe, as_recipe
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
    recipe: Recipe | FilePath | None = None,
    output: PlaceLike | BinaryIO | None = None,
    apply_to: FilePath | None = None,
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
    force_collateral: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> EraseResult:
    """Make a patch with one increment for each concept.

    Every increment leaves the blank prompt, the other concepts and the concepts of `known` patches
    as they are. to: what the concepts should act like. protect: words to keep, "style:noto" or
    "object:cat" where they are of another kind than `kind`. recipe: a file or what was read
    from it, in place of concepts, kind, to and protect; its method and settings hold where none
    are given, and its digest stands in the patch. images: a folder of pictures of the (one)
    concept, instead of drawn ones.
    method: the closed form if left out, or SepME's optimisation where images or joint ask for it.
    text_encoders: where a UNet's file alone has its text encoders from; see
    `lend_text_encoders`. tokenizer: a folder with a tokenizer's files. prediction: what the UNet
    predicts, where that is not to be told from the checkpoint.
    low_memory: spare the device's memory at the cost of time.
    aliases: "auto" also erases the words that are nearly the same as a concept. cache: keep what
    the text encoder makes of ordinary captions for the next time, and look for it.
    force_collateral: make the patch also where it changes much that nobody named.
    output: a file, a stream, or a file on the hub, in a repository that is there; the first
    concept's slug in the current folder if left out.
    Raises UsageError, RefusedError (nothing left to erase, or too much else would change),
    MismatchError (a known patch of another
    model), and what opening and writing files raises.
    """
    started = time.monotonic()
    policy, shown = None if recipe is None else as_recipe(recipe), as_path(images)
    wanted = asked(several(concepts), policy, kind=kind, to=to, protect=several(protect))
    method = chosen_method(method, wanted, shown, joint=joint)
    settings = settings or Settings.of(wanted.settings)
    place = as_place(model)
    target = as_output(output) or Path(f"{wanted.concepts[0].slug}.sepme")
    if isinstance(target, HubPlace):
        check_publishable(target, force=force)
    for path in (target, as_path(apply_to)):
        if isinstance(path, Path):
            check_writable(path, 0, force=force)
    with outlook(
        place,
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
        progress=progress,
    ) as seen:
        if seen.wrecks is not None and not force_collateral:
            raise seen.wrecks
        made = _made(seen, method, shown, progress, joint=joint)
    kept = seen.studies[0]  # what one keeps beside the others' prompts, all keep
    patch = Patch(
        base=seen.base,
        increments=tuple(m.increment for m in made),
        separable_from=kept.separable,
        protected=kept.protected,
        tool=f"sepme {__version__}",
        created=moment_of_making(),
        recipe=None if policy is None else policy.digest,
    )
    data = patch_bytes(patch)
    if isinstance(target, HubPlace):
        _publish(target, data, patch, progress, force=force)
    else:
        write_output(target, data, force=force, progress=progress)
    if apply_to is not None:
        apply(place, [io.BytesIO(data)], apply_to, force=force, progress=progress)
    return EraseResult(
        patch=str(target) if isinstance(target, HubPlace) else output_name(target),
        model=seen.model,
        bytes=len(data),
        base=seen.summary,
        recipe=patch.recipe,
        increments=tuple(
            _summary(m, study, seen.around.neighbours.get(study.concept.name, ()))
            for m, study in zip(made, seen.studies, strict=True)
        ),
        collateral=kept.shared.strength.collateral,
        protection=kept.shared.strength.protection,
        seconds=time.monotonic() - started,
        applied=None if apply_to is None else str(apply_to),
        warnings=seen.warnings,
    )


def _made(
    seen: Outlook,
    method: MethodName,
    images: Path | None,
    progress: Progress,
    *,
    joint: bool,
) -> list[Made]:
    settings = seen.settings
    if method == "closed-form":
        return [closed_form_increment(s, settings) for s in seen.studies]
    pictures = None if images is None else load_pictures(images, seen.network.picture_size)
    groups = [seen.studies] if joint else [(study,) for study in seen.studies]
    return [
        made
        for group in groups
        for made in sepme_increments(seen.network, group, settings, pictures, progress)
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
