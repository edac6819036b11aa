"""What `sepme erase MODEL --concept NAME` does, with nothing else said, on the English canvas.

    python -m benchmarks.bare run           # every concept in turn; goes on where it was
    python -m benchmarks.bare many          # 10, 50 and 100 at once, and five patches in a row
    python -m benchmarks.bare table         # the figures as Markdown; also synonyms, many-table

Nothing is told but the name: not its kind, no neighbour, no setting. Each concept is judged on
pictures that name it (in the canvas's phrasings, and in phrasings that neither the model's training
nor the tool holds), on its nearest neighbours, and on pictures that have nothing to do with it; the
same captions and seeds by the original stand beside each. Results go to docs/bare.json.
"""

import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.english import (
    MODEL,
    OBJECT_NAMES,
    STYLE_NAMES,
    SYNONYMS,
    Caption,
    English,
    caption,
    kind_of,
    probes,
    renamed,
)
from benchmarks.results import Results, counts
from patch_spec.container import read_patch
from patch_spec.increment import Increment
from sepme_cli.erasure.settings import Settings
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.operations.erase import EraseResult, erase

RESULTS = Path("docs/bare.json")
#: Concepts that defaults were chosen on; they are no part of what is reported. What else was looked
#: at while choosing stands in decision 6.
CHOSEN_ON = (
    "wolf", "rose", "car", "trumpet", "hammer", "bread", "eagle",
    "gouache", "crayon",
)  # fmt: skip

COUNTS = (10, 50, 100)

Aliases = Literal["none", "auto"]


def erased(
    canvas: English,
    names: Sequence[str],
    settings: Settings | None = None,
    aliases: Aliases = "none",
    **options: Any,
) -> tuple[EraseResult, tuple[Increment, ...]]:
    """The bare command, in Python: its result, and the increments of its patch."""
    stream = io.BytesIO()
    result = erase(
        canvas.model_path, names, output=stream, settings=settings, aliases=aliases, **options
    )
    return result, read_patch(stream.getvalue()).increments


