"""Whether the defaults, chosen on one text encoder, hold on others.

    python -m examples.english.text text-narrow    # and text-wide: a few minutes each
    python -m benchmarks.encoders run
    python -m benchmarks.encoders table

Text encoders trained otherwise (another seed, width and depth), the first canvas's, which knows 32
words, and the canvas's own. `sepme erase --check` with nothing named but the concept, at several
prices of protection: how far the concept goes towards its anchor (separability, 1 is all the way)
and how far 19 in 20 held-out captions move. An encoder that no UNet was trained with gets random
keys and values of its width. Concepts are those that are reported of the canvas, and of the first
canvas its own. Results go to docs/encoders.json.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.bare import order
from benchmarks.canvas import MODEL as FIRST
from benchmarks.english import MODEL as CANVAS
from benchmarks.english import kind_of
from benchmarks.results import Results
from examples.emoji.canvas import OBJECTS as FIRST_OBJECTS
from examples.emoji.canvas import STYLES as FIRST_STYLES
from examples.english import text
from sepme_cli.erasure.settings import Settings
from sepme_cli.operations.plan import plan_erasure

RESULTS = Path("docs/encoders.json")
TITLES = {
    "text": "the canvas's: 320 wide, 4 layers",
    "text-narrow": "192 wide, 5 layers",
    "text-wide": "448 wide, 2 layers",
    "first": "the first canvas's: 256 wide, 32 words",
}
#: The least price that is looked at; plans go on to a hundred times that.
LEAST = 1.0
PRICES = (1.0, 3.0, 10.0, 30.0, 100.0)
_STYLES, _OBJECTS = 6, 14
_TEXT = "cond_stage_model.transformer.text_model."


def names(encoder: str) -> list[str]:
    if encoder == "first":
        return [*list(FIRST_STYLES)[:_STYLES], *list(FIRST_OBJECTS)[:_OBJECTS]]
    styles, objects = ([n for n in order() if kind_of(n) == k] for k in ("style", "object"))
    return [*styles[:_STYLES], *objects[:_OBJECTS]]


def model(encoder: str, folder: Path) -> Path:
    """A checkpoint with the encoder."""
    if encoder in ("text", "first"):
        return CANVAS if encoder == "text" else FIRST
    words = {_TEXT + n: w.half().contiguous() for n, w in text.state(encoder).items()}
    width = text.VARIANTS[encoder].width
    generator = torch.Generator().manual_seed(0)
    tensors = {n: w for n, w in load_file(CANVAS).items() if not n.startswith("cond_stage")}
    for name, weight in tensors.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            drawn = torch.randn(len(weight), width, generator=generator) / width**0.5
            tensors[name] = drawn.half()
    path = folder / f"{encoder}.safetensors"
    save_file({**tensors, **words}, path)
    return path


def planned(path: Path, name: str) -> dict[str, Any]:
    """At every price; and what the defaults choose."""
    plan = plan_erasure(path, [name], settings=Settings(protection=LEAST))
    usual = plan_erasure(path, [name])
    return {
        "tried": {
            f"{one.protection:g}": [one.separability, one.moves]
            for one in plan.strengths
            if one.protection in PRICES
        },
        "chosen": [usual.protection, usual.concepts[0].separability, usual.strengths[0].moves],
        "refused": usual.refused,
    }


def run(chosen: Sequence[str]) -> None:
    results = Results(RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        for encoder in chosen or TITLES:
            path = model(encoder, Path(folder))
            for name in names(encoder):
                row = results.get(f"{encoder}/{name}", lambda p=path, n=name: planned(p, n))  # type: ignore[misc]
                print(encoder, name, row["chosen"], flush=True)


def table() -> str:
    """Means over the concepts: separability, and by how much 19 in 20 captions move at most."""
    entries = Results(RESULTS).entries
    lines = [f"| text encoder | {' | '.join(f'protection {p:g}' for p in PRICES)} | refused |"]
    lines.append("|---" * (len(PRICES) + 2) + "|")
    for encoder, title in TITLES.items():
        rows = [row for name, row in entries.items() if name.startswith(f"{encoder}/")]
        if rows:
            cells = [_cell(rows, f"{price:g}") for price in PRICES]
            refused = f"{sum(row['refused'] for row in rows)} of {len(rows)}"
            lines.append(f"| {title} | {' | '.join(cells)} | {refused} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Mapping[str, Any]], price: str) -> str:
    tried = [row["tried"][price] for row in rows if price in row["tried"]]
    if not tried:
        return ""
    separability, moves = (mean(column) for column in zip(*tried, strict=True))
    return f"{separability:.2f}, {moves:.0%}"


def main(stage: str = "table", *chosen: str) -> None:
    if stage == "run":
        run(chosen)
    else:
        print(table())


if __name__ == "__main__":
    main(*sys.argv[1:])
