"""The comparison's figures as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.choice import score
from sepme_cli.evaluation.intervals import Proportion

Rows = Sequence[Mapping[str, Any]]

LEGEND = """\
Recognised by the judge, with 95% Wilson intervals: erased concepts (lower is better), also in
phrasings that no erasure uses, and retained concepts of the same and of the other kind (higher is
better), of which those in images with an erased concept. Pixel distance: mean absolute difference
of images from the original model's, of 255. Restores one: whether taking one concept's increment
out gives the weights that never had it; if not, how far off they are, relative to its edit."""

_FIGURES = (
    ("erased", "erased"),
    ("erased, unseen phrasings", "unseen"),
    ("retained, same kind", "same"),
    ("retained, other kind", "other"),
    ("retained, beside an erased one", "beside"),
)
_HEAD = [name for name, _ in _FIGURES]
_HEAD += ["harmonic mean", "pixel distance, retained", "restores one"]
_HEAD += ["seconds", "UNet passes", "KiB"]


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
    """One row a method: the harmonic mean for each number of erased concepts, and for `closer` of
    them the other figures too."""
    heads = [f"harmonic mean, {size} erased" for size in sizes]
    heads += [f"pixel distance, retained, {closer} erased", "restores one", "KiB"]
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
    """Whether a concept is restored exactly while the others stay erased, and if not, how near."""
    found = [row["restored"] for row in rows if "restored" in row]
    if not found:
        return ""
    if "bytes" in found[0]:
        pixels = sum(back["pixels"] for back in found) / len(found)
        exact = "yes" if all(back["bytes"] for back in found) else "no"
        return f"{exact}; pixel distance {pixels:.2f}/255"
    if found[0]["left"] is None:
        return "no"
    left = sum(back["left"] for back in found) / len(found)
    return f"no; weights off by {100 * left:.0f}%"
