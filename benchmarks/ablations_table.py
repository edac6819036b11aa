"""The figures of `benchmarks.ablations` as Markdown and as a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.choice import score
from benchmarks.plots import Panel, small_multiples
from sepme_cli.evaluation.intervals import Proportion

#: setting -> value -> "five" or "alone" -> what was found.
Ablations = Mapping[str, Mapping[Any, Mapping[str, Mapping[str, Any]]]]

#: How a setting is called where its name does not say it.
_CALLED = {
    "protect": "protected words",
    "prompts": "phrases a concept",
    "threshold": "threshold (tau)",
    "norm": "norm (lambda)",
}
_FIGURES = {
    "erased": "erased",
    "unseen": "erased, unseen phrasings",
    "same": "kept, same kind",
    "other": "kept, other kind",
}
_HEAD = ("erased", "unseen", "same kind", "other kind", "mean", "moved", "restored", "seconds")


def table(method: str, ablations: Ablations, defaults: Mapping[str, Any]) -> str:
    """A table a setting; percentages, the default in bold."""
    found = []
    for name, values in ablations.items():
        head = [_CALLED.get(name, name), *_HEAD, *(f"{h}, alone" for h in _HEAD[:6])]
        lines = [f"**{method}: {_CALLED.get(name, name)}**", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for value, rows in values.items():
            label = _value(value)
            cells = [f"**{label}**" if value == defaults[name] else label]
            cells += [*_cells(rows["five"], 8), *_cells(rows["alone"], 6)]
            lines.append("| " + " | ".join(cells) + " |")
        found.append("\n".join(lines))
    return "\n\n".join(found) + "\n"


def _value(value: Any) -> str:
    if value is None:
        return "all"
    return f"{value:g}" if isinstance(value, int | float) else value


def _cells(row: Mapping[str, Any], count: int) -> list[str]:
    """The first of a row's cells under `_HEAD`."""
    if "refused" in row:
        return ["refused", *[""] * (count - 1)]
    shares = [f"{100 * Proportion(*row[figure]).share:.0f}" for figure in _FIGURES]
    back = f"{row['restored']['pixels']:.2f}" if "restored" in row else ""
    moved = f"{row['moved']:.2f}"
    return [*shares, f"{100 * score([row]):.1f}", moved, back, f"{row['seconds']:.1f}"][:count]


def plot(method: str, ablations: Ablations, defaults: Mapping[str, Any], file: Path) -> None:
    """A column of panels a setting, its default marked. Refused values have no points."""
    rows = [
        [_recognised(name, values, "five", defaults[name]) for name, values in ablations.items()],
        [_recognised(name, values, "alone", defaults[name]) for name, values in ablations.items()],
        [_pixels(values, defaults[name]) for name, values in ablations.items()],
    ]
    labels = ("recognised of five, %", "recognised of one, %", "off by /255, five out")
    small_multiples(rows, file, labels=labels)


_NOTHING = float("nan")


def _recognised(name: str, values: Mapping[Any, Any], state: str, default: Any) -> Panel:
    lines = {
        label: [
            100 * Proportion(*rows[state][figure]).share if figure in rows[state] else _NOTHING
            for rows in values.values()
        ]
        for figure, label in _FIGURES.items()
    }
    title = _CALLED.get(name, name) if state == "five" else ""
    return _panel(title, values, lines, default)


def _pixels(values: Mapping[Any, Any], default: Any) -> Panel:
    """How far pictures are from the original model's while five are out."""
    found = [rows["five"] for rows in values.values()]
    lines = {
        "kept, moved": [row.get("moved", _NOTHING) for row in found],
        "restored": [row.get("restored", {}).get("pixels", _NOTHING) for row in found],
    }
    return _panel("", values, lines, default)


def _panel(
    title: str, values: Mapping[Any, Any], lines: Mapping[str, list[float]], default: Any
) -> Panel:
    keys = list(values)
    marked = keys.index(default) if default in keys else None
    return Panel(title, [_value(value) for value in keys], lines, marked)
