"""Apply patches to a checkpoint."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self, TypedDict, Unpack

from patch_spec import limits
from patch_spec.increment import Increment
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
from sepme_cli.checkpoints.disk.output import check_output
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.original import Original
from sepme_cli.checkpoints.reading.patches import (
    Patches,
    PatchFile,
    read_patch_files,
    select,
    with_scales,
)
from sepme_cli.checkpoints.structure.dtypes import CASTS, header_dtype
from sepme_cli.checkpoints.writing.companions import Companions
from sepme_cli.checkpoints.writing.destination import Destination
from sepme_cli.composing.composition import (
    TOOL,
    Composition,
    Sources,
    find_original,
)
from sepme_cli.composing.matching import (
    ROUNDS_TWICE,
    BaseMatch,
    Fit,
    applied_already,
    both_act,
    check_masks,
    fit,
    split_applied,
)
from sepme_cli.errors import UnsupportedError, UsageError
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Collector, Progress
from sepme_cli.signing.statement import check_statement, write_statement


@dataclass(frozen=True)
class ApplyResult:
    """Result of `apply`.

    Attributes:
        output: Where the checkpoint was written; "-" for a stream, None for a check.
        family: Name of the model's family.
        model: The model, in words.
        concepts: Concepts that were erased now.
        tensors_changed: Number of tensors that changed, EMA copies and variants included.
        base_match: Match of model and patches: "exact", "same-values" or "family".
        exact: Whether every concept can be restored exactly, given the base.
        applied: All concepts that are erased in the result.
        checked: Whether nothing was written.
        warnings: All warnings of the run.
        seconds: Duration.
        statement: The statement that was written, or None.
    """

    output: str | None
    family: str
    model: str
    concepts: tuple[str, ...]
    tensors_changed: int
    base_match: BaseMatch
    exact: bool
    applied: tuple[str, ...]
    checked: bool
    warnings: tuple[str, ...]
    seconds: float
    statement: str | None = None


class ApplyOptions(TypedDict, total=False):
    """Options of `apply`, beside the model, the patches and the output.

    Attributes:
        in_place: Change the model itself, and write an undo journal beside it.
        only: Use only these concepts or slugs.
        scale: Strength of the patches; 1 is full.
        base: Original of a model that has patches in it; by default the undo journal beside it.
        check: Do everything but write.
        dtype: Convert floating-point tensors to "fp32", "fp16" or "bf16"; None keeps them.
        statement: Also write a statement of what went in and came out, here; see `Statement`.
        force: Overwrite existing outputs.
    """

    in_place: bool
    only: Words
    scale: float
    base: PlaceLike | None
    check: bool
    dtype: str | None
    statement: FilePath | None
    force: bool


@dataclass(frozen=True)
class ApplyRequest:
    """An application as the command line and Python ask for it alike; see `apply`.

    destination: its `dry` is a caller's `check`, its `force` is for the statement too. chosen: the
    increments to put in. dtype: as safetensors calls it.
    """

    destination: Destination
    files: tuple[PatchFile, ...]
    chosen: tuple[Increment, ...]
    scale: float
    base: Place | None
    dtype: str | None
    statement: Path | None

    @classmethod
    def of(
        cls,
        model: PlaceLike,
        patches: Patches,
        output: FilePath | BinaryIO | None,
        **options: Unpack[ApplyOptions],
    ) -> Self:
        """Settle what is asked for, and read the patches. Raises UsageError, and what that does."""
        check_known(options, ApplyOptions)
        destination = Destination(
            as_place(model),
            as_path(output),
            options.get("in_place", False),
            options.get("force", False),
            dry=options.get("check", False),
            read=(*several(patches), options.get("base")),
        )
        statement = as_path(options.get("statement"))
        if statement is not None:
            written = None if destination.dry else destination.path
            check_statement(statement, written, force=destination.force)
            check_output(statement, (destination.model, *destination.read), force=destination.force)
        if not several(patches):
            raise UsageError("name at least one patch")
        scale, dtype = _checked(options)
        files = read_patch_files(patches)
        chosen = select(files, options.get("only", ()))
        with_scales(chosen, scale)
        return cls(
            destination=destination,
            files=files,
            chosen=chosen,
            scale=scale,
            base=as_place(options.get("base")),
            dtype=dtype,
            statement=statement,
        )


def _checked(options: ApplyOptions) -> tuple[float, str | None]:
    """The scale, and the dtype as safetensors calls it. Raises UsageError."""
    scale, dtype = options.get("scale", 1.0), options.get("dtype")
    if not 0 < abs(scale) <= limits.SAFE_INTEGER:  # which is not so of a NaN either
        raise UsageError(
            "a scale must be a number other than 0",
            expected="a magnitude up to 2**53 - 1",
            found=scale,
        )
    wanted = None if dtype is None else header_dtype(dtype)
    if dtype is not None and wanted is None:
        raise UsageError("unknown dtype", expected=" or ".join(CASTS.values()), found=dtype)
    if wanted is not None and options.get("in_place", False):
        raise UsageError("another dtype moves every tensor: write to another file, not in place")
    return scale, wanted


@dataclass(frozen=True)
class _Plan:
    """What will be done, and what there is to say of it."""

    composition: Composition
    companions: Companions
    new: tuple[Increment, ...]
    base_match: BaseMatch
    exact: bool


def apply(
    model: PlaceLike,
    patches: Patches,
    output: FilePath | BinaryIO | None = None,
    *,
    progress: Progress = SILENT,
    **options: Unpack[ApplyOptions],
) -> ApplyResult:
    """Write a checkpoint without the concepts of patches.

    Args:
        model: Checkpoint: a file, a folder, or a place on the hub.
        patches: Patches: files, places on the hub, or binary streams.
        output: File, folder or binary stream to write; None with `in_place` or `check`.
        progress: Receives progress and warnings.
        **options: More options; see `ApplyOptions`.

    Returns:
        What was written; with `check`, what would be.

    Raises:
        UsageError: Options contradict each other.
        RefusedError: A concept is unknown, or erased already.
        MismatchError: A patch is for another kind of model, or the base is another model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The model is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    request = ApplyRequest.of(model, patches, output, **options)
    destination, statement = request.destination, request.statement
    with ExitStack() as stack:
        target = stack.enter_context(destination.opened(progress))
        _check_dtype(target.checkpoint, request)
        plan = stack.enter_context(_planned(target.checkpoint, request, progress))
        target.write(plan.composition.rewrites(), plan.companions)
        if late := plan.composition.rounding_loss.warning:
            progress.warn(late)
        if statement is not None and (written := destination.path) is not None:
            record = plan.composition.record
            assert record is not None  # something was put in
            write_statement(statement, written, record, force=destination.force, progress=progress)
    return replace(
        _result(plan, destination, time.monotonic() - started),
        statement=None if statement is None else str(statement),
        warnings=progress.warnings,
    )


