"""Opening one file of tensors, whatever it is."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from patch_spec.header import PREFIX_BYTES, Header, header_length, parse_header
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import keep_writers_out, read_exactly
from sepme_cli.checkpoints.reading.gguf import is_gguf, open_gguf
from sepme_cli.checkpoints.reading.tensors import WeightsFile
from sepme_cli.checkpoints.reading.unsupported import ZIP, telling
from sepme_cli.errors import UnsupportedError

PICKLED = frozenset({".ckpt", ".pt", ".pth", ".bin"})
"""What files are called that torch has saved."""


def open_weights(path: Path, place: str = "") -> WeightsFile:
    """Open a file of tensors; see `WeightsFile`.

    Until it is closed no other sepme writes it in place, so what is read is of one state of it.
    A pickle is read only under a name that says so, and only by torch's weights-only loader.
    Raises SystemFailure (not there, not readable, busy), MalformedError (not safetensors,
    truncated, hostile, a pickle that says it is something else) or UnsupportedError (no regular
    file, a GGUF file of another version).
    """
    file = _open(path)
    try:
        keep_writers_out(file.fileno(), path)
        if path.suffix.lower() in PICKLED and _is_pickled(file):
            # Imports torch, which takes longer than all the rest of a command.
            from sepme_cli.checkpoints.reading.pickled import open_pickled

            return open_pickled(path, place, file)
        with reading(path):
            prefix = file.read(PREFIX_BYTES)
        if is_gguf(prefix):
            return open_gguf(path, place, file)
        header, header_bytes = _read_header(file, path, prefix)
        return WeightsFile(path, place, header, header_bytes, file)
    except BaseException:
        file.close()
        raise


def _open(path: Path) -> BinaryIO:
    with reading(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnsupportedError(
                f"{path} is not a regular file", file=path, expected="a .safetensors file"
            )
        return path.open("rb", buffering=0)


def _is_pickled(file: BinaryIO) -> bool:
    prefix = read_exactly(file.fileno(), len(ZIP), 0)
    return prefix == ZIP or (prefix[:1] == b"\x80" and prefix[1:2] in (b"\2", b"\3", b"\4"))


def _read_header(file: BinaryIO, path: Path, prefix: bytes) -> tuple[Header, bytes]:
    size = os.fstat(file.fileno()).st_size
    with reading(path), telling(path):
        length = header_length(prefix, size)
        text = read_exactly(file.fileno(), length, PREFIX_BYTES)
        return parse_header(prefix, text, size), prefix + text
