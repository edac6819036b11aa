"""What kind of file of ours it is, by what its header says and not by its name."""

from pathlib import Path
from typing import Literal

from patch_spec.canonical import parse_json_strict
from patch_spec.errors import FormatError
from patch_spec.header import read_header
from patch_spec.manifest import FORMAT
from patch_spec.undo import METADATA_KEY as UNDO
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.structure.headers import RECORD

FileKind = Literal["checkpoint", "patch", "undo"]


def kind_of(path: Path) -> FileKind:
    """Whether a file is a patch or an undo journal; everything else is left to `open_checkpoint`.

    Raises SystemFailure if the file cannot be read.
    """
    with reading(path):
        if not path.is_file():
            return "checkpoint"
        with path.open("rb") as file:
            try:
                metadata = read_header(file, path.stat().st_size).metadata
                record = parse_json_strict(metadata.get(RECORD, "null").encode())
            except FormatError:
                return "patch" if path.suffix == ".sepme" else "checkpoint"
    if isinstance(record, dict) and record.get("format") == FORMAT:
        return "patch"
    return "undo" if UNDO in metadata else "checkpoint"
