"""The README's pictures: the whole canvas, and what is drawn instead of a concept.

python -m benchmarks.pictures
"""

from pathlib import Path

import torch

from benchmarks.canvas import ASKED, Canvas
from benchmarks.erasing import erase
from examples.emoji.judging import OBJECT_NAMES, STYLE_NAMES
from sepme_cli.erasure.settings import Settings
from sepme_cli.evaluation.sheets import contact_sheet

PICTURES = Path("docs/pictures")
SHOWN = ("style:ink", "style:noto", "object:cat", "object:whale")


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    canvas = Canvas()
    contact_sheet(
        canvas.draw(ASKED).unflatten(0, (len(STYLE_NAMES), len(OBJECT_NAMES))),
        PICTURES / "canvas.png",
        rows=STYLE_NAMES,
    )
    rows, labels = [], []
    for word in SHOWN:
        name = word.partition(":")[2]
        (made,) = erase(canvas.model, [word], "closed-form", Settings())
        captions = [c for c in ASKED if c.names(name)]
        captions = captions[:: len(captions) // 8]
        rows += [canvas.draw(captions), canvas.draw(captions, [made.increment])]
        labels += [name, "erased"]
    contact_sheet(torch.stack(rows), PICTURES / "instead.png", rows=labels, scale=2)


if __name__ == "__main__":
    main()
