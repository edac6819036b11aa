"""ConceptPrune on the English canvas: what it erases, what it costs, beside the closed form.

    python -m benchmarks.pruned run      # goes on where it was
    python -m benchmarks.pruned table

Judged as in `benchmarks.bare`: pictures that name the concept, its nearest neighbours, and pictures
that have nothing to do with it. Images are drawn in ten steps here, and ConceptPrune looks at the
first two, as its authors look at ten of fifty. Results go to docs/pruned.json.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bare import erased, judge
from benchmarks.english import STEPS, English
from benchmarks.results import Results
from sepme_cli.evaluation.intervals import Proportion

RESULTS = Path("docs/pruned.json")
CONCEPTS = ("dog", "apple", "woodcut")
PRUNED = {"method": "concept-prune"}
FIRST = {"sampling_steps": STEPS, "pictures": 32}
HOW: Mapping[str, Mapping[str, Any]] = {
    "closed form": {},
    "its authors' shares": {**PRUNED, "settings": FIRST},
    "three tenths of a row": {**PRUNED, "settings": {**FIRST, "pruned_share": 0.3}},
}


def entry(canvas: English, concept: str, options: Mapping[str, Any]) -> dict[str, Any]:
    result, increments = erased(canvas, [concept], **options)
    (one,) = result.increments
    masks = [masked for part in increments for masked in part.masks.values()]
    return {
        "bytes": result.bytes,
        "zeros": one.zeros,
        "of": sum(masked.size for masked in masks),
        "seconds": round(one.seconds, 1),
        **judge(canvas, [concept], canvas.patched(increments)),
    }


def table() -> str:
    """All concepts together, in shares."""
    entries = Results(RESULTS).entries
    lines = [f"| | {' | '.join(HOW)} |", "|---" * (len(HOW) + 1) + "|"]
    for title, keys in (
        ("concept recognised", ("erased object", "erased style")),
        ("… in unseen phrasings", ("unseen object", "unseen style")),
        ("kept: what is beside it", ("beside object", "beside style")),
        ("kept: nearest objects", ("near object",)),
        ("kept: others", ("others object", "others style")),
    ):
        cells = []
        for how in HOW:
            rows = [entries[f"{concept}/{how}"] for concept in CONCEPTS]
            after = [Proportion(*row[key]) for row in rows for key in keys if key in row]
            before = [Proportion(*row[f"{k}, before"]) for row in rows for k in keys if k in row]
            found, was = (sum(part, Proportion(0, 0)) for part in (after, before))
            cells.append(f"{100 * found.share:.0f}% (before: {100 * was.share:.0f}%)")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for title, key in (("KiB", "bytes"), ("weights zero", "zeros"), ("seconds", "seconds")):
        cells = []
        for how in HOW:
            mean = sum(entries[f"{c}/{how}"][key] for c in CONCEPTS) / len(CONCEPTS)
            cells.append(f"{mean / 1024:.0f}" if key == "bytes" else f"{mean:,.0f}")
        lines.append(f"| {title}, mean | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(stage: str = "run") -> None:
    if stage == "table":
        print(table())
        return
    results, canvas = Results(RESULTS), English()
    for concept in CONCEPTS:
        for how, options in HOW.items():

            def make(concept: str = concept, options: Mapping[str, Any] = options) -> Any:
                return entry(canvas, concept, options)

            print(how, concept, json.dumps(results.get(f"{concept}/{how}", make)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
