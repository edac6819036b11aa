"""Where the weights from before any patch come from: the base's own file, or the undo journal."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.base import Base
from patch_spec.digest import tensor_fingerprint
from patch_spec.header import Header
from patch_spec.stack import StackRecord
from sepme_cli.checkpoints.journals.undo import Journal, open_undo
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.targets import Target, base_of
from sepme_cli.checkpoints.reading.tensors import Stored, dequantised
from sepme_cli.checkpoints.structure.dtypes import numpy_dtype
from sepme_cli.checkpoints.structure.headers import RECORD
from sepme_cli.errors import MismatchError
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Progress

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Weight:
    """A copy of a target as it was before any patch; see `Stored`."""

    stored: Stored
    journal: Journal | None = None

    @property
    def dtype(self) -> str:
        """As the header says it: "F16"."""
        if self.journal is None:
            return self.stored.dtype
        return self.journal.header.by_name[self.stored.name].dtype

    def read(self) -> Array:
        """The values, as `Stored.read` gives them."""
        if self.journal is None:
            return self.stored.read()
        return dequantised(self.stored.part.of(self.whole()), self.stored.scales())

    def whole(self) -> Array:
        """All of the tensor, as it is stored."""
        if self.journal is None:
            return self.stored.whole()
        data = self.journal.read_bytes(self.stored.name)
        return np.frombuffer(data, numpy_dtype(self.dtype)).reshape(self.stored.entry.shape)


@dataclass(frozen=True)
class Original:
    """A checkpoint's targets before any patch, and the layers that patches in it change, known to
    be those of the base that its record names.

    base: what a patch made from it says of it. headers: those of the base's files, parsed and as
    they are, by the files' places.
    """

    path: Path
    base: Base
    headers: Mapping[str, tuple[Header, bytes]] = field(repr=False)
    weights: Mapping[str, tuple[Weight, ...]] = field(repr=False)

    def weight(self, name: str, copy: int) -> Weight:
        """Copy 0 (the weight) or a later one (see `Target.copies`); MismatchError if not here."""
        copies = self.weights.get(name, ())
        if copy >= len(copies):
            raise MismatchError(
                f"{self.path} lacks {'a further copy (EMA, variant) of ' if copy else ''}{name}, "
                "which the checkpoint has",
                file=self.path,
            )
        return copies[copy]


@contextmanager
def open_base(place: Place, record: StackRecord, progress: Progress = SILENT) -> Iterator[Original]:
    """The base's file as the original of a checkpoint with this stack record.

    Raises as `open_checkpoint` does, and MismatchError if it is not that base.
    """
    with open_checkpoint(place, progress) as checkpoint:
        path = checkpoint.path
        if checkpoint.stack is not None:
            raise MismatchError(
                f"{path} is patched itself, so it cannot be a base",
                file=path,
                expected="a checkpoint as it was before any patch",
                found=", ".join(entry.concept for entry in checkpoint.stack.entries),
            )
        layers = checkpoint.found_layers(sorted(record.layers))
        files = (*checkpoint.files, *checkpoint.files_with(record.layers))
        yield _verified(
            Original(
                path,
                checkpoint.base(),
                {file.place: (file.header, file.header_bytes) for file in files},
                {
                    target.name: tuple(Weight(copy) for copy in target.copies)
                    for target in (*checkpoint.targets, *layers)
                },
            ),
            record,
        )


@contextmanager
def open_undo_journals(
    checkpoint: Checkpoint, paths: Mapping[str, Path], record: StackRecord
) -> Iterator[Original]:
    """Undo journals as the original of a checkpoint, or of one with the same tensors.

    paths: for every file that has the stack record, by its place, its journal.
    Raises MalformedError, SystemFailure, and MismatchError if they belong to another base, or
    keep a state that was itself patched.
    """
    with ExitStack() as stack:
        journals = {place: stack.enter_context(open_undo(path)) for place, path in paths.items()}
        for journal in journals.values():
            if RECORD in journal.header.metadata:
                raise MismatchError(
                    f"{journal.path} holds a checkpoint that was already patched", file=journal.path
                )
        path = next(iter(paths.values()))
        weights = {
            target.name: tuple(_kept(copy, journals) for copy in target.copies)
            for target in (*checkpoint.targets, *checkpoint.found_layers(sorted(record.layers)))
        }

        def read(target: Target) -> Array:
            return weights[target.name][0].read()

        yield _verified(
            Original(
                path,
                base_of(checkpoint.family, checkpoint.targets, read, path, {}),
                {place: (found.header, found.header_bytes) for place, found in journals.items()},
                weights,
            ),
            record,
        )


def _kept(copy: Stored, journals: Mapping[str, Journal]) -> Weight:
    journal = journals[copy.file.place]
    kept = {entry.name: entry for entry in journal.touched}.get(copy.name)
    if kept is None or kept.shape != copy.entry.shape:
        raise MismatchError(
            f"{journal.path} does not have {copy.name} in the checkpoint's shape",
            file=journal.path,
            expected=list(copy.entry.shape),
            found="nothing" if kept is None else list(kept.shape),
        )
    return Weight(copy, journal)


def _verified(original: Original, record: StackRecord) -> Original:
    for name, expected in record.layers.items():
        found = tensor_fingerprint(original.weight(name, 0).read())
        if found != expected:
            raise MismatchError(
                f"{original.path} is not the base that this checkpoint was patched from: its "
                f"{name} is another",
                file=original.path,
                expected=expected,
                found=found,
            )
    if original.base.digest != record.base:
        raise MismatchError(
            f"{original.path} is not the base that this checkpoint was patched from",
            file=original.path,
            expected=record.base,
            found=original.base.digest,
        )
    return original
