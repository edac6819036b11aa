"""The figures of `benchmarks.evidence` as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from sepme_cli.evaluation.intervals import Proportion

Row = Mapping[str, Any]
Entries = Mapping[str, Row]

_METHODS = ("closed-form", "sepme")
#: What a row says, how its figure is called, and whether more of it is worse.
_FIGURES = (
    ("erased", "erased", True),
    ("erased, phrasings never seen", "unseen", True),
    ("the others of its kind", "same_domain", False),
    ("the other kind", "other_domain", False),
    ("the other kind, drawn with the erased concept", "other_domain_in_erased", False),
)


def table(entries: Entries) -> str:
    """Every style and every object erased in turn, then several in one patch."""
    alone = [
        _alone(f"{method}, one {kind} erased", rows)
        for method in _METHODS
        for kind in ("style", "object")
        if (rows := _rows(entries, method, kind))
    ]
    together = [
        _several(f"{method}, {label} concepts in one patch", found)
        for method, label, found in _together(entries)
    ]
    return "\n\n".join(alone + together)


def summary(entries: Entries) -> str:
    """All of it in one table: one line for each kind or number of concepts and method."""
    lines = [
        "| erased | recognised after | in phrasings never seen | everything else | restored |",
        "|---|---|---|---|---|",
    ]
    for method in _METHODS:
        for kind in ("style", "object"):
            if rows := list(_rows(entries, method, kind).values()):
                kept = [_pooled(rows, f, "after") for f in ("same_domain", "other_domain")]
                figures = [_pooled(rows, f, "after") for f in ("erased", "unseen")]
                what = f"each of {len(rows)} {kind}s alone, {method}"
                lines.append(_line(what, *figures, sum(kept, Proportion(0, 0)), ""))
    for method, label, found in _together(entries):
        kept = [Proportion(*found[f"kept_{kind}"]["after"]) for kind in ("style", "object")]
        back = max(b["pixel_difference_on_other_prompts"] for b in found["restored"].values())
        said = f"one of them: at most {back:.2f}/255 off"
        what = f"{label} concepts at once, {method}"
        lines.append(_line(what, _out(found, "after"), "", sum(kept, Proportion(0, 0)), said))
    return "\n".join(lines)


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _rows(entries: Entries, method: str, kind: str) -> dict[str, Row]:
    """The concepts of a kind that were erased alone."""
    start = f"alone/{method}/{kind}:"
    return {key.removeprefix(start): row for key, row in entries.items() if key.startswith(start)}


def _together(entries: Entries) -> Iterator[tuple[str, str, Row]]:
    """(method, how many concepts, what was found) of every patch of several, methods in order."""
    for method in _METHODS:
        for label in ("three", "ten"):
            if found := entries.get(f"together/{method}/{label}"):
                yield method, label, found


def _alone(title: str, rows: Mapping[str, Row]) -> str:
    every = list(rows.values())
    lines = [f"**{title}** ({len(rows)} concepts in turn)", ""]
    lines += ["| recognised | before | after | worst concept |", "|---|---|---|---|"]
    for label, figure, highest in _FIGURES:
        before, after = (_pooled(every, figure, when) for when in ("before", "after"))
        lines.append(_line(label, before, after, _worst(rows, figure, highest=highest)))
    seconds, size = (median(row[name] for row in every) for name in ("seconds", "bytes"))
    return "\n".join([*lines, "", f"median {seconds:.1f} s and {size / 1024:.0f} KiB a concept"])


def _several(title: str, found: Row) -> str:
    lines = [f"**{title}** ({found['seconds']:.1f} s)", ""]
    lines += ["| | before | after |", "|---|---|---|"]
    lines.append(_line("the erased concepts", _out(found, "before"), _out(found, "after")))
    for kind in ("style", "object"):
        before, after = (Proportion(*found[f"kept_{kind}"][when]) for when in ("before", "after"))
        lines.append(_line(f"{kind}s of pairs that name none of them", before, after))
    lines += [_back(name, back) for name, back in found["restored"].items()]
    return "\n".join(lines)


def _back(name: str, back: Row) -> str:
    """One concept back while the others stay out."""
    still = sum((Proportion(*c) for c in back["others_still_out"].values()), Proportion(0, 0))
    return _line(
        f"{name}, restored while the others stay out",
        Proportion(*back["before"]),
        f"{Proportion(*back['after'])}; pixels differ by "
        f"{back['pixel_difference_on_its_prompts']:.2f}/255 on its own prompts, "
        f"{back['pixel_difference_on_other_prompts']:.2f}/255 on others; "
        f"the others are still recognised in {still}",
    )


def _out(found: Row, when: str) -> Proportion:
    return sum((Proportion(*c[when]) for c in found["concepts"].values()), Proportion(0, 0))


def _pooled(rows: Sequence[Row], figure: str, when: str) -> Proportion:
    return sum((Proportion(*row[figure][when]) for row in rows), Proportion(0, 0))


def _worst(rows: Mapping[str, Row], figure: str, *, highest: bool) -> str:
    """The concept that fares worst, and its figure after."""
    share = {name: Proportion(*row[figure]["after"]).share for name, row in rows.items()}
    name = (max if highest else min)(share, key=share.__getitem__)
    return f"{100 * share[name]:.0f}% ({name})"
