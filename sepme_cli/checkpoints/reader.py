"""Opening a checkpoint: its header parsed and understood, its tensors read one at a time."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from patch_spec.base import Base
from patch_spec.header import PREFIX_BYTES, Header, TensorEntry, header_length, parse_header
from patch_spec.stack import StackRecord
from sepme_cli.checkpoints.boundary import reading
from sepme_cli.checkpoints.dtypes import numpy_dtype, readable
from sepme_cli.checkpoints.families import Family, detect
from sepme_cli.checkpoints.files import read_exactly
from sepme_cli.checkpoints.headers import RECORD
from sepme_cli.checkpoints.layout import Layout
from sepme_cli.checkpoints.pending import undo_if_interrupted
from sepme_cli.checkpoints.targets import Target, base_of, find_targets, fingerprint
from sepme_cli.checkpoints.text_encoders import text_encoder_fingerprints
from sepme_cli.errors import MalformedError, UnsupportedError
from sepme_cli.progress import SILENT, Progress

_FOREIGN_MAGIC: tuple[tuple[bytes, str], ...] = (
    # Pickles can run code, so sepme opens none, whatever their extension.
    (b"PK\x03\x04", "a pickle in a zip archive, as torch saves them"),
    *((b"\x80" + bytes([protocol]), "a pickle") for protocol in range(1, 6)),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
)


@dataclass(frozen=True)
class Checkpoint:
    """An open single-file checkpoint; close it, or use it as a context manager.

    header_bytes: the length and the JSON as they are in the file. width: d of the text embedding.
    targets: sorted by name, at least one. stack: what patches are in it, None for none.
    """

    path: Path
    header: Header
    header_bytes: bytes = field(repr=False)
    family: Family
    layout: Layout
    width: int
    targets: tuple[Target, ...] = field(repr=False)
    stack: StackRecord | None
    file: BinaryIO = field(repr=False, compare=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts of the header's `__metadata__`."""
        return self.header.metadata

    @property
    def dtype(self) -> str:
        """Of the targets: "fp32", "fp16", "bf16", "fp64", or "mixed"."""
        dtypes = {target.copies[0].dtype for target in self.targets}
        return readable(dtypes.pop()) if len(dtypes) == 1 else "mixed"

    @cached_property
    def by_name(self) -> Mapping[str, Target]:
        """The targets by the names that patches give them."""
        return {target.name: target for target in self.targets}

    def read(self, target: Target) -> npt.NDArray[Any]:
        """A target's weight [out, d] in the dtype it is stored in."""
        return self.read_entry(target.copies[0])

    def read_entry(self, entry: TensorEntry) -> npt.NDArray[Any]:
        """A floating tensor in the dtype it is stored in; the array is read-only."""
        return np.frombuffer(self.read_bytes(entry), numpy_dtype(entry.dtype)).reshape(entry.shape)

    def read_bytes(self, entry: TensorEntry) -> bytes:
        """A tensor's bytes. Raises MalformedError if the file has become shorter meanwhile."""
        return self.read_range(entry.begin, entry.end, entry.name)

    def read_range(self, begin: int, end: int, name: str) -> bytes:
        """Bytes [begin, end) of the data section; name: the tensor that an error names."""
        with reading(self.path):
            data = read_exactly(self.file.fileno(), end - begin, self.header.data_start + begin)
        if len(data) != end - begin:
            raise MalformedError(
                f"{self.path}: the file ends inside {name}; something else is writing to it",
                file=self.path,
                expected=f"{end - begin} bytes",
                found=f"{len(data)} bytes",
            )
        return data

    def fingerprint(self, target: Target) -> str:
        """The fingerprint of a target's weight; MalformedError, named, if it is not finite."""
        return fingerprint(self.read_entry, target, self.path)

    def base(self, *, text_encoders: bool = False) -> Base:
        """What a patch made from this checkpoint says of it.

        text_encoders: fingerprint those too, which reads all of them.
        """
        encoders = self.text_encoder_fingerprints() if text_encoders else {}
        return base_of(self.family, self.targets, self.read_entry, self.path, encoders)

    def text_encoder_fingerprints(self) -> dict[str, str]:
        """Stream ("clip_l") to fingerprint, of the text encoders that are in the file."""
        return text_encoder_fingerprints(
            self.family.streams, self.header.tensors, self.read_entry, self.path
        )


def open_checkpoint(path: Path, progress: Progress = SILENT) -> Checkpoint:
    """Open and understand a checkpoint. An in-place write that was cut short is undone first.

    Raises SystemFailure (not there, not readable, busy), MalformedError (not safetensors, a
    pickle, truncated, hostile) or UnsupportedError (another kind of model or file).
    """
    undo_if_interrupted(path, progress)
    file = _open(path)
    try:
        header, header_bytes = _read_header(file, path)
        family, layout = detect_in(header, path)
        targets = find_targets(header, layout, path)
        return Checkpoint(
            path,
            header,
            header_bytes,
            family,
            layout,
            targets[0].shape[1],
            targets,
            _stack(header, path),
            file,
        )
    except BaseException:
        file.close()
        raise


def _open(path: Path) -> BinaryIO:
    with reading(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UnsupportedError(
                f"{path} is a folder; sepme works on single-file checkpoints so far",
                file=path,
                expected="a .safetensors file",
                found="a folder",
            )
        if not stat.S_ISREG(mode):
            raise UnsupportedError(
                f"{path} is not a regular file", file=path, expected="a .safetensors file"
            )
        return path.open("rb", buffering=0)


def _read_header(file: BinaryIO, path: Path) -> tuple[Header, bytes]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX_BYTES)
    try:
        with reading(path):
            length = header_length(prefix, size)
            text = read_exactly(file.fileno(), length, PREFIX_BYTES)
            return parse_header(prefix, text, size), prefix + text
    except MalformedError:
        _refuse_by_magic(prefix, path)
        raise


def _refuse_by_magic(prefix: bytes, path: Path) -> None:
    """Say what a file is that is no safetensors file. An extension says nothing of that."""
    kind = next((kind for magic, kind in _FOREIGN_MAGIC if prefix.startswith(magic)), None)
    if kind is not None:
        raise MalformedError(
            f"{path} is {kind}, not a safetensors file; have it converted to safetensors first",
            file=path,
            expected="a safetensors file",
            found=kind,
        )


def detect_in(header: Header, path: Path) -> tuple[Family, Layout]:
    """As `detect`, with the file named in the error."""
    try:
        return detect(header.by_name)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{path}: {error.message}", file=path, expected=error.expected, found=error.found
        ) from error


def _stack(header: Header, path: Path) -> StackRecord | None:
    text = header.metadata.get(RECORD)
    if text is None:
        return None
    with reading(path):
        return StackRecord.from_metadata(text)
