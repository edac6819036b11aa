"""Contact sheets: images in labelled rows and columns, as one PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def contact_sheet(
    images: Tensor,
    file: Path | BinaryIO,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    scale: int = 1,
    gap: int = 2,
) -> None:
    """Write images [rows, columns, 3, H, W] in [0, 1] to a PNG, enlarged by a whole factor.

    rows, columns: labels, or none.
    """
    across, down = images.shape[1], images.shape[0]
    height, width = images.shape[3] * scale, images.shape[4] * scale
    size = max(11, min(width // 6, 18))
    font = ImageFont.load_default(size=size)
    left = max((int(font.getlength(label)) for label in rows), default=0) + (8 if rows else 0)
    top = int(size * 1.6) if columns else 0
    whole = (left + across * (width + gap), top + down * (height + gap))
    sheet = Image.new("RGB", whole, "white")
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(rows):
        middle = top + i * (height + gap) + height // 2
        pen.text((4, middle), label, fill="black", font=font, anchor="lm")
    for j, label in enumerate(columns):
        centre = left + j * (width + gap) + width // 2
        pen.text((centre, top // 2), label, fill="black", font=font, anchor="mm")
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + j * (width + gap), top + i * (height + gap)))
    sheet.save(file, format="PNG")
