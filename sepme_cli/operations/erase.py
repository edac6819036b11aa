"""Compute a patch that takes concepts out of a checkpoint."""

import io
import time
from dataclasses import dataclass, replace
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
from sepme_cli.diffusion.eraser import ComputedIncrement
from sepme_cli.diffusion.images import load_images
from sepme_cli.diffusion.study import Study
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.errors import SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.places import HubPlace
from sepme_cli.planning.request import EraseOptions, EraseRequest
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

    Attributes:
        concept: Its name.
        taken_for: Its kind, given or detected: "style", "object" or "any".
        aliases: Other names that were erased with it.
        neighbours: Nearest words that were protected.
        slug: Name for files and tensors.
        kind: Kind of increment: "additive", "operator", "lora" or "mask".
        rank: Rank of the increment, on all streams together; 0 of a mask.
        zeros: Number of weights that a mask makes zero.
        method: Name of the method.
        steps: Number of optimisation steps, or None for the closed form.
        stopped: Why the optimisation stopped, or None.
        correlation: Correlation of the edited with the original representation.
        leakage: Largest relative change of keys and values for prompts of other concepts.
        separability: How far the concept could be moved to its anchor, 0 to 1.
        collateral: Change of captions that name no concept, for this increment alone.
        reachability: How far an adversary's embeddings stay from the concept's keys and values: 0
            where they restore all, 1 where they come no nearer than the anchor; None without
            the setting `robust`.
        like: The anchor: what is generated instead.
        seconds: Duration.
    """

    concept: str
    taken_for: AsKind
    aliases: tuple[str, ...]
    neighbours: tuple[str, ...]
    slug: str
    kind: str
    rank: int
    zeros: int
    method: str
    steps: int | None
    stopped: str | None
    correlation: Correlation
    leakage: float | None
    separability: float | None
    collateral: Collateral | None
    reachability: float | None
    like: str | None
    seconds: float


@dataclass(frozen=True)
class EraseResult:
    """Result of `erase`.

    Attributes:
        patch: Where the patch was written; "-" for a stream.
        model: The model it was made from; of one on the hub with the commit.
        bytes: Size of the patch.
        base: Family of the model, and number of weights that the patch may change.
        recipe: Digest of the recipe, or None.
        increments: One entry per concept: what was done and measured.
        collateral: Change of captions that name no concept, for the closed forms of all increments
            together.
        protection: Weight of what is protected that was chosen.
        seconds: Duration.
        applied: The patched checkpoint that was written, or None.
        warnings: All warnings of the run.
    """

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
    **options: Unpack[EraseOptions],
) -> EraseResult:
    """Make a patch with one increment for each concept. The model is only read.

    Every increment leaves the empty prompt, the other concepts and the concepts of known patches
    alone. Section "The method" of the documentation has the equations; they are those of SepME
    (arXiv 2402.05947), with the differences that the decisions explain.

    Args:
        model: Checkpoint: a file, a folder, or a place on the hub.
        concepts: Names of the concepts, as prompts have them; empty with a recipe.
        output: Patch to write: a file, a binary stream, or "hf://OWNER/NAME/FILE". If left out, the
            name of the recipe or first concept with .sepme, in the current folder.
        apply_to: Also write the model with the patch applied, here.
        force_collateral: Make the patch even if it changes other prompts too much.
        force: Overwrite existing outputs.
        progress: Receives progress and warnings.
        **options: More options; see `EraseOptions`.

    Returns:
        What was written and measured.

    Raises:
        UsageError: Options contradict each other.
        RefusedError: The model is patched already, a concept cannot be separated from what is
            protected, or other prompts would change too much.
        MismatchError: A known patch is for another model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The model is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    request = EraseRequest.of(model, concepts, **options)
    target = as_output(output) or Path(f"{request.name}.sepme")
    if isinstance(target, HubPlace):
        check_publishable(target, force=force)
    for path in (target, as_path(apply_to)):
        check_output(path, (model, *request.read, options.get("recipe")), force=force)
    with surveyed(request, progress=progress) as survey:
        if survey.wrecks is not None and not force_collateral:
            raise survey.wrecks
        computed = _computed(survey, progress)
        shared, collateral = survey.studies[0].worst.shared, survey.strength.collateral
        layers = {name for one in computed for name in one.increment.layers}
        base = survey.network.checkpoint.with_layers(survey.base, layers)
        if request.method.layers:
            measured = [one.collateral for one in computed if one.collateral is not None]
            collateral = max(measured, key=lambda one: one.p95, default=None)
            wrecks = survey.too_much(collateral)
            if wrecks is not None and not force_collateral:
                raise wrecks
    patch = Patch(
        base=base,
        increments=tuple(one.increment for one in computed),
        # Of what changes layers nothing is promised (rule P13).
        separable_from=() if layers else shared.separable,
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
        base=replace(survey.summary, targets=len(layers)) if layers else survey.summary,
        recipe=patch.recipe,
        increments=tuple(
            _summary(one, study, survey.around.neighbours.get(study.concept.name, ()))
            for one, study in zip(computed, survey.studies, strict=True)
        ),
        collateral=collateral,
        protection=shared.strength.protection,
        seconds=time.monotonic() - started,
        applied=None if apply_to is None else str(apply_to),
        warnings=progress.warnings,
    )


def _computed(survey: Survey, progress: Progress) -> list[ComputedIncrement]:
    request, network = survey.request, survey.network
    images = None
    if request.images is not None:
        images = load_images(request.images, network.image_size)
    groups = [survey.studies] if request.joint else [(study,) for study in survey.studies]
    return [
        computed
        for group in groups
        for computed in request.method.increments(
            network, group, request.settings, images, progress
        )
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


def _summary(
    computed: ComputedIncrement, study: Study, neighbours: tuple[str, ...]
) -> IncrementSummary:
    increment, measured = computed.increment, computed.increment.measured
    return IncrementSummary(
        concept=increment.concept,
        taken_for=study.concept.kind,
        aliases=study.concept.names[1:],
        neighbours=neighbours,
        slug=increment.slug,
        kind=increment.kind,
        rank=increment.rank + increment.pooled_rank,
        zeros=sum(mask.count for mask in increment.masks.values()),
        method=increment.method.name,
        steps=measured.steps,
        stopped=measured.stopped,
        correlation=Correlation(measured.correlation_start, measured.correlation_end),
        leakage=measured.leakage,
        separability=measured.separability,
        collateral=computed.collateral,
        reachability=study.reachability,
        like=computed.like,
        seconds=computed.seconds,
    )
