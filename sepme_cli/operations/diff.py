"""Compare two checkpoints, two patches, or a checkpoint and a patch."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from patch_spec.increment import Increment
from sepme_cli.arguments import PlaceLike, as_place
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.kinds import kind_of
from sepme_cli.checkpoints.reading.patches import PatchFile, read_patch_file
from sepme_cli.composing.comparison import (
    TensorDifference,
    compare_targets,
    compare_tensors,
    measure_change,
    measure_masked,
    tensors_by_name,
)
from sepme_cli.composing.matching import BaseMatch, fit, split_applied
from sepme_cli.errors import UnsupportedError
from sepme_cli.increments import compose, distance, factors, interference
from sepme_cli.progress import SILENT, Collector, Progress

Status = Literal["same", "changed", "only in a", "only in b", "applied", "not applied"]


@dataclass(frozen=True)
class IncrementDifference:
    """One concept's increment. distance: |dW_a - dW_b| / |dW_b| where both have one to compare."""

    concept: str
    slug: str
    digest: str
    status: Status
    distance: float | None = None


@dataclass(frozen=True)
class DiffResult:
    """Result of `diff`.

    Attributes:
        kind: "checkpoints", "patches" or "checkpoint and patch".
        same: Whether nothing differs; for a checkpoint and a patch, whether the patch is applied.
        changed: Number of tensors (of patches: increments) that differ.
        tensors: Tensors that differ between the checkpoints, or that the patch would change.
        only_in_a: Names of tensors or concepts that only the first has.
        only_in_b: Names that only the second has.
        increments: For patches: how the increments compare.
        interference: For patches: the share of an increment of the first (rows) that acts on a
            concept of the second (columns), 0 to 1.
        metadata: Keys of metadata that differ between the checkpoints.
        base_match: For a checkpoint and a patch: "exact", "same-values" or "family".
        warnings: All warnings of the run.
        seconds: Duration.
    """

    kind: Literal["checkpoints", "patches", "checkpoint and patch"]
    same: bool
    changed: int
    tensors: tuple[TensorDifference, ...] = ()
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    increments: tuple[IncrementDifference, ...] = ()
    interference: Mapping[str, Mapping[str, float]] | None = None
    metadata: tuple[str, ...] = ()
    base_match: BaseMatch | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def diff(a: PlaceLike, b: PlaceLike, *, progress: Progress = SILENT) -> DiffResult:
    """Compare two checkpoints, two patches, or a checkpoint and a patch (in either order).

    Args:
        a: The first: a file, a folder, or a place on the hub.
        b: The second.
        progress: Receives progress and warnings.

    Returns:
        What differs.

    Raises:
        MismatchError: The patch is for another kind of model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: A file is of a kind that is not supported.
        SystemFailure: A file cannot be read.
    """
    started, progress = time.monotonic(), Collector(progress)
    a, b = (local(as_place(place), progress) for place in (a, b))
    kinds = (kind_of(a), kind_of(b))
    if "undo" in kinds:
        journal = a if kinds[0] == "undo" else b
        raise UnsupportedError(
            f"{journal} is an undo journal",
            file=journal,
            expected="checkpoints and patches",
            found="an undo journal",
        )
    with ExitStack() as stack:
        patches = [read_patch_file(p) for p, k in zip((a, b), kinds, strict=True) if k == "patch"]
        checkpoints = [
            stack.enter_context(open_checkpoint(path, progress))
            for path, kind in zip((a, b), kinds, strict=True)
            if kind == "checkpoint"
        ]
        if len(patches) == 2:
            result = _patches(*patches)
        elif len(checkpoints) == 2:
            result = _checkpoints(checkpoints[0], checkpoints[1], progress)
        else:
            result = _checkpoint_and_patch(checkpoints[0], patches[0], progress)
    seconds = time.monotonic() - started
    return replace(result, seconds=seconds, warnings=progress.warnings)


