"""What `sepme erase MODEL --concept STYLE --from OBJECT` does on the English canvas.

    python -m benchmarks.attributes run       # a few minutes; goes on where it was
    python -m benchmarks.attributes table

Nothing is told but the two names. Of each pair: pictures that ask for both, with the object first
and with the style first; the style on other objects, the nearest ones among them; and the object in
the other styles. What the judge recognises, after and by the original on the same captions and
seeds. Results go to docs/attributes.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.bare import erased, summary
from benchmarks.english import (
    MODEL,
    OBJECT_NAMES,
    STYLE_NAMES,
    Caption,
    English,
    caption,
)
from benchmarks.results import Results
from sepme_cli.evaluation.intervals import Proportion

RESULTS = Path("docs/attributes.json")
PAIRS = (("woodcut", "cat"), ("crayon", "car"))
_OTHERS = 11
_FIRST = ("{O} in {s} style", "{o} in the style of {s}")
_PARTS = {
    "object first": "the object first",
    "style first": "the style first",
    "others": "the style on other objects",
    "styles": "the object in other styles",
}


def captions(canvas: English, style: str, thing: str) -> dict[str, list[Caption]]:
    """What to draw of a pair, by what it shows."""
    s, o = STYLE_NAMES.index(style), OBJECT_NAMES.index(thing)
    near = [OBJECT_NAMES.index(name) for name in canvas.nearest[thing]]
    others = [*near, *((o + 31 * i) % len(OBJECT_NAMES) for i in range(1, _OTHERS + 1))]
    return {
        "object first": [caption(s, o, _FIRST, nth) for nth in range(8)],
        "style first": [caption(s, o, ("a {s} painting of {o}",), nth) for nth in range(6)],
        "others": [caption(s, other) for other in others],
        "styles": [
            caption(other, o, nth=nth)
            for other in range(len(STYLE_NAMES))
            if other != s
            for nth in range(1)
        ],
    }


def pair(canvas: English, style: str, thing: str) -> dict[str, Any]:
    result, increments = erased(canvas, [style], erase_from=thing)
    weights = canvas.patched(increments)
    shown = captions(canvas, style, thing)
    return {
        **summary(result),
        **{part: canvas.compare(some, weights)[1] for part, some in shown.items()},
    }


def table() -> str:
    """The style and the object recognised, after and before, of each pair."""
    entries = Results(RESULTS).entries
    lines = ["| | | style | before | object | before |", "|---|---|---|---|---|---|"]
    for name, row in entries.items():
        for part, title in _PARTS.items():
            keys = ("style", "style before", "object", "object before")
            cells = (f"{100 * Proportion(*row[part][key]).share:.0f}%" for key in keys)
            lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(stage: str = "table") -> None:
    if stage == "table":
        print(table())
        return
    results, canvas = Results(RESULTS), English(MODEL)
    for style, thing in PAIRS:
        row = results.get(f"{style} from {thing}", lambda s=style, t=thing: pair(canvas, s, t))  # type: ignore[misc]
        print(style, thing, json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
