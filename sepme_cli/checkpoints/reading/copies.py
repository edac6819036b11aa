"""Copies of a denoiser that lie in a model's folder beside the weights that are patched.

Training keeps averages, earlier states and backups there, under any name. What a file holds is
told by the names of its tensors; only where those cannot be read, by its own.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from patch_spec.errors import FormatError
from patch_spec.header import PREFIX_BYTES, Header, read_header
from patch_spec.stack import StackRecord
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.reading.gguf import gguf_header, is_gguf
from sepme_cli.checkpoints.reading.kinds import kind_of
from sepme_cli.checkpoints.reading.unsupported import TORCH_PICKLE, ZIP
from sepme_cli.checkpoints.structure.folders import ModelFolder, weights_sets
from sepme_cli.checkpoints.structure.headers import RECORD
from sepme_cli.checkpoints.structure.layout import keys_and_values, text_entries
from sepme_cli.errors import MalformedError, UnsupportedError

_PICKLED_NAMES = re.compile(
    rb"[\w.-]*attn2[\w.-]*?weight|controlnet_"
    rb"|[\w.-]*(?:context_embedder|txt_in|text_embedder|text_embedding|vector_in|y_embedder)"
    rb"[\w.-]*?weight"
)
"""Names that tell, as a pickle has them: as they are, with marks of its own around them."""
_PICKLE_BYTES = 32 * 2**20
"""Where they stand in it: before the weights."""


def unpatched_copies(folder: ModelFolder, record: StackRecord | None = None) -> Iterator[Path]:
    """Files of the folder with what reads the text in a denoiser, beside those that sepme patches.

    record: copies that have the same increments in them are none. Raises SystemFailure for files
    that cannot be read.
    """
    used = {path for one in weights_sets(folder.denoiser) for path in one.shards}
    for path, place in folder.files():
        if path not in used and path.is_file():
            with reading(path):
                found = _holds_denoiser(path, place, folder, record)
            if found:
                yield path


def _holds_denoiser(
    path: Path, place: str, folder: ModelFolder, record: StackRecord | None
) -> bool:
    header = _header(path)
    if header is None:
        names = _pickled_names(path)
        return folder.may_hold_denoiser(place) if names is None else bool(_reading_text(names))
    if not _reading_text(header.by_name) or kind_of(path) != "checkpoint":
        return False
    return record is None or not _same_increments(record, header.metadata.get(RECORD))


def _reading_text(names: Iterable[str]) -> list[str]:
    known = tuple(names)
    return [*keys_and_values(known), *text_entries(known)]


def _header(path: Path) -> Header | None:
    """That of a safetensors or a GGUF file, whatever its name; None for any other."""
    with path.open("rb") as file, suppress(FormatError, MalformedError, UnsupportedError):
        beginning = file.read(PREFIX_BYTES + 1)
        if is_gguf(beginning):
            return gguf_header(file, path)
        if beginning[PREFIX_BYTES:] == b"{":
            file.seek(0)
            return read_header(file, path.stat().st_size)
    return None


def _pickled_names(path: Path) -> Iterable[str] | None:
    """Those in a file that torch has saved which tell of a UNet; None for any other file."""
    with path.open("rb") as file:
        begin = file.read(len(TORCH_PICKLE))
        if begin.startswith(ZIP):
            data = _pickle_in(path)
        elif begin == TORCH_PICKLE:
            data = file.read(_PICKLE_BYTES)
        else:
            return None
    if data is None:
        return None
    return {name.decode(errors="replace") for name in _PICKLED_NAMES.findall(data)}


def _pickle_in(path: Path) -> bytes | None:
    try:
        with ZipFile(path) as archive:
            inner = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            if inner is None:
                return None
            with archive.open(inner) as file:
                return file.read(_PICKLE_BYTES)
    # What zipfile raises on files that make no sense.
    except (BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return None


def _same_increments(record: StackRecord, text: str | None) -> bool:
    if text is None:
        return False
    try:
        found = StackRecord.from_metadata(text)
    except FormatError:
        return False
    ours, theirs = ({(e.digest, e.scale) for e in one.entries} for one in (record, found))
    return ours == theirs