def judge(
    canvas: English, names: Sequence[str], weights: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What is recognised of what, [hits, n], after and before; see `probes`."""
    shown = probes(names, canvas)
    flat = [one for captions in shown.values() for one in captions]
    before, after = canvas.before(flat), canvas.draw(flat, weights)
    moved = (after.pictures.float() - before.pictures.float()).abs().mean((1, 2, 3))
    found: dict[str, Any] = {}
    start = 0
    for part, captions in shown.items():
        here = torch.arange(start, start + len(captions))
        start += len(captions)
        for kind in ("style", "object"):
            if part in ("erased", "unseen"):
                named = torch.tensor(
                    [any(c.names(n) for n in names if kind_of(n) == kind) for c in captions],
                    dtype=torch.bool,
                )
                _count(found, f"{part} {kind}", before.of(kind), after.of(kind), here[named])
                beside = "beside " + kind if part == "erased" else None
                if beside:
                    _count(found, beside, before.of(kind), after.of(kind), here[~named])
            else:
                _count(found, f"{part} {kind}", before.of(kind), after.of(kind), here)
        if part == "others":
            found["moved"] = round(float(moved[here].mean()), 2)
    return found


def _count(
    found: dict[str, Any], name: str, before: torch.Tensor, after: torch.Tensor, here: torch.Tensor
) -> None:
    if len(here):
        found[name] = counts(after[here])
        found[f"{name}, before"] = counts(before[here])


def summary(result: EraseResult) -> dict[str, Any]:
    """What the tool said of an erasure."""
    beside = result.collateral
    return {
        "taken for": [one.taken_for for one in result.increments],
        "separability": [round(one.separability or 0, 3) for one in result.increments],
        "median": None if beside is None else round(beside.median, 4),
        "p95": None if beside is None else round(beside.p95, 4),
        "protection": result.protection,
        "bytes": result.bytes,
    }


def concept(canvas: English, name: str) -> dict[str, Any]:
    """One concept, bare; of one with synonyms, those too, bare and with --aliases auto."""
    result, increments = erased(canvas, [name])
    weights = canvas.patched(increments)
    found = {**summary(result), **judge(canvas, [name], weights)}
    if name in SYNONYMS:
        asked = synonyms(name)
        drawn = canvas.before(asked)
        found["synonyms, before"] = counts(drawn.object)
        found["synonyms"] = counts(canvas.draw(asked, weights).object)
        more, increments = erased(canvas, [name], aliases="auto")
        weights = canvas.patched(increments)
        found["aliases"] = list(more.increments[0].aliases)
        found["synonyms, aliases auto"] = counts(canvas.draw(asked, weights).object)
        found["aliases auto"] = judge(canvas, [name], weights)
    return found


def synonyms(name: str) -> list[Caption]:
    place = OBJECT_NAMES.index(name)
    return [
        renamed(caption(style, place), word)
        for word in SYNONYMS[name]
        for style in range(len(STYLE_NAMES))
    ]


def order() -> list[str]:
    """Styles, then objects as if drawn by lot, so that a run cut short is a fair sample."""
    objects = sorted(OBJECT_NAMES, key=lambda name: zlib.crc32(name.encode()))
    return [name for name in (*STYLE_NAMES, *objects) if name not in CHOSEN_ON]


def some(count: int) -> list[str]:
    """Objects to erase together, chosen as if by lot."""
    return [name for name in order() if kind_of(name) == "object"][-count:]


def many(canvas: English) -> Iterable[tuple[str, Callable[[], dict[str, Any]]]]:
    """Several concepts at once, and one patch after another."""
    for count in COUNTS:
        yield f"{count} at once", lambda count=count: together(canvas, some(count))  # type: ignore[misc]
    yield "five patches in a row", lambda: in_a_row(canvas, some(5))
    yield "one of ten restored", lambda: restored(canvas, some(10))


def together(canvas: English, names: Sequence[str]) -> dict[str, Any]:
    result, increments = erased(canvas, names, force_collateral=True)
    weights = canvas.patched(increments)
    return {
        **summary(result),
        **judge(canvas, names, weights),
        **everything_else(canvas, names, weights),
    }


def everything_else(
    canvas: English, names: Sequence[str], weights: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Every object that stays, once, its style with it."""
    kept = [
        caption(i % len(STYLE_NAMES), place)
        for i, place in enumerate(p for p, name in enumerate(OBJECT_NAMES) if name not in names)
    ]
    _, found = canvas.compare(kept, weights)
    return {f"all that stays: {name}": value for name, value in found.items()}


def in_a_row(canvas: English, names: Sequence[str]) -> dict[str, Any]:
    """Each concept in a patch of its own, which knows those before it."""
    folder = Path("build/english/in-a-row")
    folder.mkdir(parents=True, exist_ok=True)
    increments: list[Increment] = []
    for place, name in enumerate(names):
        stream = io.BytesIO()
        erase(canvas.model_path, [name], output=stream, known=list(folder.glob("*.sepme"))[:place])
        (folder / f"{place}.sepme").write_bytes(stream.getvalue())
        increments += read_patch(stream.getvalue()).increments
    for path in folder.glob("*.sepme"):
        path.unlink()
    return judge(canvas, names, canvas.patched(increments))


def restored(canvas: English, names: Sequence[str]) -> dict[str, Any]:
    """One of several put back: what it is drawn as, beside the original."""
    _, increments = erased(canvas, names, force_collateral=True)
    weights = canvas.patched([part for part in increments if part.concept != names[0]])
    shown = probes([names[0]], canvas)["erased"]
    _, found = canvas.compare(shown, weights)
    return found


_ROWS: tuple[tuple[str, str, str], ...] = (
    ("erased", "erased {kind}", "at most"),
    ("erased, unseen phrasings", "unseen {kind}", "at most"),
    ("objects beside it, or drawn in it", "beside {other}", "of before"),
    ("five nearest objects", "near object", "of before"),
    ("other objects", "others object", "of before"),
    ("other styles", "others style", "of before"),
)


def table() -> str:
    """Styles and objects, all concepts of each together."""
    entries = Results(RESULTS).entries
    lines = ["| | styles | objects |", "|---|---|---|"]
    for label, key, _ in _ROWS:
        cells = []
        for kind, other in (("style", "object"), ("object", "style")):
            name = key.format(kind=kind, other=other)
            rows = [row for n, row in entries.items() if _is(n, kind) and name in row]
            cells.append(_cell(rows, name))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for kind in ("style", "object"):
        done = sum(_is(name, kind) for name in entries)
        lines.append(f"| {kind}s judged | {done} | |")
    return "\n".join(lines)


def synonym_table() -> str:
    """Other words for erased objects: drawn before, after, and with --aliases auto."""
    entries = Results(RESULTS).entries
    heads = ("object", "its words", "drawn by the original", "bare", "`--aliases auto`", "taken in")
    lines = [f"| {' | '.join(heads)} |"]
    lines.append("|---|---|---|---|---|---|")
    keys = ("synonyms, before", "synonyms", "synonyms, aliases auto")
    known = {name: row for name in SYNONYMS if (row := entries.get(name)) and "synonyms" in row}
    for name, row in known.items():
        shares = " | ".join(f"{row[key][0]} of {row[key][1]}" for key in keys)
        words, taken = ", ".join(SYNONYMS[name]), ", ".join(row["aliases"]) or "none"
        lines.append(f"| {name} | {words} | {shares} | {taken} |")
    if known:
        totals = (
            str(sum((Proportion(*row[key]) for row in known.values()), Proportion(0, 0)))
            for key in keys
        )
        lines.append(f"| all | | {' | '.join(totals)} | |")
    return "\n".join(lines)


def many_table() -> str:
    """Several at once, and one after another."""
    entries = Results(RESULTS).entries
    heads = ("erased", "unseen phrasings", "nearest objects", "other objects", "other styles")
    lines = [f"| | {' | '.join(heads)} | others move by | protection | KiB |"]
    lines.append("|---" * (len(heads) + 4) + "|")
    keys = ("erased object", "unseen object", "near object", "others object", "others style")
    names = [*(f"{count} at once" for count in COUNTS), "five patches in a row"]
    for name in names:
        if row := entries.get(name):
            cells = [_cell([row], key) if key in row else "" for key in keys]
            protection = f"{row['protection']:g}" if "protection" in row else ""
            size = f"{row['bytes'] / 1024:.0f}" if "bytes" in row else ""
            told = f"{row['moved']}/255 | {protection} | {size}"
            lines.append(f"| {name} | {' | '.join(cells)} | {told} |")
    if row := entries.get("one of ten restored"):
        shown = Proportion(*row["object"])
        lines += ["", f"One of ten put back, nine still out: recognised in {shown} pictures,"]
        lines.append(f"which are {row['moved']}/255 from the original's.")
    return "\n".join(lines)


def _is(name: str, kind: str) -> bool:
    return name in (STYLE_NAMES if kind == "style" else OBJECT_NAMES)


def _cell(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    if not rows:
        return ""
    after = sum((Proportion(*row[name]) for row in rows), Proportion(0, 0))
    before = sum((Proportion(*row[f"{name}, before"]) for row in rows), Proportion(0, 0))
    return f"{after} (before: {100 * before.share:.1f}%)"


def main(stage: str = "run") -> None:
    tables = {"table": table, "synonyms": synonym_table, "many-table": many_table}
    if stage in tables:
        print(tables[stage]())
        return
    results, canvas = Results(RESULTS), English(MODEL)
    work = (
        [(name, lambda name=name: concept(canvas, name)) for name in order()]  # type: ignore[misc]
        if stage == "run"
        else many(canvas)
    )
    for name, make in work:
        print(name, json.dumps(results.get(name, make)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
