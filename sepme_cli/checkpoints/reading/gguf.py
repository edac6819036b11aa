"""GGUF files: patched where the layers that read the text are not quantised."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import read_exactly
from sepme_cli.checkpoints.reading.tensors import WeightsFile
from sepme_cli.checkpoints.structure.gguf import MAGIC, GgufHeader, read_gguf_header

SUFFIX = ".gguf"
_CHUNK = 2**20


@dataclass(frozen=True)
class GgufFile(WeightsFile):
    """An open GGUF file; a patched copy of it is one too."""


def is_gguf(beginning: bytes) -> bool:
    """Whether a file that begins so is one."""
    return beginning.startswith(MAGIC)


def gguf_header(file: BinaryIO, path: Path) -> GgufHeader:
    """That of an open file; raises as `read_gguf_header` does, and SystemFailure."""
    size = os.fstat(file.fileno()).st_size
    with reading(path):
        return read_gguf_header(_Ahead(file), size, path)


def open_gguf(path: Path, place: str, file: BinaryIO) -> GgufFile:
    """Open one; raises as `gguf_header` does."""
    header = gguf_header(file, path)
    with reading(path):
        start = read_exactly(file.fileno(), header.data_start, 0)
    return GgufFile(path, place, header, start, file)


class _Ahead:
    """Reads a file from its beginning, a chunk at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self.descriptor, self.at, self.chunk, self.used = file.fileno(), 0, b"", 0

    def __call__(self, count: int) -> bytes:
        if self.used + count > len(self.chunk):
            rest = self.chunk[self.used :]
            more = read_exactly(self.descriptor, max(_CHUNK, count - len(rest)), self.at)
            self.at += len(more)
            self.chunk, self.used = rest + more, 0
        found = self.chunk[self.used : self.used + count]
        self.used += count
        return found
