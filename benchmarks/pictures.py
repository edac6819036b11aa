"""The documents' pictures: some of the English canvas, and what is drawn instead of a concept.

python -m benchmarks.pictures
"""

from pathlib import Path

import torch

from benchmarks.bare import erased
from benchmarks.english import OBJECT_NAMES, STYLE_NAMES, English, caption, kind_of
from sepme_cli.evaluation.sheets import contact_sheet

PICTURES = Path("docs/pictures")
#: With the bare command.
SHOWN = ("woodcut", "airbrush", "cat", "violin")
ACROSS = 16


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    canvas = English(dtype=torch.float32)
    some = range(0, len(OBJECT_NAMES), len(OBJECT_NAMES) // ACROSS)[:ACROSS]
    asked = [caption(s, o, ["{O} in {s} style"]) for s in range(len(STYLE_NAMES)) for o in some]
    drawn = canvas.draw(asked, {}).pictures.float() / 255
    contact_sheet(
        drawn.unflatten(0, (len(STYLE_NAMES), ACROSS)), PICTURES / "canvas.png", rows=STYLE_NAMES
    )
    rows, labels = [], []
    for name in SHOWN:
        pairs = [
            (STYLE_NAMES.index(name), o)
            if kind_of(name) == "style"
            else (i, OBJECT_NAMES.index(name))
            for i, o in enumerate(some[:8])
        ]
        captions = [caption(*pair, ["{O} in {s} style"]) for pair in pairs]
        weights = canvas.patched(erased(canvas, [name])[1])
        rows += [canvas.draw(captions, w).pictures.float() / 255 for w in ({}, weights)]
        labels += [name, "erased"]
    contact_sheet(torch.stack(rows), PICTURES / "instead.png", rows=labels, scale=2)


if __name__ == "__main__":
    main()
