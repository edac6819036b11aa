"""Taking increments off weights that were rounded with them in: near the original, never exact."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any

import numpy.typing as npt

from patch_spec.stack import StackEntry, StackRecord
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.structure.headers import with_record
from sepme_cli.checkpoints.writing.writer import Rewrite, Values
from sepme_cli.composing.composition import Sources, StoredPart, assembled, stored_in_file
from sepme_cli.errors import RefusedError
from sepme_cli.increments import Scaled, rounding_bound, subtract


@dataclass
class LargestError:
    """The largest error so far; None once one could not be bounded."""

    largest: float | None = 0.0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, error: float | None) -> None:
        """Take one more into account; several threads may."""
        with self._lock:
            known = self.largest is not None and error is not None
            self.largest = max(self.largest or 0.0, error or 0.0) if known else None


def measured(rewrite: Rewrite, error: LargestError) -> Rewrite:
    """The same rewrite, noting how far a base in another dtype may put each tensor off."""

    def noted(values: Values) -> Values:
        def make() -> npt.NDArray[Any]:
            result = values()
            error.add(rounding_bound(result))
            return result

        return make

    replaced = {name: noted(values) for name, values in rewrite.replaced.items()}
    return replace(rewrite, replaced=replaced)


def subtraction(
    checkpoint: Checkpoint,
    sources: Sources,
    taken: tuple[StackEntry, ...],
    remaining: tuple[StackEntry, ...],
    after: StackRecord | None,
    error: LargestError,
) -> tuple[Rewrite, ...]:
    """The checkpoint without the entries `taken`, taken off from what is there.

    after: the record it then has. error is filled in as the tensors are made. Raises RefusedError
    if the increments to take off are not at hand, or one of them is a mask.
    """
    if missing := sources.missing(taken):
        names = ", ".join(f"{entry.concept} ({entry.digest[:12]})" for entry in missing)
        raise RefusedError(
            f"{checkpoint.path}: to revert it, the base or the patches of {names} are "
            "needed; nothing was changed",
            file=checkpoint.path,
            expected="--base, --undo, or the patch files",
            found="neither",
        )
    out, stay = sources.terms(taken), sources.terms(remaining)
    if masks := ", ".join(part.concept for part, _ in out if part.kind == "mask"):
        raise RefusedError(
            f"{checkpoint.path}: {masks} made weights zero, and what they were is not in the "
            "checkpoint any more; give its base (--base); nothing was changed",
            file=checkpoint.path,
            expected="--base, or --undo, and the patches of what stays in",
            found="neither",
        )
    layers = checkpoint.layers_of(part for part, _ in out)
    weights = (*checkpoint.targets, *layers)
    if any(copy.scale for target in weights for copy in target.copies):
        raise RefusedError(
            f"{checkpoint.path}: scaled fp8 cannot be subtracted from; nothing was changed",
            file=checkpoint.path,
            expected="--base, or --undo",
            found="neither",
        )
    # What an unknown operator made of the weights cannot be told from the weights.
    bounded = len(stay) == len(remaining) or all(part.kind != "operator" for part, _ in out)

    acted = [target for target in weights if _acts(out, target.name)]

    def subtracted(part: StoredPart) -> npt.NDArray[Any]:
        result, bound = subtract(part.stored.read(), out, stay, part.target.name)
        error.add(bound if bounded else None)
        return result

    return tuple(
        Rewrite(
            file,
            {
                name: partial(assembled, parts, subtracted)
                for name, parts in stored_in_file(file, acted).items()
            },
            with_record(file.header, file.header_bytes, after),
            file.header.data_length,
            after is not None,
        )
        for file in checkpoint.patched_files
    )


def _acts(terms: Sequence[Scaled], target: str) -> bool:
    return any(part.acts_on(target) for part, _ in terms)
