"""Is what a patch or a patched checkpoint says of itself true."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from patch_spec.digest import tensor_fingerprint
from patch_spec.errors import FormatError
from patch_spec.increment import Increment
from sepme_cli.arguments import FilePath, PlaceLike, Places, as_path, as_place, as_places
from sepme_cli.checkpoints.hub.cache import fetch_beside, local
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.copies import unpatched_copies
from sepme_cli.checkpoints.reading.kinds import kind_of
from sepme_cli.checkpoints.reading.patches import PatchFile, read_patch_file
from sepme_cli.checkpoints.reading.targets import Target
from sepme_cli.checkpoints.reading.tensors import Stored
from sepme_cli.checkpoints.structure.gguf import QUANTISED
from sepme_cli.checkpoints.structure.layers import WHOLE
from sepme_cli.checkpoints.writing.writer import Rewrite
from sepme_cli.composing.comparison import same_but_rounding, same_bytes, tensors_by_name
from sepme_cli.composing.composition import (
    Composition,
    Sources,
    StoredPart,
    assembled,
    find_original,
    stored_in_file,
)
from sepme_cli.composing.matching import fit
from sepme_cli.errors import MismatchError, UnsupportedError, UsageError
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Progress
from sepme_cli.recipe import as_recipe
from sepme_cli.signing.sidecar import sidecar
from sepme_cli.verifying.patch import Check, kept_on, made_by
from sepme_cli.verifying.signatures import Trust, signatures_of
from sepme_cli.verifying.statement import statement_checks


@dataclass(frozen=True)
class VerifyResult:
    """Result of `verify`.

    Attributes:
        ok: Whether all checks passed.
        checks: Each check: its name, whether it passed, and details.
        unchecked: What was not checked, and what is needed to check it.
        seconds: Duration.
    """

    ok: bool
    checks: tuple[Check, ...]
    unchecked: tuple[str, ...]
    seconds: float


def verify(
    files: Places,
    *,
    base: PlaceLike | None = None,
    model: PlaceLike | None = None,
    recipe: FilePath | None = None,
    statement: FilePath | None = None,
    allowed_signers: FilePath | None = None,
    signed_by: str | None = None,
    progress: Progress = SILENT,
) -> VerifyResult:
    """Check patches; or a checkpoint, and the patches in it.

    With the base or the undo journal, and with the patches, every byte of the checkpoint is
    compared with what base and patches give.

    Args:
        files: Patches; or a checkpoint and patches.
        base: The checkpoint's original, from before any patch; by default the undo journal beside
            it.
        model: Model that the patches were made from: compute their leakage again.
        recipe: Recipe that each patch must have been made by.
        statement: Statement about the checkpoint, that must be true.
        allowed_signers: File with the keys that may sign (as for git and ssh-keygen): require a
            signature of every file. The statement's counts for its checkpoint.
        signed_by: Identity in `allowed_signers` that must have signed.
        progress: Receives progress and warnings.

    Returns:
        Every check and whether it passed.

    Raises:
        UsageError: There are two checkpoints, or `model`, `recipe`, `statement` or `signed_by`
            without what it is about.
        MalformedError: A file is so damaged that it cannot be checked.
        UnsupportedError: A file is of a kind that is not supported.
        SystemFailure: A file cannot be read.
    """
    started = time.monotonic()
    named = as_places(files)
    if not named:
        raise UsageError("name a patch, or a checkpoint and the patches in it")
    paths = [local(place, progress) for place in named]
    kinds = [kind_of(path) for path in paths]
    if "undo" in kinds:
        raise UnsupportedError(
            f"{paths[kinds.index('undo')]} is an undo journal",
            file=paths[kinds.index("undo")],
            expected="checkpoints and patches",
            found="an undo journal",
        )
    models = [path for path, kind in zip(paths, kinds, strict=True) if kind == "checkpoint"]
    patches = [read_patch_file(p) for p, k in zip(paths, kinds, strict=True) if k == "patch"]
    if len(models) > 1 or (base is not None and not models):
        raise UsageError("one checkpoint at a time, and its base with it", found=len(models))
    if not patches and (model is not None or recipe is not None):
        raise UsageError("--model and --recipe are for patches: name one")
    if statement is not None and not models:
        raise UsageError("--statement is about a checkpoint: name it")
    trust = Trust(as_path(allowed_signers), signed_by)
    unchecked: list[str] = []
    checks = [check for file in patches for check in _patch(file)]
    if trust.allowed is not None:
        for place, path in zip(named, paths, strict=True):
            fetch_beside(place, path, sidecar(path).name, progress)
    stated = [] if statement is None else [as_path(statement)]
    checks += signatures_of([*paths, *stated], models[0] if stated else None, trust, unchecked)
    if recipe is not None:
        policy = as_recipe(recipe)
        checks += [check for file in patches for check in made_by(file, policy)]
    if model is not None:
        checks += kept_on(as_place(model), patches, unchecked, progress)
    if models:
        with open_checkpoint(models[0], progress) as checkpoint:
            if statement is not None:
                checks += statement_checks(as_path(statement), checkpoint, patches, progress)
            checks += _checkpoint(checkpoint, patches, as_place(base), unchecked, progress)
    return VerifyResult(
        all(check.ok for check in checks),
        tuple(checks),
        tuple(unchecked),
        time.monotonic() - started,
    )


def _patch(file: PatchFile) -> Iterator[Check]:
    """Reading it has held it to every rule of the format; what is left is to say so."""
    parts = file.patch.increments
    ranks = ", ".join(f"{part.concept} ({_extent(part)})" for part in parts)
    yield Check(f"{file.name}: format", True, f"version 1, digest {file.digest}")
    yield Check(f"{file.name}: factors", True, f"finite and on the grid: {ranks}")


def _extent(part: Increment) -> str:
    if part.kind == "mask":
        return f"{sum(mask.count for mask in part.masks.values())} weights become zero"
    return f"rank {part.rank}"


def _checkpoint(
    checkpoint: Checkpoint,
    patches: Sequence[PatchFile],
    base: Place | None,
    unchecked: list[str],
    progress: Progress,
) -> Iterator[Check]:
    yield _finite(checkpoint, progress)
    for file in patches:
        yield _fits(checkpoint, file)
    if checkpoint.stack is None:
        yield from _unpatched(checkpoint, patches, base, unchecked, progress)
        return
    entries = checkpoint.stack.entries
    names = ", ".join(entry.concept for entry in entries)
    yield Check("record", True, f"{names}, by {checkpoint.stack.tool}")
    yield _copies(checkpoint)
    present = {entry.digest for entry in entries}
    for file in patches:
        missing = [p.concept for p in file.patch.increments if p.digest not in present]
        detail = (
            f"not in the checkpoint: {', '.join(missing)}"
            if missing
            else "all of it is in the checkpoint"
        )
        yield Check(f"{file.name}: applied", not missing, detail)
    sources = Sources.gather(patches, checkpoint)
    unknown = [entry.concept for entry in sources.missing(entries)]
    with ExitStack() as stack:
        try:
            original = stack.enter_context(
                find_original(checkpoint, base, None, unchecked.append, progress)
            )
        except MismatchError as error:
            yield Check("base", False, error.message)
            return
        if original is None:
            unchecked.append("the weights themselves: that takes the base (--base)")
            return
        yield Check("base", True, f"digest {original.base.digest}, {original.path}")
        if unknown:
            need = ", ".join(unknown)
            unchecked.append(f"the weights themselves: that takes the patches of {need} too")
        else:
            known = original.base.targets.keys() | checkpoint.stack.layers.keys()
            there = {layer.name for layer in checkpoint.patched_layers}
            if lacking := known - checkpoint.by_name.keys() - there:
                detail = f"without {', '.join(sorted(lacking)[:3])}, which the base has"
                yield Check("weights", False, detail)
                return
            terms = sources.terms(entries)
            composition = Composition(checkpoint, original, terms, checkpoint.stack)
            yield _weights(composition.rewrites(), progress)
    if base is not None:
        with open_checkpoint(base, progress) as other:
            yield from _rest(checkpoint, other, unchecked, progress)


def _unpatched(
    checkpoint: Checkpoint,
    patches: Sequence[PatchFile],
    base: Place | None,
    unchecked: list[str],
    progress: Progress,
) -> Iterator[Check]:
    for file in patches:
        yield Check(f"{file.name}: applied", False, "no patch is recorded in the checkpoint")
    yield Check("record", True, "none: no patch is recorded")
    if base is not None:
        with open_checkpoint(base, progress) as other:
            same = checkpoint.base().digest == other.base().digest
            yield Check("base", same, "the same weights" if same else "other weights")
            yield from _rest(checkpoint, other, unchecked, progress)


def _finite(checkpoint: Checkpoint, progress: Progress) -> Check:
    targets = (*checkpoint.targets, *checkpoint.patched_layers)
    progress.stage("reading the weights", len(targets))
    bad = []
    for target in targets:
        for copy in target.copies:
            try:
                tensor_fingerprint(copy.read())
            except FormatError:
                bad.append(copy.name)
        progress.advance()
    detail = f"not finite: {', '.join(bad[:3])}" if bad else f"{len(targets)} targets"
    return Check("finite", not bad, detail)


def _fits(checkpoint: Checkpoint, file: PatchFile) -> Check:
    try:
        found = fit(checkpoint, [file])
    except MismatchError as error:
        return Check(f"{file.name}: fits", False, f"{error.expected}, found {error.found}")
    detail = "; ".join(found.warnings) or checkpoint.title
    return Check(f"{file.name}: fits", not found.unreached, detail)


def _copies(checkpoint: Checkpoint) -> Check:
    """Whether other weights of a UNet, in the file or its folder, are as they were."""
    beside: list[str] = []
    if checkpoint.folder is not None:
        unpatched = unpatched_copies(checkpoint.folder, checkpoint.stack)
        beside = [checkpoint.folder.place(path) for path in unpatched]
    found = [*checkpoint.further, *beside]
    detail = f"unpatched: {', '.join(found[:3])}" if found else "none is unpatched"
    return Check("other copies", not found, detail)


def _weights(rewrites: Sequence[Rewrite], progress: Progress) -> Check:
    """Whether what composing would write is what is there."""
    total = sum(len(rewrite.replaced) for rewrite in rewrites)
    progress.stage("composing", total)
    different = [name for rewrite in rewrites for name in _different(rewrite, progress)]
    told = f"{len(different)} of {total} differ from base and patches: "
    detail = told + ", ".join(different[:3]) if different else f"all {total}, to the last bit"
    return Check("weights", not different, detail)


def _different(rewrite: Rewrite, progress: Progress) -> Iterator[str]:
    file = rewrite.source
    for entry, value in zip(rewrite.touched, rewrite.values(), strict=True):
        if value != file.read_range(entry.begin, entry.end, entry.name):
            yield entry.name
        progress.advance()


def _partly_different(targets: Sequence[Target], base: Checkpoint) -> Iterator[str]:
    """The tensors of which a patch changes a part, where the rest of them is not the base's."""
    for file in {copy.file.place: copy.file for t in targets for copy in t.copies}.values():
        for name, parts in stored_in_file(file, targets).items():
            if parts[0].stored.part != WHOLE and not _same_beside(parts, base):
                yield name


