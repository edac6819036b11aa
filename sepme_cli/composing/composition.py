"""A checkpoint about to be composed: which weights, which increments on them, which record."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.compose import cast_once
from patch_spec.header import Header, TensorEntry
from patch_spec.increment import Increment
from patch_spec.stack import StackEntry, StackRecord
from patch_spec.streams import network_of
from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.original import (
    Original,
    Weight,
    open_base,
    open_undo_journals,
)
from sepme_cli.checkpoints.reading.patches import PatchFile, kept_patches
from sepme_cli.checkpoints.reading.targets import Target
from sepme_cli.checkpoints.reading.tensors import Stored, WeightsFile, dequantised, quantised
from sepme_cli.checkpoints.structure.dtypes import FP8, NAMES, numpy_dtype
from sepme_cli.checkpoints.structure.headers import in_dtype, same_but_record, with_record
from sepme_cli.checkpoints.structure.layers import WHOLE
from sepme_cli.checkpoints.writing.writer import Rewrite, Values
from sepme_cli.errors import MalformedError, MismatchError, UsageError
from sepme_cli.increments import Scaled, compose
from sepme_cli.places import Place
from sepme_cli.progress import Progress
from sepme_cli.version import __version__

Array = npt.NDArray[Any]
TOOL = f"sepme {__version__}"
_MOST_HIDDEN = 0.5
"""The share of fp8 weights that may stay where they are before a user is warned."""


@dataclass
class RoundingLoss:
    """How many fp8 weights should have moved, and how many of those rounding left in place.

    composed, idle: of all dtypes, how many tensors there were, and how many of them rounding left
    as they were.
    """

    meant: int = 0
    still: int = 0
    composed: int = 0
    idle: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, before: Array, exact: Array, after: Array) -> None:
        """Take one more tensor into account; several threads may."""
        start = before.astype(np.float64)
        meant = exact != start
        still = meant & (after.astype(np.float64) == start)
        with self._lock:
            self.meant += int(meant.sum())
            self.still += int(still.sum())

    def compare(self, before: Array, after: Array) -> None:
        """Whether one more tensor is what it was, in whatever dtype; several threads may."""
        # A row tells nearly always, and a model has hundreds of millions of weights.
        same = all(bool((old == new).all()) for old, new in zip(before, after, strict=True))
        with self._lock:
            self.composed += 1
            self.idle += same

    @property
    def warning(self) -> str | None:
        """What a user should know where most of an increment was lost."""
        if self.composed and self.idle == self.composed:
            return (
                "no weight changes: at this scale the increments are smaller than the rounding "
                "of every weight, and the concept remains"
            )
        if self.still <= _MOST_HIDDEN * self.meant:
            return None
        return (
            f"fp8 rounding hides part of the change: {self.still / self.meant:.0%} of the "
            "weights that should change do not, and the concept may remain; apply to a "
            "copy in fp16 or bf16, or write one with --dtype fp16"
        )


@dataclass(frozen=True)
class StoredPart:
    """A copy of a target or layer as it is stored. copy: which; see `Target.copies`."""

    target: Target
    copy: int
    stored: Stored


@dataclass(frozen=True)
class Composition:
    """What will be written, before any of it is.

    original: where the weights come from; None for the checkpoint's own. terms: the increments
    and scales to add to them. record: of the result. dtype: of the result's floating tensors, in
    the header's word; None for what each of them has. rounding_loss: filled in by writing.
    """

    checkpoint: Checkpoint
    original: Original | None
    terms: tuple[Scaled, ...] = field(repr=False)
    record: StackRecord | None
    dtype: str | None = None
    rounding_loss: RoundingLoss = field(default_factory=RoundingLoss)

    def rewrites(self) -> tuple[Rewrite, ...]:
        """The same for the writer, file by file. Values are read when they are written."""
        files = {file.place: file for file in self.checkpoint.patched_files}
        files |= {file.place: file for file in self._files_after}
        if self.dtype is not None:
            files |= {file.place: file for file in self.checkpoint.all_files()}
        return tuple(self._rewrite(file) for file in files.values())

    @cached_property
    def _files_after(self) -> tuple[WeightsFile, ...]:
        """Those that will have the record."""
        return self.checkpoint.files_with(self.record.layers if self.record is not None else ())

    @cached_property
    def _composed_weights(self) -> tuple[Target, ...]:
        """What is written anew: with an original all that a patch may have changed."""
        before = self.checkpoint.patched_layers if self.original is not None else ()
        acted = self.checkpoint.layers_of(part for part, _ in self.terms)
        layers = {layer.name: layer for layer in (*before, *acted)}
        targets = self.checkpoint.targets
        if self.original is None:
            targets = tuple(target for target in targets if self._acted_on(target))
        return (*targets, *layers.values())

    def _rewrite(self, file: WeightsFile) -> Rewrite:
        found = stored_in_file(file, self._composed_weights)
        replaced = {name: self._assembled(parts) for name, parts in found.items()}
        if self.dtype is not None:
            for entry in file.header.tensors:
                if entry.name not in replaced and entry.dtype in NAMES:
                    replaced[entry.name] = self._converted(file, entry, self.dtype)
        header, header_bytes = self._foundation(file)
        if self.dtype is not None:
            header, header_bytes = in_dtype(header, self.dtype)
        record = self.record if file in self._files_after else None
        header_bytes = with_record(header, header_bytes, record)
        return Rewrite(file, replaced, header_bytes, header.data_length, record is not None)

    def _acted_on(self, target: Target) -> bool:
        return any(increment.acts_on(target.name) for increment, _ in self.terms)

    def _assembled(self, parts: Sequence[StoredPart]) -> Values:
        def values() -> Array:
            def convert(whole: Array) -> Array:
                return whole if self.dtype is None else converted(whole, self.dtype, stored.name)

            stored = parts[0].stored
            return assembled(parts, self._composed, convert)

        return values

    def _composed(self, part: StoredPart) -> Array:
        target, stored = part.target, part.stored
        weight = self._source(part).read()
        if self.dtype is None and stored.dtype in FP8:
            return self._quantised(weight, target, stored)
        dtype = numpy_dtype(self.dtype or stored.dtype)
        result = compose(weight, self.terms, target.name, dtype)
        if self._acted_on(target):
            self.rounding_loss.compare(weight, result)
        return result

    def _source(self, part: StoredPart) -> Stored | Weight:
        """Where a weight is as it was before any patch: a layer that none in it changes is here."""
        name = part.target.name
        here = network_of(name) is not None and name not in self._layers_before
        if self.original is None or here:
            return part.stored
        return self.original.weight(name, part.copy)

    @property
    def _layers_before(self) -> Mapping[str, str]:
        return {} if self.checkpoint.stack is None else self.checkpoint.stack.layers

    def _quantised(self, weight: Array, target: Target, stored: Stored) -> Array:
        exact = compose(weight, self.terms, target.name, np.dtype(np.float64))
        scales = stored.scales()
        result = quantised(exact, scales, stored.dtype)
        self.rounding_loss.add(weight, exact, dequantised(result, scales))
        if not np.isfinite(result).all():
            raise MalformedError(
                f"the values of {target.name} do not fit into {NAMES[stored.dtype]}",
                file=stored.file.path,
                expected=f"magnitudes within the range of {NAMES[stored.dtype]}",
                found=float(np.abs(exact).max()),
            )
        return result

    def _converted(self, file: WeightsFile, entry: TensorEntry, dtype: str) -> Values:
        return lambda: converted(file.read(entry), dtype, entry.name)

    def _foundation(self, file: WeightsFile) -> tuple[Header, bytes]:
        """The header to build on: the base's own where that tells of the same file.

        So a record put in and taken out again leaves the base's bytes.
        """
        if self.original is not None:
            header, header_bytes = self.original.headers.get(file.place, (None, b""))
            if header is not None and same_but_record(header, file.header):
                return header, header_bytes
        return file.header, file.header_bytes


def stored_in_file(file: WeightsFile, targets: Iterable[Target]) -> dict[str, list[StoredPart]]:
    """The tensors of a file that hold these targets: by name, what of each they hold."""
    found: dict[str, list[StoredPart]] = {}
    for target in targets:
        for copy, stored in enumerate(target.copies):
            if stored.file is file:
                found.setdefault(stored.name, []).append(StoredPart(target, copy, stored))
    return found


def assembled(
    parts: Sequence[StoredPart],
    make: Callable[[StoredPart], Array],
    convert: Callable[[Array], Array] = lambda whole: whole,
) -> Array:
    """A tensor with these parts of it made anew, and all others as they are stored.

    convert: brings what is stored into the dtype of what is made.
    """
    if parts[0].stored.part == WHOLE:
        return make(parts[0])
    whole = np.array(convert(parts[0].stored.whole()))
    for part in parts:
        part.stored.part.put(make(part), whole)
    return whole


def converted(values: Array, dtype: str, name: str) -> Array:
    """A tensor in another dtype; MalformedError, named, where a number leaves its range."""
    wanted = numpy_dtype(dtype)
    # Only from float64 can a cast by way of float32 round twice.
    with np.errstate(over="ignore"):
        result = cast_once(values, wanted) if values.dtype.itemsize == 8 else values.astype(wanted)
    if np.isfinite(values).all() and not np.isfinite(result).all():
        raise MalformedError(
            f"the values of {name} do not fit into {NAMES[dtype]}",
            expected=f"magnitudes within the range of {NAMES[dtype]}",
            found=float(np.abs(values.astype(np.float64)).max()),
        )
    return result


@dataclass(frozen=True)
class Sources:
    """The patches at hand, each once: those given, and those kept beside the checkpoint."""

    files: tuple[PatchFile, ...]

    @classmethod
    def gather(cls, given: Iterable[PatchFile], checkpoint: Checkpoint) -> "Sources":
        """Those given, and those that in-place commands keep beside a patched checkpoint."""
        kept = kept_patches(checkpoint.path) if checkpoint.stack is not None else ()
        return cls(tuple({file.digest: file for file in (*kept, *given)}.values()))

    @cached_property
    def increments(self) -> Mapping[str, Increment]:
        """All increments, by digest."""
        return {part.digest: part for file in self.files for part in file.patch.increments}

    def terms(self, entries: Iterable[StackEntry]) -> tuple[Scaled, ...]:
        """The entries' increments and scales, of those that are at hand."""
        return tuple(
            (self.increments[entry.digest], entry.scale)
            for entry in entries
            if entry.digest in self.increments
        )

    def missing(self, entries: Iterable[StackEntry]) -> list[StackEntry]:
        """The entries whose increments are not at hand."""
        return [entry for entry in entries if entry.digest not in self.increments]

    def holding(self, entries: Iterable[StackEntry]) -> list[PatchFile]:
        """The patches that hold one of the entries."""
        wanted = {entry.digest for entry in entries}
        return [file for file in self.files if wanted & file.digests]

    def digests(self, record: StackRecord | None, entries: Sequence[StackEntry]) -> tuple[str, ...]:
        """The digests of the patch files that the entries came in, sorted.

        Files of the record that are not at hand may hold some, unless all are accounted for.
        """
        held = self.holding(entries)
        unknown: set[str] = set()
        if record is not None and self.missing(entries):
            unknown = set(record.patches) - {file.digest for file in self.files}
        return tuple(sorted(unknown | {file.digest for file in held}))