@contextmanager
def _planned(checkpoint: Checkpoint, request: ApplyRequest, progress: Progress) -> Iterator[_Plan]:
    """The plan; what it reads from stays open until it has been executed."""
    found = fit(checkpoint, request.files, request.chosen)
    progress.warn_all(found.warnings)
    if checkpoint.stack is None:
        yield _plan(checkpoint, request, found, None, progress)
        return
    new, repeated = split_applied(checkpoint, request.chosen)
    if not new:
        raise applied_already(checkpoint.path, repeated)
    with find_original(checkpoint, request.base, None, progress.warn, progress) as original:
        if original is None and repeated:
            raise applied_already(checkpoint.path, repeated)
        yield _plan(checkpoint, request, found, original, progress)


def _plan(
    checkpoint: Checkpoint,
    request: ApplyRequest,
    found: Fit,
    original: Original | None,
    progress: Progress,
) -> _Plan:
    before = checkpoint.stack.entries if checkpoint.stack is not None else ()
    new, _ = split_applied(checkpoint, request.chosen)
    entries = (*before, *(StackEntry(p.digest, p.concept, p.slug, request.scale) for p in new))
    sources = Sources.gather(request.files, checkpoint)
    missing = sources.missing(before)
    exact = not before or (original is not None and not missing)
    if not exact:
        check_masks(checkpoint, new, _needed(original, missing))
        progress.warn(_why_not_exact(original, missing))
    progress.warn_all(both_act(checkpoint, new))
    own = checkpoint.base() if original is None else original.base
    compared = found.compared(checkpoint, None if original is None else own)
    progress.warn_all(compared.warnings)
    record = StackRecord(
        own.digest if checkpoint.stack is None else checkpoint.stack.base,
        checkpoint.family.name,
        entries,
        TOOL,
        sources.digests(checkpoint.stack, entries),
        _layers_after(checkpoint, new),
    )
    composition = Composition(
        checkpoint,
        original if exact else None,
        sources.terms(entries if exact else entries[len(before) :]),
        record,
        request.dtype,
    )
    assert compared.match is not None  # which comparing gives
    return _Plan(
        composition, Companions(record, sources.holding(entries)), new, compared.match, exact
    )


