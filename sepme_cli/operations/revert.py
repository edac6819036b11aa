"""Take increments out of a patched checkpoint again: put its concepts back."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self, TypedDict, Unpack

from patch_spec.stack import StackEntry, StackRecord
from sepme_cli.arguments import (
    FilePath,
    PlaceLike,
    Words,
    as_path,
    as_place,
    check_known,
    several,
)
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.original import Original
from sepme_cli.checkpoints.reading.patches import Patches, PatchFile, named, read_patch_files
from sepme_cli.checkpoints.structure.dtypes import numpy_dtype
from sepme_cli.checkpoints.writing.companions import Companions
from sepme_cli.checkpoints.writing.destination import Destination
from sepme_cli.checkpoints.writing.writer import Rewrite
from sepme_cli.composing.composition import (
    TOOL,
    Composition,
    Sources,
    find_original,
)
from sepme_cli.composing.matching import check_patched
from sepme_cli.composing.subtraction import LargestError, measured, subtraction
from sepme_cli.errors import RefusedError, UsageError
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Collector, Progress


@dataclass(frozen=True)
class RevertResult:
    """Result of `revert`.

    Attributes:
        output: Where the checkpoint was written; "-" for a stream.
        family: Name of the model's family.
        model: The model, in words.
        restored: Concepts that were restored.
        remaining: Concepts that are still erased.
        exact: Whether the result is byte for byte as if they had never been erased.
        max_abs_error: 0 if exact, else a proven bound on any weight's error; None if unknown.
        warnings: All warnings of the run.
        seconds: Duration.
    """

    output: str | None
    family: str
    model: str
    restored: tuple[str, ...]
    remaining: tuple[str, ...]
    exact: bool
    max_abs_error: float | None
    warnings: tuple[str, ...]
    seconds: float


class RevertOptions(TypedDict, total=False):
    """Options of `revert`, beside the model and the patches.

    Attributes:
        concepts: Concepts or slugs to restore; by default those of the patches, and with neither
            all that are erased.
        output: File, folder or binary stream to write; None with `in_place`.
        in_place: Change the model itself.
        base: Original of the model.
        undo: Undo journal; by default the one beside the model.
        exact: Refuse if the result would not be exact.
        force: Overwrite an existing output.
    """

    concepts: Words
    output: FilePath | BinaryIO | None
    in_place: bool
    base: PlaceLike | None
    undo: FilePath | None
    exact: bool
    force: bool


@dataclass(frozen=True)
class RevertRequest:
    """What is to be put back, as the command line and Python ask for it alike; see `revert`."""

    destination: Destination
    files: tuple[PatchFile, ...]
    concepts: tuple[str, ...]
    base: Place | None
    undo: Path | None
    exact: bool

    @classmethod
    def of(cls, model: PlaceLike, patches: Patches, **options: Unpack[RevertOptions]) -> Self:
        """Settle what is asked for, and read the patches. Raises UsageError, and what that does."""
        check_known(options, RevertOptions)
        base, undo = as_place(options.get("base")), as_path(options.get("undo"))
        if base is not None and undo is not None:
            raise UsageError("give the base or an undo journal, not both")
        destination = Destination(
            as_place(model),
            as_path(options.get("output")),
            options.get("in_place", False),
            options.get("force", False),
            read=(*several(patches), base, undo),
        )
        return cls(
            destination=destination,
            files=read_patch_files(patches),
            concepts=several(options.get("concepts", ())),
            base=base,
            undo=undo,
            exact=options.get("exact", False),
        )


@dataclass(frozen=True)
class _Plan:
    """What will be done. why_not_exact: "" if the result is. error is filled in by doing it."""

    rewrites: tuple[Rewrite, ...]
    companions: Companions
    taken: tuple[StackEntry, ...]
    remaining: tuple[StackEntry, ...]
    why_not_exact: str
    error: LargestError = field(default_factory=LargestError)


def revert(
    model: PlaceLike,
    patches: Patches = (),
    *,
    progress: Progress = SILENT,
    **options: Unpack[RevertOptions],
) -> RevertResult:
    """Write a patched checkpoint with concepts restored.

    With the base or the undo journal, and the patches of what stays erased, the result is exact.
    Without, increments are subtracted, which rounds a second time.

    Args:
        model: Patched checkpoint: a file, a folder, or a place on the hub.
        patches: Patches whose concepts to restore; also those of what stays erased.
        progress: Receives progress and warnings.
        **options: More options; see `RevertOptions`.

    Returns:
        What was restored, and how exactly.

    Raises:
        UsageError: Options contradict each other.
        RefusedError: A concept is not erased, or the result would not be exact or is impossible.
        MismatchError: The base is another model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The model is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    request = RevertRequest.of(model, patches, **options)
    with ExitStack() as stack:
        target = stack.enter_context(request.destination.opened(progress))
        checkpoint = target.checkpoint
        record = check_patched(checkpoint)
        taken = _taken(checkpoint, record, request)
        original = stack.enter_context(
            find_original(checkpoint, request.base, request.undo, progress.warn, progress)
        )
        plan = _plan(checkpoint, record, request, taken, original)
        if plan.why_not_exact:
            progress.warn(f"not exact: {plan.why_not_exact}")
        target.write(plan.rewrites, plan.companions)
    return RevertResult(
        output=request.destination.name,
        family=checkpoint.family.name,
        model=checkpoint.title,
        restored=tuple(entry.concept for entry in plan.taken),
        remaining=tuple(entry.concept for entry in plan.remaining),
        exact=not plan.why_not_exact,
        max_abs_error=plan.error.largest,
        warnings=progress.warnings,
        seconds=time.monotonic() - started,
    )