@contextmanager
def find_original(
    checkpoint: Checkpoint,
    base: Place | None,
    undo: Path | None,
    warn: Callable[[str], None],
    progress: Progress,
) -> Iterator[Original | None]:
    """The weights from before any patch: of `base`, of `undo`, of the journal beside, or None.

    What was named must do, or MismatchError says why; a journal that merely lies there is left
    alone with a warning if it does not.
    """
    record = checkpoint.stack
    assert record is not None  # only a patched checkpoint has an original
    if base is not None:
        with open_base(base, record, progress) as original:
            yield original
        return
    beside = {file.place: undo_path(file.path) for file in checkpoint.patched_files}
    with ExitStack() as stack:
        if undo is not None:
            if len(beside) > 1:
                raise UsageError(
                    f"{checkpoint.path} has an undo journal for each of its {len(beside)} files; "
                    "they are looked for beside them, so leave out --undo"
                )
            named = dict.fromkeys(beside, undo)
            yield stack.enter_context(open_undo_journals(checkpoint, named, record))
            return
        found = None
        if all(path.exists() for path in beside.values()):
            try:
                found = stack.enter_context(open_undo_journals(checkpoint, beside, record))
            except (MismatchError, MalformedError) as error:
                warn(f"the undo journal is of no use here: {error.message}")
        yield found
