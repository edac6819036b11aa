"""What each of a model's streams carries of a concept, on the sisters of the English canvas.

    python -m examples.english.sisters unpack    # writes out both models, as they are shipped
    python -m benchmarks.doors run xl        # goes on where it was; or sd3
    python -m benchmarks.doors table

The bare command, with one difference: `--streams` says which of what the denoiser reads of a prompt
it erases from; of Stable Diffusion 3, `--no-t5` that it erases from no rows of T5. Judged as the
bare command is on the canvas (`benchmarks/bare.py`), in the same images for every choice. Results
go to docs/doors.json.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.bare import CHOSEN_ON, erased, judge, order, summary
from benchmarks.english import OBJECT_NAMES, STEPS, English, kind_of
from benchmarks.results import Results
from examples.english import sd3
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.planning.request import Streams

RESULTS = Path("docs/doors.json")
MODELS: Mapping[str, Path] = {
    "xl": Path("build/english/xl/xl.safetensors"),
    "sd3": Path("build/english/sd3/model"),
}
TITLES = {"xl": "XL", "sd3": "Stable Diffusion 3"}
WITHOUT_T5 = "tokens without T5"
CHOICES: Mapping[str, tuple[str, ...]] = {
    "xl": get_args(Streams),
    "sd3": (*get_args(Streams), WITHOUT_T5),
}
DRAWN: Mapping[str, Sequence[str]] = {"xl": OBJECT_NAMES, "sd3": sd3.DRAWN}
"""What each of them generates."""
GUIDANCE: Mapping[str, float] = {"xl": 3.0, "sd3": 5.0}
OBJECTS = 8
#: A row of the table: its label, and what is counted there.
_ROWS = (
    ("erased", "erased"),
    ("erased, unseen phrasings", "unseen"),
    ("five nearest objects", "near object"),
    ("other objects", "others object"),
    ("other styles", "others style"),
)


def names(drawn: Sequence[str]) -> list[str]:
    """Styles that defaults were not chosen on, and objects as if drawn by lot."""
    styles = [name for name in order() if kind_of(name) == "style" and name not in CHOSEN_ON]
    return [*styles, *[name for name in order() if name in drawn][:OBJECTS]]


def one(canvas: English, name: str, choice: str) -> dict[str, Any]:
    without = choice == WITHOUT_T5
    result, increments = erased(
        canvas,
        [name],
        streams="tokens" if without else choice,
        options=ModelOptions(t5=not without),
        force_collateral=True,
    )
    return {**summary(result), **judge(canvas, [name], canvas.patched(increments))}


def run(model: str) -> None:
    results = Results(RESULTS)
    canvas = English(MODELS[model], steps=STEPS, guidance=GUIDANCE[model], drawn=DRAWN[model])
    for name in names(DRAWN[model]):
        for choice in CHOICES[model]:

            def make(name: str = name, choice: str = choice) -> dict[str, Any]:
                return one(canvas, name, choice)

            row = results.get(f"{model}/{choice}/{name}", make)
            print(model, choice, name, row.get(f"erased {kind_of(name)}"), flush=True)


def table() -> str:
    """Styles and objects by what was erased from, with 95% intervals."""
    entries = Results(RESULTS).entries
    parts = []
    for model, title in TITLES.items():
        choices = CHOICES[model]
        heads = [f"{kind}s, {choice}" for kind in ("style", "object") for choice in choices]
        lines = [f"**{title}**", "", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for label, key in _ROWS:
            cells = [
                _cell([e for n, e in entries.items() if _is(n, model, streams, kind)], key, kind)
                for kind in ("style", "object")
                for streams in choices
            ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        if any(name.startswith(f"{model}/") for name in entries):
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _is(entry: str, model: str, streams: str, kind: str) -> bool:
    found, of, name = entry.split("/")
    return (found, of, kind_of(name)) == (model, streams, kind)


def _cell(rows: Sequence[Mapping[str, Any]], key: str, kind: str) -> str:
    key = f"{key} {kind}" if key in ("erased", "unseen") else key
    known = [row for row in rows if key in row]
    if not known:
        return ""
    after, before = (
        sum((Proportion(*row[name]) for row in known), Proportion(0, 0))
        for name in (key, f"{key}, before")
    )
    return f"{after} (before: {before.share:.1%})"


def main(stage: str = "table", model: str = "xl") -> None:
    if stage == "run":
        run(model)
    else:
        print(table())


if __name__ == "__main__":
    main(*sys.argv[1:])
