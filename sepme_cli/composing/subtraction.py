"""Taking increments off weights that were rounded with them in: near the original, never exact."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy.typing as npt

from patch_spec.stack import StackEntry, StackRecord
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.tensors import Stored
from sepme_cli.checkpoints.structure.headers import with_record
from sepme_cli.checkpoints.writing.writer import Rewrite, Values
from sepme_cli.composing.composition import Sources
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
    return Rewrite(rewrite.source, replaced, rewrite.header_bytes, rewrite.size)


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
    if the increments to take off are not at hand.
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
    if any(copy.scale for target in checkpoint.targets for copy in target.copies):
        raise RefusedError(
            f"{checkpoint.path}: scaled fp8 cannot be subtracted from; nothing was changed",
            file=checkpoint.path,
            expected="--base, or --undo",
            found="neither",
        )
    out, stay = sources.terms(taken), sources.terms(remaining)
    # What an unknown operator made of the weights cannot be told from the weights.
    bounded = len(stay) == len(remaining) or all(part.kind != "operator" for part, _ in out)

    def values(target: str, stored: Stored) -> Values:
        def make() -> npt.NDArray[Any]:
            result, bound = subtract(stored.read(), out, stay, target)
            error.add(bound if bounded else None)
            return result if stored.columns is None else stored.joined(result, stored.whole())

        return make

    return tuple(
        Rewrite(
            file,
            {
                stored.name: values(target.name, stored)
                for target in checkpoint.targets
                if _acts(out, target.name)
                for stored in target.copies
                if stored.file is file
            },
            with_record(file.header, file.header_bytes, after),
            file.header.data_length,
        )
        for file in checkpoint.target_files
    )


def _acts(terms: Sequence[Scaled], target: str) -> bool:
    return any(part.acts_on(target) for part, _ in terms)
