"""Every style and every object of the emoji canvas, erased by itself.

    python -m benchmarks.alone run closed-form   # goes on where it was
    python -m benchmarks.alone table             # the figures as Markdown, the worst concept named

Each is judged as `benchmarks.comparison` judges a method: 24 pictures that name it, as many that
do not, and as many in phrasings that no erasure uses.
Results go to docs/alone.json, concept by concept; changed settings are drawn anew.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.choice import Choice
from benchmarks.comparison import Bench, key
from benchmarks.erasing import METHODS
from benchmarks.peers.ours import Ours
from benchmarks.results import Results
from examples.emoji.judging import OBJECT_NAMES, STYLE_NAMES
from sepme_cli.evaluation.intervals import Proportion

RESULTS = Path("docs/alone.json")
KINDS = {"style": STYLE_NAMES, "object": OBJECT_NAMES}
JUDGED = Choice(erased=24, kept=24, unseen=24)
#: What a row says, how its figure is called, and which is the worst.
_FIGURES = (
    ("erased", "erased", max),
    ("erased, unseen phrasings", "unseen", max),
    ("kept, same kind", "same", min),
    ("kept, other kind", "other", min),
    ("of that beside an erased one", "beside", min),
)


def _peer(method: str) -> Ours:
    return Ours(cast("Literal['closed-form', 'sepme']", method))


def _key(method: str, name: str) -> str:
    return key(method, name, (name,), _peer(method), JUDGED)


def run(method: str) -> None:
    """Erase and judge every concept that has not been."""
    results, bench = Results(RESULTS), Bench()
    for name in (*STYLE_NAMES, *OBJECT_NAMES):
        make = partial(bench.row, _peer(method), (name,), JUDGED)
        print(method, name, json.dumps(results.get(_key(method, name), make)), flush=True)


def found(method: str, kind: str) -> dict[str, dict[str, Any]]:
    """concept -> row, of the concepts of a kind that have been judged."""
    entries = Results(RESULTS).entries
    return {n: entries[k] for n in KINDS[kind] if (k := _key(method, n)) in entries}


def table() -> str:
    """Each kind and method that has been run."""
    every = [(method, kind, found(method, kind)) for method in METHODS for kind in KINDS]
    return "\n\n".join(_table(method, kind, rows) for method, kind, rows in every if rows)


def _table(method: str, kind: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"**{method}, each of {len(rows)} {kind}s by itself**", ""]
    lines += ["| recognised | all | worst |", "|---|---|---|"]
    for label, figure, worst in _FIGURES:
        counts = {name: Proportion(*row[figure]) for name, row in rows.items()}
        shares = {name: count.share for name, count in counts.items()}
        name = worst(shares, key=shares.__getitem__)
        last = f"{100 * shares[name]:.0f}% ({name})" if len({*shares.values()}) > 1 else ""
        lines.append(f"| {label} | {sum(counts.values(), Proportion(0, 0))} | {last} |")
    moved = {name: row["moved"] for name, row in rows.items()}
    most = max(moved, key=moved.__getitem__)
    mean = sum(moved.values()) / len(moved)
    lines.append(f"| kept pictures move by | {mean:.1f}/255 | {moved[most]:.1f}/255 ({most}) |")
    return "\n".join(lines)


def main(stage: str, method: str = "closed-form") -> None:
    if stage == "table":
        print(table())
    else:
        run(method)


if __name__ == "__main__":
    main(*sys.argv[1:])
