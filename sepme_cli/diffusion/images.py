"""Images from files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sepme_cli.errors import MalformedError, SystemFailure, UsageError

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def load_images(folder: Path, size: int) -> Tensor:
    """Every image of a folder, in the order of their names, cut to a square and scaled.

    Returns [n, 3, size, size] in [0, 1]. Raises SystemFailure (no such folder), UsageError (no
    image in it), MalformedError (an image that cannot be read).
    """
    if not folder.is_dir():
        raise SystemFailure(f"{folder}: no such folder", file=folder)
    return torch.stack([load_image(path, size) for path in image_files(folder)])


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names; UsageError where there is none."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _ENDINGS)
    if not paths:
        raise UsageError(
            f"{folder}: no images in it", file=folder, expected=", ".join(sorted(_ENDINGS))
        )
    return paths


def load_image(path: Path, size: int) -> Tensor:
    """One image, cut to a square and scaled: [3, size, size] in [0, 1]. Raises MalformedError."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise MalformedError(f"{path}: not an image that can be read", file=path) from error
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.crop((left, top, left + side, top + side)).resize((size, size))
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