def _taken(
    checkpoint: Checkpoint, record: StackRecord, request: RevertRequest
) -> tuple[StackEntry, ...]:
    """The entries to take out of the record; RefusedError for one that is not in it."""
    if concepts := request.concepts:
        unknown = [
            name for name in concepts if not any(named(entry, name) for entry in record.entries)
        ]
        taken = [entry for entry in record.entries if any(named(entry, name) for name in concepts)]
    elif request.files:
        unknown, taken = [], []
        for file in request.files:
            inside = [entry for entry in record.entries if entry.digest in file.digests]
            taken += [entry for entry in inside if entry not in taken]
            unknown += [] if inside else [file.name]
    else:
        unknown, taken = [], list(record.entries)
    if unknown:
        raise RefusedError(
            f"{', '.join(unknown)} is not in {checkpoint.path}; nothing was changed",
            file=checkpoint.path,
            expected="one of " + ", ".join(entry.concept for entry in record.entries),
            found=", ".join(unknown),
        )
    return tuple(taken)


def _plan(
    checkpoint: Checkpoint,
    record: StackRecord,
    request: RevertRequest,
    taken: tuple[StackEntry, ...],
    original: Original | None,
) -> _Plan:
    remaining = tuple(entry for entry in record.entries if entry not in taken)
    sources = Sources.gather(request.files, checkpoint)
    missing = sources.missing(remaining)
    exact = original is not None and not missing
    after = _record_after(record, sources, remaining, exact=exact)
    why = _why_not_exact(checkpoint, original, missing, bool(remaining))
    if why and request.exact:
        raise RefusedError(
            f"{checkpoint.path}: the result would not be exact: {why}", file=checkpoint.path
        )
    error = LargestError()
    if exact:
        composition = Composition(checkpoint, original, sources.terms(remaining), after)
        rewrites = composition.rewrites()
        if why:
            rewrites = tuple(measured(rewrite, error) for rewrite in rewrites)
    elif original is not None and sources.missing(taken):
        raise RefusedError(
            f"{checkpoint.path}: {why}; nothing was changed",
            file=checkpoint.path,
            expected="the patches of what stays in",
            found=", ".join(file.name for file in sources.files) or "no patch",
        )
    else:
        rewrites = subtraction(checkpoint, sources, taken, remaining, after, error)
    companions = Companions(after, sources.holding(remaining))
    return _Plan(rewrites, companions, taken, remaining, why, error)


def _record_after(
    record: StackRecord, sources: Sources, remaining: tuple[StackEntry, ...], *, exact: bool
) -> StackRecord | None:
    if not remaining:
        return None
    layers = record.layers
    if exact:
        # What was only subtracted from is not the base's again.
        stay = {name for part, _ in sources.terms(remaining) for name in part.layers}
        layers = {name: value for name, value in layers.items() if name in stay}
    patches = sources.digests(record, remaining)
    return StackRecord(record.base, record.family, remaining, TOOL, patches, layers)


def _why_not_exact(
    checkpoint: Checkpoint,
    original: Original | None,
    missing: Sequence[StackEntry],
    stays: bool,
) -> str:
    """What stands in the way of an exact result, and what would help; "" if nothing does."""
    if original is None:
        return "subtracting rounds a second time; give its base (--base)"
    if missing:
        names = ", ".join(f"{entry.concept} ({entry.digest[:12]})" for entry in missing)
        return (
            f"the patches of what stays in are needed to compose it anew: {names}; give them "
            "too, and name what to put back with --concept"
        )
    for target in (*checkpoint.targets, *checkpoint.patched_layers):
        for copy, stored in enumerate(target.copies):
            found, wanted = original.weight(target.name, copy).dtype, stored.dtype
            wider = numpy_dtype(found).itemsize > numpy_dtype(wanted).itemsize
            if found != wanted and (stays or not wider):
                return (
                    f"{original.path} holds {stored.name} as {found} and the checkpoint as "
                    f"{wanted}; give the base in the checkpoint's dtype"
                )
    return ""
