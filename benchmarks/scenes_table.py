"""A scene of `benchmarks.scenes` as Markdown: a row a concept, a column a time."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from sepme_cli.evaluation.intervals import Proportion

Row = Mapping[str, Any]
_ROLES = ("erased", "restored", "regular")


def role(name: str, nth: int, outs: Sequence[Sequence[str]]) -> str:
    """What a concept is at the nth time. outs: the concepts that are out at each time."""
    if name in outs[nth]:
        return "erased"
    return "restored" if any(name in out for out in outs[:nth]) else "regular"


def table(
    title: str, names: Sequence[str], outs: Sequence[Sequence[str]], rows: Sequence[Row]
) -> str:
    """names: the concepts. outs: those that are out at each time, none at the first. rows: what
    was found at each time."""
    times = range(len(rows))
    lines = [f"**{title}**", "", _line(["", *(_happened(t, outs) for t in times)])]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in names:
        lines.append(_line([name, *(_cell(name, role(name, t, outs), rows[t]) for t in times)]))
    for each in _ROLES:
        groups = [[name for name in names if role(name, t, outs) == each] for t in times]
        pooled = (_pooled(each, group, row) for group, row in zip(groups, rows, strict=True))
        lines.append(_line([f"all {each}", *pooled]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _happened(nth: int, outs: Sequence[Sequence[str]]) -> str:
    """A column's head: what goes out and what comes back."""
    if nth == 0:
        return "before"
    gone = [name for name in outs[nth] if name not in outs[nth - 1]]
    back = [name for name in outs[nth - 1] if name not in outs[nth]]
    said = (("out:", gone), ("back:", back))
    return "; ".join(f"{what} {', '.join(names)}" for what, names in said if names)


def _cell(name: str, role: str, row: Row) -> str:
    """A share in percent: bold while erased; with the pixels' distance while restored."""
    share = f"{100 * Proportion(*row['recognised'][name]).share:.0f}"
    if role == "erased":
        return f"**{share}**"
    return f"*{share}* ({row['pixels'][name]:.2f})" if role == "restored" else share


def _pooled(role: str, names: Sequence[str], row: Row) -> str:
    """All concepts of a role: their share; the pixels' mean distance where there should be none."""
    if not names:
        return ""
    share = sum((Proportion(*row["recognised"][name]) for name in names), Proportion(0, 0))
    pixels = mean(row["pixels"][name] for name in names)
    return str(share) if role == "erased" else f"{share} ({pixels:.2f})"
