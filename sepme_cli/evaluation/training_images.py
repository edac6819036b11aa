"""A folder of training images with their captions, as training scripts read it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.diffusion.images import image_files
from sepme_cli.errors import MalformedError, SystemFailure, UsageError

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class TrainingImage:
    """An image that a model may have been trained on, and what it was called then. name: within its
    folder."""

    name: str
    path: Path
    caption: str


def read_training_images(folder: Path) -> tuple[TrainingImage, ...]:
    """What a folder holds: `name.png` with its caption in `name.txt` beside it; or
    `metadata.jsonl`, as image folders of Hugging Face datasets have it: in each line an object with
    `file_name` and `text`.

    Raises SystemFailure for no such folder, UsageError for no image or no caption of one,
    MalformedError for a damaged metadata.jsonl or a name in it that leads out of the folder.
    """
    if not folder.is_dir():
        raise SystemFailure(f"{folder}: no such folder", file=folder)
    listed = folder / METADATA
    found = tuple(_listed(listed) if listed.is_file() else _beside(folder))
    if not found:
        raise UsageError(f"{listed}: no images in it", file=listed, expected="a line for each")
    return found


def _beside(folder: Path) -> Iterator[TrainingImage]:
    for path in image_files(folder):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise UsageError(
                f"{path} has no caption",
                file=path,
                expected=f"{text.name} beside it, or {METADATA} in the folder",
            )
        yield TrainingImage(path.name, path, _one_line(_text(text)))


def _listed(listed: Path) -> Iterator[TrainingImage]:
    for number, line in enumerate(_text(listed).splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            name, caption = told["file_name"], told["text"]
            if not (isinstance(name, str) and isinstance(caption, str)):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MalformedError(
                f"{listed}, line {number}: not an object with file_name and text",
                file=listed,
                expected='{"file_name": "1.png", "text": "a caption"}',
                found=line[:80],
            ) from error
        path = listed.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise MalformedError(
                f"{listed}, line {number}: no such file in this folder",
                file=listed,
                expected="a file below it",
                found=name,
            )
        yield TrainingImage(name, path, _one_line(caption))


def _text(path: Path) -> str:
    try:
        with reading(path):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError(f"{path}: not UTF-8 text", file=path) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
