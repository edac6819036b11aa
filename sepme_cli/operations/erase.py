"""Compute a patch that takes concepts out of a checkpoint."""

import io
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

from patch_spec.base import Base
from patch_spec.container import patch_bytes, read_patch
from patch_spec.manifest import Patch, slugify
from sepme_cli import __version__
from sepme_cli.checkpoints.boundary import reading, writing
from sepme_cli.checkpoints.encoders import lend_text_encoders
from sepme_cli.checkpoints.files import check_writable, new_file, only_writer, write_all
from sepme_cli.checkpoints.reader import open_checkpoint
from sepme_cli.diffusion.devices import choose_device, choose_dtype
from sepme_cli.diffusion.eraser import (
    Made,
    Study,
    closed_form_increment,
    sepme_increments,
    study,
)
from sepme_cli.diffusion.models import Prediction, StableDiffusion
from sepme_cli.diffusion.pictures import load_pictures
from sepme_cli.erasure.concept import Protected, parse_word
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import MismatchError, UsageError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.matching import check_unpatched
from sepme_cli.progress import SILENT, Progress

MethodName = Literal["sepme", "closed-form"]


@dataclass(frozen=True)
class BaseSummary:
    """What the patch is for. targets: how many weights it may change."""

    family: str
    targets: int


@dataclass(frozen=True)
class Correlation:
    """Of the edited representation with the original one, 1 where nothing is erased."""

    start: float | None
    end: float | None


@dataclass(frozen=True)
class IncrementSummary:
    """One concept's increment: what was done and what was measured."""

    concept: str
    slug: str
    kind: str
    rank: int
    method: str
    steps: int | None
    stopped: str | None
    correlation: Correlation
    leakage: float | None
    separability: float | None
    seconds: float


@dataclass(frozen=True)
class EraseResult:
    """patch: where it was written, "-" for a stream. applied: the sanitized checkpoint, if any."""

    patch: str
    bytes: int
    base: BaseSummary
    increments: tuple[IncrementSummary, ...]
    seconds: float
    applied: str | None
    warnings: tuple[str, ...]


def erase(
    model: Path,
    concepts: Sequence[str],
    *,
    output: Path | BinaryIO | None = None,
    apply_to: Path | None = None,
    method: MethodName | None = None,
    kind: AsKind = "any",
    protect: Sequence[str] = (),
    known: Sequence[Path] = (),
    images: Path | None = None,
    settings: Settings = Settings(),
    joint: bool = False,
    text_encoders: Sequence[Path] = (),
    tokenizer: Path | None = None,
    prediction: Prediction | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> EraseResult:
    """Make a patch with one increment for each concept.

    Every increment leaves the blank prompt, the other concepts and the concepts of `known` patches
    as they are. protect: words to keep, "style:noto" or "object:cat" where they are of another
    kind than `kind`. images: a folder of pictures of the (one) concept, instead of drawn ones.
    method: the closed form if left out, or SepME's optimisation where images or joint ask for it.
    text_encoders: where a UNet's file alone has its text encoders from; see
    `lend_text_encoders`. tokenizer: a folder with a tokenizer's files. prediction: what the UNet
    predicts, where that is not to be told from the checkpoint.
    output: the concept's slug in the current folder if left out.
    Raises UsageError, RefusedError (nothing left to erase), MismatchError (a known patch of another
    model), and what opening and writing files raises.
    """
    started = time.monotonic()
    _check(concepts, kind, images)
    method = _method(method, optimises=joint or images is not None)
    first, _ = parse_word(concepts[0], kind)
    target = output if output is not None else Path(f"{slugify(first)}.sepme")
    for path in (target, apply_to):
        if isinstance(path, Path):
            check_writable(path, 0, force=force)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(model, progress))
        check_unpatched(checkpoint, "erase from its base, and apply both patches")
        lend_text_encoders(checkpoint, text_encoders, stack)
        network = StableDiffusion.of(
            checkpoint,
            choose_device(settings.device, progress),
            choose_dtype(settings.dtype),
            prediction=prediction,
            tokenizer=tokenizer,
            progress=progress,
        )
        progress.stage("reading the checkpoint")
        base = checkpoint.base(text_encoders=True)
        made, warnings = _made(
            network,
            study(
                network,
                concepts,
                kind,
                Protected.parse(protect, kind),
                _known(known, base),
                settings,
            ),
            method,
            images,
            settings,
            progress,
            joint=joint,
        )
    patch = Patch(
        base=base,
        increments=tuple(m.increment for m in made),
        tool=f"sepme {__version__}",
        created=_created(),
    )
    data = patch_bytes(patch)
    _write(target, data, force)
    if apply_to is not None:
        apply(model, [io.BytesIO(data)], apply_to, force=force, progress=progress)
    return EraseResult(
        patch=str(target) if isinstance(target, Path) else "-",
        bytes=len(data),
        base=BaseSummary(base.family, len(base.targets)),
        increments=tuple(_summary(m) for m in made),
        seconds=time.monotonic() - started,
        applied=None if apply_to is None else str(apply_to),
        warnings=tuple(warnings),
    )


