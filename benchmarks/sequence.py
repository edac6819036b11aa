"""Concepts taken out one after another: does an earlier one come back when a later one goes?

    python -m benchmarks.sequence run      # goes on where it was
    python -m benchmarks.sequence table

The sequential unlearning of UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846), which found that
methods that train bring earlier concepts back. Here each step is a patch of its own, made with the
bare command and told of the patches before it, and the model after step k has the first k of them.
Of each concept that is out, the same captions and seeds are drawn after every step. Results go to
docs/sequence.json.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bare import order
from benchmarks.english import (
    OBJECT_NAMES,
    STYLE_NAMES,
    Caption,
    English,
    caption,
    kind_of,
)
from benchmarks.results import Results, counts
from examples.english.words import BUILD
from patch_spec.container import read_patch
from patch_spec.increment import Increment
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.operations.erase import erase

RESULTS = Path("docs/sequence.json")
PATCHES = BUILD / "sequence"
EACH = 8
"""Captions of each concept, and twice as many of what stays."""


def sequence() -> tuple[str, ...]:
    """Four styles and four objects in turn, none that defaults were chosen on."""
    styles, objects = (
        [name for name in order() if kind_of(name) == kind][:4] for kind in ("style", "object")
    )
    return tuple(name for pair in zip(styles, objects, strict=True) for name in pair)


def asked(name: str | None, count: int = EACH) -> list[Caption]:
    """Captions of a concept, beside words that stay; of None, of such words alone."""
    styles, objects = (
        [place for place, word in enumerate(words) if word not in sequence()]
        for words in (STYLE_NAMES, OBJECT_NAMES)
    )
    if name is not None and kind_of(name) == "style":
        styles = [STYLE_NAMES.index(name)]
    elif name is not None:
        objects = [OBJECT_NAMES.index(name)]
    return [
        caption(styles[i % len(styles)], objects[7 * i % len(objects)], nth=i) for i in range(count)
    ]


def patches(canvas: English) -> list[tuple[Increment, ...]]:
    """One for each step, as files, so that a later one can be told of them."""
    PATCHES.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number, name in enumerate(sequence(), 1):
        path = PATCHES / f"{number}-{name}.sepme"
        if not path.exists():
            erase(canvas.model_path, [name], output=path, known=paths)
        paths.append(path)
    return [read_patch(path.read_bytes()).increments for path in paths]


def after(
    canvas: English, names: Sequence[str], increments: Sequence[Increment]
) -> dict[str, list[int]]:
    """Of each of some concepts, in how many images it is recognised; and of what stays."""
    weights = canvas.patched(increments)
    found = {}
    for name in names:
        found[name] = counts(canvas.draw(asked(name), weights).of(kind_of(name)))
    stays = canvas.draw(asked(None, 2 * EACH), weights)
    return {**found, "other styles": counts(stays.style), "other objects": counts(stays.object)}


def run() -> None:
    """All steps."""
    canvas, results, names = English(), Results(RESULTS), sequence()
    results.get("before", lambda: after(canvas, names, ()))
    made = patches(canvas)
    for k in range(1, len(names) + 1):
        stack = [increment for each in made[:k] for increment in each]
        row = results.get(f"step {k}", lambda: after(canvas, names[:k], stack))  # noqa: B023
        print(k, names[k - 1], json.dumps(row), flush=True)


def table() -> str:
    """UA of each concept after each step; then what it was when it went, and at the end."""
    entries, names = Results(RESULTS).entries, sequence()
    steps = [entries[f"step {k}"] for k in range(1, len(names) + 1)]
    lines = [
        f"| UA after | {' | '.join(f'{k}: {name}' for k, name in enumerate(names, 1))} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name in names:
        cells = [_ua(step, name) if name in step else "" for step in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for word in ("other styles", "other objects"):
        cells = [f"{100 * Proportion(*step[word]).share:.0f}%" for step in steps]
        lines.append(f"| *{word}, recognised* | {' | '.join(cells)} |")
    earlier = names[:-1]
    went = [(k, name) for k, name in enumerate(names, 1) if name in earlier]
    first = sum((_gone(steps[k - 1], name) for k, name in went), Proportion(0, 0))
    last = sum((_gone(steps[-1], name) for name in earlier), Proportion(0, 0))
    lines += ["", f"UA of the first {len(earlier)} concepts, each when it went: {first}"]
    lines[-1] += f"; after the last step: {last}."
    before = entries["before"]
    shown = sum((Proportion(*before[name]) for name in names), Proportion(0, 0))
    lines[-1] += f" Recognised before anything went: {shown}."
    return "\n".join(lines)


def _gone(step: Mapping[str, Any], name: str) -> Proportion:
    hits, count = step[name]
    return Proportion(count - hits, count)


def _ua(step: Mapping[str, Any], name: str) -> str:
    return f"{100 * _gone(step, name).share:.0f}%"


def main(*words: str) -> None:
    {"run": run, "table": lambda: print(table())}[words[0] if words else "run"]()


if __name__ == "__main__":
    main(*sys.argv[1:])
