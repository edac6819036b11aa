"""The comparison's figures as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.choice import score
from sepme_cli.evaluation.intervals import Proportion

Rows = Sequence[Mapping[str, Any]]

_FIGURES = (
    ("erased", "erased"),
    ("unseen phrasings", "unseen"),
    ("kept, same kind", "same"),
    ("kept, other kind", "other"),
    ("of that beside an erased one", "beside"),
)
_HEAD = [name for name, _ in _FIGURES]
_HEAD += ["harmonic mean", "kept pictures move by", "restored", "seconds", "UNet passes", "KiB"]


def print_table(title: str, methods: Mapping[str, Rows], states: int) -> None:
    """One row a method, counts pooled over its rows; costs are means. states: how many rows make a
    whole."""
    print(f"\n**{title}**\n")
    print("| " + " | ".join(["", *_HEAD]) + " |")
    print("|---" * (len(_HEAD) + 1) + "|")
    for method, rows in methods.items():
        if rows:
            part = f" ({len(rows)} of {states} sets)" if len(rows) < states else ""
            print("| " + " | ".join([method + part, *_cells(rows)]) + " |")


def print_summary(
    sizes: Sequence[int], methods: Mapping[str, Mapping[int, Rows]], closer: int
) -> None:
    """One row a method: the harmonic mean of all that was drawn, for each number of concepts, and
    what else is to be told of one number of them."""
    heads = [f"{size} out" for size in sizes]
    heads += [f"{closer} out: kept pictures move by", "one put back, the others out", "KiB"]
    print("| " + " | ".join(["", *heads]) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for method, found in methods.items():
        if rows := found[closer]:
            means = [f"{100 * score(found[size]):.1f}" if found[size] else "" for size in sizes]
            cells = [method, *means, _moved(rows), _restored(rows), _stored(rows)]
            print("| " + " | ".join(cells) + " |")


def _cells(rows: Rows) -> list[str]:
    shares = [
        str(sum((Proportion(*row[figure]) for row in rows), Proportion(0, 0)))
        for _, figure in _FIGURES
    ]
    costs = [f"{_mean(rows, 'seconds'):.1f}", f"{_mean(rows, 'passes'):,.0f}", _stored(rows)]
    return [*shares, f"{100 * score(rows):.1f}", _moved(rows), _restored(rows), *costs]


def _mean(rows: Rows, name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))


def _moved(rows: Rows) -> str:
    return f"{_mean(rows, 'moved'):.1f}/255"


def _stored(rows: Rows) -> str:
    return f"{_mean(rows, 'stored') / 1024:,.0f}"


def _restored(rows: Rows) -> str:
    """How a concept comes back while the others stay out."""
    found = [row["restored"] for row in rows if "restored" in row]
    if not found:
        return ""
    if "bytes" in found[0]:
        pixels = sum(back["pixels"] for back in found) / len(found)
        exact = "yes" if all(back["bytes"] for back in found) else "no"
        return f"{exact}; its pictures move by {pixels:.2f}/255"
    if found[0]["left"] is None:
        return "no"
    left = sum(back["left"] for back in found) / len(found)
    return f"no; {100 * left:.0f}% off"
