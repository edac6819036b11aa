"""Writing a checkpoint that differs from another in some tensors and in its header.

What is not replaced is copied in whole runs, within the kernel where it can; replaced tensors are
made and written one at a time, so that memory does not grow with the file.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from patch_spec.header import TensorEntry
from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import (
    BLOCK,
    COPY_BYTES,
    let_writers_in,
    new_file,
    write_all,
)
from sepme_cli.checkpoints.disk.kernel import start_writing
from sepme_cli.checkpoints.disk.resizing import can_resize
from sepme_cli.checkpoints.journals.in_place import write_over_in_place
from sepme_cli.checkpoints.journals.pending import Change
from sepme_cli.checkpoints.reading.tensors import WeightsFile
from sepme_cli.prefetch import ahead
from sepme_cli.progress import SILENT, Progress

Values = Callable[[], npt.NDArray[Any]]

_STEP = 2**20
_RUN_BYTES = 64 * 2**20
"""How much is copied before progress is told, and before writing to the disk is set going."""


@dataclass(frozen=True)
class Rewrite:
    """What to write.

    source: where everything else comes from. replaced: makes a tensor's new values, in the dtype
    that it will have. header_bytes: the new file's first bytes. size: of its data section.
    patched: whether the stack record is in the header.
    """

    source: WeightsFile
    replaced: Mapping[str, Values] = field(repr=False)
    header_bytes: bytes = field(repr=False)
    size: int
    patched: bool = False

    @property
    def file_size(self) -> int:
        """Bytes of the new file."""
        return len(self.header_bytes) + self.size

    @property
    def fits_in_place(self) -> bool:
        """Whether the file can stay what it is: its data section, and the room for its header."""
        header = self.source.header
        if self.size != header.data_length:
            return False
        more = len(self.header_bytes) - header.data_start
        return more == 0 or (more % BLOCK == 0 and can_resize(self.source.path))

    def pieces(self) -> Iterator["TensorEntry | tuple[int, int]"]:
        """The new data section in order: tensors to replace, and runs [begin, end) to copy."""
        begin = 0
        for entry in self.source.header.tensors:
            if entry.name in self.replaced:
                if entry.begin > begin:
                    yield begin, entry.begin
                yield entry
                begin = entry.end
        # In a GGUF file there may be padding between tensors, and behind the last.
        if (end := self.source.header.data_length) > begin:
            yield begin, end

    def rehearse(self, progress: Progress) -> None:
        """Make every new tensor and drop it: raises what writing them would."""
        progress.stage("composing", len(self.replaced))
        for _ in self.values():
            progress.advance()

    @property
    def touched(self) -> list[TensorEntry]:
        """The tensors that are replaced, in the order of the data section."""
        return [entry for entry in self.source.header.tensors if entry.name in self.replaced]

    def values(self) -> Generator[bytes]:
        """Their new bytes, in that order, computed ahead of being asked for."""

        def maker(entry: TensorEntry) -> Callable[[], bytes]:
            return lambda: self.replaced[entry.name]().tobytes()

        return ahead(map(maker, self.touched))


def write_copy(
    rewrite: Rewrite, output: Path, *, force: bool = False, progress: Progress = SILENT
) -> None:
    """Write to a file, which appears whole or not at all. The caller is its `only_writer`.

    Raises SystemFailure, and what `rewrite.replaced` raises.
    """
    meter = _Meter(rewrite, output.name, progress)
    with new_file(output, rewrite.file_size, force=force, progress=progress) as target:
        write_all(target, rewrite.header_bytes, 0)
        copier = ThreadPoolExecutor(max_workers=1)
        try:
            _write_pieces(rewrite, target, copier, meter)
        finally:
            copier.shutdown(cancel_futures=True)


def write_stream(rewrite: Rewrite, stream: BinaryIO, progress: Progress = SILENT) -> None:
    """Write to a pipe or another stream, in order. Raises as `write_copy` does."""
    name = str(getattr(stream, "name", "the output"))
    meter = _Meter(rewrite, name, progress)
    with writing(name), closing(rewrite.values()) as values:
        _send(stream, rewrite.header_bytes)
        for piece in rewrite.pieces():
            if isinstance(piece, TensorEntry):
                meter.add(_send(stream, next(values)))
                continue
            begin, end = piece
            for start in range(begin, end, COPY_BYTES):
                stop = min(start + COPY_BYTES, end)
                meter.add(_send(stream, rewrite.source.read_range(start, stop, "a tensor")))
        stream.flush()


def write_in_place(
    checkpoint: Path, rewrites: Sequence[Rewrite], progress: Progress = SILENT
) -> None:
    """Overwrite the replaced tensors and the headers of files of a checkpoint, which all fit.

    Whatever happens, all files are as they were or all as they will be; see `pending`. The caller
    is their only writer.
    """
    changes = [
        Change(
            rewrite.source.path,
            rewrite.source.header,
            rewrite.header_bytes,
            rewrite.touched,
            rewrite.values,
        )
        for rewrite in rewrites
    ]
    for rewrite in rewrites:
        let_writers_in(rewrite.source.file.fileno())
    write_over_in_place(checkpoint, changes, progress)


class _Meter:
    """Tells progress of bytes, in whole MiB."""

    def __init__(self, rewrite: Rewrite, name: str, progress: Progress) -> None:
        self.progress = progress
        self.bytes = 0
        progress.stage(f"writing {name} (MiB)", rewrite.file_size // _STEP)

    def add(self, count: int) -> None:
        """So many bytes more are written."""
        before = self.bytes // _STEP
        self.bytes += count
        self.progress.advance(self.bytes // _STEP - before)


def _send(stream: BinaryIO, data: bytes) -> int:
    """Write all of `data`, of which an unbuffered stream may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
    return len(data)


def _write_pieces(rewrite: Rewrite, target: int, copier: ThreadPoolExecutor, meter: _Meter) -> None:
    """The data section. One thread has the kernel copy while others compute."""
    source, offset = rewrite.source, len(rewrite.header_bytes)
    runs = []
    with closing(rewrite.values()) as values:
        for piece in rewrite.pieces():
            if isinstance(piece, TensorEntry):
                data = next(values)
                write_all(target, data, offset)
                offset += len(data)
                meter.add(len(data))
                continue
            for begin in range(*piece, _RUN_BYTES):
                count = min(_RUN_BYTES, piece[1] - begin)
                runs.append((copier.submit(_copy_run, source, begin, target, offset, count), count))
                offset += count
    for run, count in runs:
        run.result()
        meter.add(count)


def _copy_run(source: WeightsFile, begin: int, target: int, offset: int, count: int) -> None:
    source.copy_range(begin, count, target, offset)
    # Have the disk begin now: then the sync at the end does not take as long as the copy again.
    with suppress(OSError):
        start_writing(target, offset, count)
