"""Opening a checkpoint, in whatever shape it comes: its headers parsed and understood."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from patch_spec.base import Base
from patch_spec.increment import Increment
from patch_spec.stack import StackRecord
from patch_spec.streams import Stream
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.journals.in_place import undo_if_interrupted
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.checkpoints.reading.gguf import GgufFile
from sepme_cli.checkpoints.reading.layers import Layers
from sepme_cli.checkpoints.reading.networks import Network, Networks, open_set
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.targets import (
    Target,
    about,
    base_of,
    find_targets,
    fingerprint,
    widths_of,
)
from sepme_cli.checkpoints.reading.tensors import Stored, WeightsFile, stored_in
from sepme_cli.checkpoints.reading.text_encoders import text_encoder_fingerprints
from sepme_cli.checkpoints.structure.detection import detect
from sepme_cli.checkpoints.structure.dtypes import readable
from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.folders import ModelFolder, model_folder, weights_sets
from sepme_cli.checkpoints.structure.headers import RECORD
from sepme_cli.checkpoints.structure.layout import Layout, keys_and_values, text_entries
from sepme_cli.errors import MalformedError
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; close it, or use it as a context manager.

    files: those that the denoiser is in, of every variant. widths: d of each stream that it
    reads. targets: sorted by name, at least one. stack: what patches are in it, None for none.
    folder: None for a single file.
    """

    path: Path
    files: tuple[WeightsFile, ...]
    family: Family
    layout: Layout
    widths: Mapping[Stream, int]
    targets: tuple[Target, ...] = field(repr=False)
    stack: StackRecord | None
    networks: Networks = field(repr=False)
    layers: Layers = field(repr=False)
    folder: ModelFolder | None
    _open: ExitStack = field(repr=False, compare=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts of the `__metadata__` of the (first) file."""
        return self.files[0].header.metadata

    @property
    def dtype(self) -> str:
        """Of the targets: "fp32", "fp16", "bf16", "fp64", "fp8_e4m3", or "mixed"."""
        dtypes = {copy.dtype for target in self.targets for copy in target.copies[:1]}
        scaled = " (scaled)" if any(target.copies[0].scale for target in self.targets) else ""
        return readable(dtypes.pop()) + scaled if len(dtypes) == 1 else "mixed"

    @property
    def arrangement(self) -> str:
        """How it comes: "single-file", "diffusers", or of a denoiser alone, "unet" or
        "transformer" and the naming; "GGUF" before that in such a file."""
        return f"GGUF {self._arrangement}" if self.is_gguf else self._arrangement

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, most of whose weights are quantised in blocks."""
        return isinstance(self.files[0], GgufFile)

    @property
    def _arrangement(self) -> str:
        if self.folder is not None and self.folder.denoiser != self.folder.path:
            return "diffusers"
        whole = self.layout.naming != "diffusers" and self.layout.outer is not None
        if whole and self.folder is None:
            return "single-file"
        return f"{self.family.denoiser} ({self.layout.naming})"

    @property
    def title(self) -> str:
        """What it is, in words: "Stable Diffusion 1.x, single-file, fp16"."""
        return f"{self.family.title}, {self.arrangement}, {self.dtype}"

    @property
    def width(self) -> int:
        """d of the text embedding."""
        return self.widths["tokens"]

    @cached_property
    def by_name(self) -> Mapping[str, Target]:
        """The targets by the names that patches give them."""
        return {target.name: target for target in self.targets}

    @cached_property
    def further(self) -> tuple[str, ...]:
        """What reads the text of other denoisers in its files, which patches do not reach."""
        reached = {copy.name for target in self.targets for copy in target.copies}
        reading_text = keys_and_values if self.family.denoiser == "unet" else text_entries
        found = {n for file in self.files for n in reading_text(file.header.by_name)}
        return tuple(sorted(found - reached))

    @cached_property
    def target_files(self) -> tuple[WeightsFile, ...]:
        """The files that hold targets; each carries the stack record."""
        return _holding(self.files, self.targets)

    @cached_property
    def patched_layers(self) -> tuple[Target, ...]:
        """The layers that the increments in it change."""
        names = () if self.stack is None else sorted(self.stack.layers)
        return self.found_layers(names)

    def layer(self, name: str) -> Target | None:
        """A layer by the name that patches give it, None where it is not in here; see `Layers`."""
        return self.layers.find(name)

    def weight(self, name: str) -> Target | None:
        """A target or a layer by the name that patches give it; None where it is not in here."""
        return self.by_name.get(name) or self.layer(name)

    def found_layers(self, names: Iterable[str]) -> tuple[Target, ...]:
        """Those of some layers that are in here."""
        return tuple(layer for name in names if (layer := self.layer(name)) is not None)

    def layers_of(self, increments: Iterable[Increment]) -> tuple[Target, ...]:
        """Those that some increments change and that are in here, in the order of their names."""
        return self.found_layers(sorted({name for part in increments for name in part.layers}))

    def files_with(self, layers: Iterable[str]) -> tuple[WeightsFile, ...]:
        """The files that carry the stack record where these layers are changed: those with targets,
        and those with the layers."""
        copies = (copy for layer in self.found_layers(layers) for copy in layer.copies)
        found = {file.place: file for file in (*self.target_files, *(copy.file for copy in copies))}
        return tuple(found.values())

    @cached_property
    def patched_files(self) -> tuple[WeightsFile, ...]:
        """The files that have the stack record, or would have that of a patch without layers."""
        return self.files_with(layer.name for layer in self.patched_layers)

    def fingerprint_of(self, layer: Target) -> str:
        """What a layer's weight was before any patch, as a fingerprint."""
        if layer.name not in self._fingerprints:
            self._fingerprints[layer.name] = fingerprint(layer, layer.read(), self.path)
        return self._fingerprints[layer.name]

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {} if self.stack is None else dict(self.stack.layers)

    def network(self, name: str) -> Network | None:
        """The network "denoiser", "vae" or a text encoder ("clip_l"); None if it is not in here."""
        return self.networks.find(name)

    def all_files(self) -> tuple[WeightsFile, ...]:
        """The files of every network that is in here."""
        for name in ("vae", *(spec.name for spec in self.family.text_encoders)):
            self.networks.find(name)
        return (*self.files, *(file for found in self.networks.opened.values() for file in found))

    def base(self, *, text_encoders: bool = False, layers: Iterable[str] = ()) -> Base:
        """What a patch made from this checkpoint says of it.

        text_encoders: fingerprint those too, which reads all of them. layers: those that the patch
        changes.
        """
        encoders = self.text_encoder_fingerprints() if text_encoders else {}
        base = base_of(self.family, self.targets, Target.read, self.path, encoders)
        return self.with_layers(base, layers)

    def with_layers(self, base: Base, layers: Iterable[str]) -> Base:
        """What a patch says of this checkpoint, and of these layers of it."""
        found = self.found_layers(sorted(layers))
        return replace(
            base,
            layers={layer.name: self.fingerprint_of(layer) for layer in found},
            layer_shapes={layer.name: layer.shape for layer in found},
        )

    def text_encoder_fingerprints(self) -> dict[str, str]:
        """Stream ("clip_l") to fingerprint, of the text encoders that are in here."""
        found = (self.network(spec.name) for spec in self.family.text_encoders)
        return text_encoder_fingerprints([network for network in found if network], self.path)


def open_checkpoint(place: Place, progress: Progress = SILENT) -> Checkpoint:
    """Open and understand a checkpoint. An in-place write that was cut short is undone first.

    place: a .safetensors or .ckpt file, a model folder, or the folder of its UNet, on this machine
    or on the hub.
    Raises SystemFailure (not there, not readable, busy), MalformedError (not safetensors,
    truncated, hostile) or UnsupportedError (another kind of model or file).
    """
    path = local(place, progress)
    while True:
        undo_if_interrupted(path, progress)
        try:
            checkpoint = _open(path, progress)
        except MalformedError:
            if not pending_path(path).exists():
                raise
        else:
            # While it is open nobody begins to write it, but somebody may have begun, and died,
            # since we looked.
            if not pending_path(path).exists():
                return checkpoint
            checkpoint.close()


def _open(path: Path, progress: Progress) -> Checkpoint:
    with ExitStack() as stack:
        with reading(path):
            folder = model_folder(path) if path.is_dir() else None
        if folder is not None:
            opened = [open_set(one, folder, stack) for one in weights_sets(folder.denoiser)]
            files = tuple(file for found, _ in opened for file in found)
            variants: Sequence[Mapping[str, Stored]] = [tensors for _, tensors in opened]
        else:
            files = (open_weights(path),)
            stack.callback(files[0].close)
            variants = [stored_in(files[0])]
        family, layout = detect_in(variants[0], path)
        networks = Networks(family, layout, variants[0], folder, stack, further=variants[1:])
        targets = find_targets(variants, layout, path, networks.columns)
        widths = widths_of({target.name: target.shape for target in targets})
        record = _stack(_holding(files, targets))
        layers = Layers(path, networks, None if record is None else record.to_metadata())
        if record is not None:
            _check_layers(layers, record)
        for note in _left_out(files):
            progress.say(note)
        if any(getattr(file, "unmapped", False) for file in files):
            progress.warn(
                f"{path}: this file system cannot map files into memory, so the whole file was "
                "read into memory"
            )
        return Checkpoint(
            path,
            files,
            family,
            layout,
            widths,
            targets,
            record,
            networks,
            layers,
            folder,
            stack.pop_all(),
        )


def _check_layers(layers: Layers, record: StackRecord) -> None:
    """MalformedError where a file of a layer that the record names does not have the record."""
    for name in record.layers:
        layer = layers.find(name)
        for copy in () if layer is None else layer.copies:
            if RECORD not in copy.file.header.metadata:
                raise MalformedError(
                    f"{copy.file.path} and the denoiser of {layers.path} are files of one model, "
                    "but do not have the same patches in them",
                    file=copy.file.path,
                    expected="one stack record in all of a model's files",
                    found="none",
                )


def detect_in(tensors: Mapping[str, Any], path: Path) -> tuple[Family, Layout]:
    """As `detect`, with the file named in the error."""
    with about(path):
        return detect(tensors)


def _holding(files: Sequence[WeightsFile], targets: Sequence[Target]) -> tuple[WeightsFile, ...]:
    places = {copy.file.place for target in targets for copy in target.copies}
    return tuple(file for file in files if file.place in places)


def _stack(files: Sequence[WeightsFile]) -> StackRecord | None:
    """The record that all of the files carry, or that none does."""
    records = [file.header.metadata.get(RECORD) for file in files]
    for file, text in zip(files, records, strict=True):
        if text != records[0]:
            raise MalformedError(
                f"{file.path} and {files[0].path} are files of one model, but do not have the "
                "same patches in them",
                file=file.path,
                expected="one stack record in all of a model's files",
                found="different records",
            )
    if records[0] is None:
        return None
    with reading(files[0].path):
        return StackRecord.from_metadata(records[0])


def _left_out(files: Sequence[WeightsFile]) -> list[str]:
    return [
        f"{file.path}: read as weights only; {', '.join(names[:5])} left out"
        for file in files
        if (names := getattr(file, "left_out", ()))
    ]