def _same_beside(parts: Sequence[StoredPart], base: Checkpoint) -> bool:
    """Whether a tensor is the base's but for parts of it; one that the base has in another shape
    or dtype is not compared."""
    originals: dict[str, Stored] = {}
    for part in parts:
        found = base.weight(part.target.name)
        if found is None or part.copy >= len(found.copies):
            return True
        stored, own = found.copies[part.copy], part.stored
        if (stored.dtype, stored.entry.shape) != (own.dtype, own.entry.shape):
            return True
        originals[part.target.name] = stored

    def restored(part: StoredPart) -> npt.NDArray[Any]:
        stored = originals[part.target.name]
        return stored.part.of(stored.whole())

    whole = originals[parts[0].target.name].whole()
    return assembled(parts, restored).tobytes() == whole.tobytes()


def _rest(
    checkpoint: Checkpoint, base: Checkpoint, unchecked: list[str], progress: Progress
) -> Iterator[Check]:
    """Whether the tensors that no patch in it touches are the base's: byte for byte, or of another
    dtype up to its rounding. What is quantised otherwise than in the base is not compared."""
    targets = checkpoint.targets if checkpoint.stack is not None else ()
    targets = (*targets, *checkpoint.patched_layers)
    touched = {copy.name for target in targets for copy in target.copies}
    ours, theirs = tensors_by_name(checkpoint), tensors_by_name(base)
    if ours.keys() != theirs.keys():
        unchecked.append(
            "tensors that no patch changes: the base has other tensors, or other names"
        )
        return
    names = [name for name, stored in ours.items() if stored.name not in touched]
    progress.stage("comparing", len(names))
    different, converted, unknown = list(_partly_different(targets, base)), 0, 0
    for name in names:
        one, other = ours[name], theirs[name]
        if same_bytes(one, other):
            pass
        elif same_but_rounding(one, other):
            converted += 1
        elif one.shape == other.shape and QUANTISED & ({one.dtype} ^ {other.dtype}):
            unknown += 1  # perhaps of one model, before it was quantised and after
        else:
            different.append(name)
        progress.advance()
    if unknown:
        unchecked.append(
            f"{unknown} tensors that no patch changes: quantised otherwise in the base"
        )
    told = f"differ from the base's: {', '.join(different[:3])}"
    kept = f"{len(names) - unknown - converted} tensors, byte for byte the base's"
    if converted:
        kept += f"; {converted} in another dtype, the same but for its rounding"
    yield Check("the rest", not different, told if different else kept)