def _checkpoints(a: Checkpoint, b: Checkpoint, progress: Progress) -> DiffResult:
    if (a.folder is None, a.layout.naming) != (b.folder is None, b.layout.naming):
        return _targets_only(a, b, progress)
    names = tensors_by_name(a).keys(), tensors_by_name(b).keys()
    tensors = tuple(compare_tensors(a, b, progress))
    only = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    keys = a.metadata.keys() | b.metadata.keys()
    return DiffResult(
        kind="checkpoints",
        same=not (tensors or only[0] or only[1]),
        changed=len(tensors),
        tensors=tensors,
        only_in_a=tuple(only[0]),
        only_in_b=tuple(only[1]),
        metadata=tuple(sorted(k for k in keys if a.metadata.get(k) != b.metadata.get(k))),
    )


def _targets_only(a: Checkpoint, b: Checkpoint, progress: Progress) -> DiffResult:
    tensors = tuple(compare_targets(a, b, progress))
    only = sorted(a.by_name.keys() - b.by_name.keys()), sorted(b.by_name.keys() - a.by_name.keys())
    progress.warn(
        "the files name their tensors differently: only the weights that patches "
        "change were compared"
    )
    return DiffResult(
        kind="checkpoints",
        same=not (tensors or only[0] or only[1]),
        changed=len(tensors),
        tensors=tensors,
        only_in_a=tuple(only[0]),
        only_in_b=tuple(only[1]),
    )


def _patches(a: PatchFile, b: PatchFile) -> DiffResult:
    ours = {part.concept: part for part in a.patch.increments}
    theirs = {part.concept: part for part in b.patch.increments}
    increments = tuple(
        _compared(ours.get(concept), theirs.get(concept))
        for concept in dict.fromkeys([*ours, *theirs])
    )
    changed = sum(part.status == "changed" for part in increments)
    return DiffResult(
        kind="patches",
        same=all(part.status == "same" for part in increments),
        changed=changed,
        only_in_a=tuple(concept for concept in ours if concept not in theirs),
        only_in_b=tuple(concept for concept in theirs if concept not in ours),
        increments=increments,
        interference={
            mine.concept: {other.concept: interference(mine, other) for other in theirs.values()}
            for mine in ours.values()
        },
    )


def _compared(a: Increment | None, b: Increment | None) -> IncrementDifference:
    part = a or b
    assert part is not None  # a concept is in one of the two
    status: Status = "changed"
    apart = None
    if a is None or b is None:
        status = "only in b" if a is None else "only in a"
    else:
        status = "same" if a.digest == b.digest else "changed"
        apart = distance(a, b)
    return IncrementDifference(part.concept, part.slug, part.digest, status, apart)


def _checkpoint_and_patch(
    checkpoint: Checkpoint, file: PatchFile, progress: Progress
) -> DiffResult:
    parts = file.patch.increments
    found = fit(checkpoint, [file]).compared(checkpoint)
    progress.warn_all(found.warnings)
    missing, _ = split_applied(checkpoint, parts)
    wanted = {part.digest for part in missing}
    tensors = tuple(_changes(checkpoint, missing, progress))
    return DiffResult(
        kind="checkpoint and patch",
        same=not missing,
        changed=len(tensors),
        tensors=tensors,
        increments=tuple(
            IncrementDifference(
                part.concept,
                part.slug,
                part.digest,
                "not applied" if part.digest in wanted else "applied",
            )
            for part in parts
        ),
        base_match=found.match,
    )


def _changes(
    checkpoint: Checkpoint, parts: Sequence[Increment], progress: Progress
) -> list[TensorDifference]:
    """What the increments would add to each weight that is stored now."""
    layers = checkpoint.layers_of(parts)
    targets = (*checkpoint.targets, *layers)
    acted = [t for t in targets if any(part.acts_on(t.name) for part in parts)]
    progress.stage("comparing", len(acted))
    changes = []
    for target in acted:
        weight = target.read()
        acting = [part for part in parts if part.acts_on(target.name)]
        stored = target.copies[0]
        # A fused matrix is several layers, and has one name.
        name = stored.name if stored.part.rows is None else target.name
        if any(part.kind == "mask" for part in acting):
            terms = [(part, 1.0) for part in acting]
            patched = compose(weight, terms, target.name, np.dtype(np.float64))
            changes.append(measure_masked(name, weight, patched))
        else:
            found = [factors(part, target.name, weight) for part in acting]
            changes.append(measure_change(name, weight, found))
        progress.advance()
    return changes
