"""Small multiples: one figure of several panels, each with the same lines over its own values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed, nor looked for
from matplotlib import pyplot
from matplotlib.axes import Axes

#: Told apart by people who see colours differently (Okabe and Ito 2008).
_COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")
_MARKS = "osD^vX"


@dataclass(frozen=True)
class Panel:
    """values: labels along x, evenly spaced. lines: name -> a figure for each value. marked: which
    value has a grey bar behind it, if any."""

    title: str
    values: Sequence[str]
    lines: Mapping[str, Sequence[float]]
    marked: int | None = None


def small_multiples(
    rows: Sequence[Sequence[Panel]], file: Path, *, labels: Sequence[str], height: float = 1.9
) -> None:
    """Draw rows of panels to a PNG; the panels of a row share their y axis and its label. A line's
    name has one look in all of them, and one entry in the legend above."""
    across = max(map(len, rows))
    names = dict.fromkeys(name for panels in rows for panel in panels for name in panel.lines)
    figure, axes = pyplot.subplots(
        len(rows),
        across,
        figsize=(2.1 * across, height * len(rows) + 0.5),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for drawn, panels, label in zip(axes, rows, labels, strict=True):
        drawn[0].set_ylabel(label, fontsize=8)
        for axis in drawn[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(drawn, panels, strict=False):
            _draw(axis, panel, list(names))
    handles = {
        text: handle
        for drawn in axes
        for handle, text in zip(*drawn[0].get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=across,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axis: Axes, panel: Panel, names: Sequence[str]) -> None:
    if panel.marked is not None:
        axis.axvline(panel.marked, color="#dddddd", linewidth=4, zorder=0)
    places = range(len(panel.values))
    for name, figures in panel.lines.items():
        i = names.index(name)
        axis.plot(
            places,
            figures,
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKS[i % len(_MARKS)],
            markersize=3.5,
            linewidth=1.3,
            label=name,
        )
    axis.set_title(panel.title, fontsize=9)
    axis.set_xticks(places, panel.values)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_axisbelow(True)