def _layers_after(checkpoint: Checkpoint, new: Sequence[Increment]) -> dict[str, str]:
    """The layers that will be changed, with what they were before any patch."""
    before = {} if checkpoint.stack is None else checkpoint.stack.layers
    found = checkpoint.layers_of(new)
    return {**before, **{layer.name: checkpoint.fingerprint_of(layer) for layer in found}}


def _check_dtype(checkpoint: Checkpoint, request: ApplyRequest) -> None:
    if request.dtype is None:
        return
    if checkpoint.is_gguf:
        raise UnsupportedError(
            f"{checkpoint.path} is a GGUF file, in which each tensor has a type of its own; leave "
            "out --dtype",
            file=checkpoint.path,
            expected="a safetensors file",
            found="a GGUF file",
        )
    weights = (*checkpoint.targets, *checkpoint.layers_of(request.chosen))
    scaled = [copy for target in weights for copy in target.copies if copy.scale]
    if scaled:
        raise UnsupportedError(
            f"{checkpoint.path} is scaled fp8, whose scales other programs would apply again; "
            "leave out --dtype, or convert it first",
            file=checkpoint.path,
            expected="weights without scales",
            found=f"a scale for {scaled[0].name}",
        )


def _result(plan: _Plan, destination: Destination, seconds: float) -> ApplyResult:
    checkpoint, record = plan.composition.checkpoint, plan.companions.record
    # A tensor may hold several targets: q, k and v of some text encoders are one.
    changed = {
        (copy.file.place, copy.name)
        for target in (*checkpoint.targets, *checkpoint.layers_of(plan.new))
        if any(part.acts_on(target.name) for part in plan.new)
        for copy in target.copies
    }
    return ApplyResult(
        output=destination.name,
        family=checkpoint.family.name,
        model=checkpoint.title,
        concepts=tuple(part.concept for part in plan.new),
        tensors_changed=len(changed),
        base_match=plan.base_match,
        exact=plan.exact,
        applied=tuple(entry.concept for entry in record.entries) if record is not None else (),
        checked=destination.dry,
        warnings=(),
        seconds=seconds,
    )


def _why_not_exact(original: Original | None, missing: Sequence[StackEntry]) -> str:
    return f"{ROUNDS_TWICE}: to compose it exactly, give {_needed(original, missing)} as well"


def _needed(original: Original | None, missing: Sequence[StackEntry]) -> str:
    if original is None:
        return "its base (--base)"
    names = ", ".join(f"{entry.concept} ({entry.digest[:12]})" for entry in missing)
    return f"the patches of what is in it ({names})"