def _made(
    network: StableDiffusion,
    studies: Sequence[Study],
    method: MethodName,
    images: Path | None,
    settings: Settings,
    progress: Progress,
    *,
    joint: bool,
) -> tuple[list[Made], list[str]]:
    """The increments, and warnings about them."""
    warnings = [warning for s in studies if (warning := s.warning)]
    for warning in warnings:
        progress.warn(warning)
    if method == "closed-form":
        return [closed_form_increment(network, s, settings) for s in studies], warnings
    return _optimised(network, studies, images, settings, progress, joint=joint), warnings


def _check(concepts: Sequence[str], kind: AsKind, images: Path | None) -> None:
    slugs = [slugify(parse_word(concept, kind)[0]) for concept in concepts]
    if not slugs:
        raise UsageError("name at least one --concept")
    twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
    if twice:
        raise UsageError(f"named twice: {', '.join(twice)}", expected="distinct concepts")
    if images is not None and len(concepts) > 1:
        raise UsageError("--images shows one concept; erase several in several runs, with --known")


def _method(method: MethodName | None, *, optimises: bool) -> MethodName:
    if optimises and method == "closed-form":
        raise UsageError("--images and --joint are for --method sepme; the closed form needs none")
    return method or ("sepme" if optimises else "closed-form")


def _optimised(
    network: StableDiffusion,
    studies: Sequence[Study],
    images: Path | None,
    settings: Settings,
    progress: Progress,
    *,
    joint: bool,
) -> list[Made]:
    pictures = None if images is None else load_pictures(images, network.picture_size)
    groups = [studies] if joint else [[study] for study in studies]
    return [
        made
        for group in groups
        for made in sepme_increments(network, group, settings, pictures, progress)
    ]


def _known(patches: Sequence[Path], base: Base) -> tuple[str, ...]:
    """The prompts of all concepts of patches made before."""
    prompts: list[str] = []
    for path in patches:
        with reading(path):
            patch = read_patch(path)
        if (patch.base.family, patch.base.width) != (base.family, base.width):
            raise MismatchError(
                f"{path} is a patch for another model; it cannot be combined with one for this",
                file=path,
                expected=f"{base.family}, {base.width} wide",
                found=f"{patch.base.family}, {patch.base.width} wide",
            )
        prompts += [prompt for increment in patch.increments for prompt in increment.prompts]
    return tuple(prompts)


def _created() -> str | None:
    """No clock in a patch, unless the maker fixed it (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return None
    try:
        return datetime.fromtimestamp(int(epoch), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            "SOURCE_DATE_EPOCH is not a time", expected="seconds since 1970", found=epoch
        ) from error


def _write(target: Path | BinaryIO, data: bytes, force: bool) -> None:
    if isinstance(target, Path):
        with only_writer(target), new_file(target, len(data), force=force) as descriptor:
            write_all(descriptor, data, 0)
    else:
        with writing(Path("-")):
            target.write(data)
            target.flush()


def _summary(made: Made) -> IncrementSummary:
    increment, measured = made.increment, made.increment.measured
    return IncrementSummary(
        concept=increment.concept,
        slug=increment.slug,
        kind=increment.kind,
        rank=increment.rank,
        method=increment.method.name,
        steps=measured.steps,
        stopped=measured.stopped,
        correlation=Correlation(measured.correlation_start, measured.correlation_end),
        leakage=measured.leakage,
        separability=measured.separability,
        seconds=made.seconds,
    )
