"""What an erasure would do, as a person reads it."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from sepme_cli.render.tables import add_row, counted, fields, new_table
from sepme_cli.render.wording import duration, printable

if TYPE_CHECKING:
    from sepme_cli.operations.plan import ErasePlan


def erasure(result: "ErasePlan") -> RenderableType:
    """The concepts, one a row, then what else is beside them and in each other's way."""
    parts: list[RenderableType] = [_concepts(result)]
    if result.crowded:
        table = new_table("in each other's way", "", "interference")
        for pair in result.crowded:
            add_row(table, *pair.concepts, pair.interference)
        parts += ["", table]
    parts += ["", *_beside(result), "", _strengths(result)]
    if result.refused:
        parts += ["", "erase would refuse this without --force-collateral"]
    said = fields(
        ("output", "nothing is written: this is a check"),
        ("for", f"{result.base.family}, {counted(result.base.targets, 'weight')}"),
        ("method", result.method),
        ("recipe", result.recipe),
        ("time", f"about {duration(result.expected_seconds)}"),
    )
    return Group(*parts, "", said)


def _concepts(result: "ErasePlan") -> RenderableType:
    table = new_table(
        "concept", "taken for", "acts like", "separability", "leakage", "rank", "dimensions taken"
    )
    for concept in result.concepts:
        share = round(100 * concept.taken / result.width)
        taken = f"{concept.taken} of {result.width} ({share}%)"
        add_row(
            table,
            concept.concept,
            concept.taken_for,
            concept.like,
            concept.separability,
            concept.leakage,
            concept.rank,
            taken,
        )
    return table


def _beside(result: "ErasePlan") -> list[RenderableType]:
    """What lies beside each concept: what stays, what goes with it, what changes most."""
    lines = []
    for concept in result.concepts:
        if concept.neighbours:
            lines.append(f"{concept.concept}: protected: {', '.join(concept.neighbours)}")
        if concept.aliases:
            lines.append(f"{concept.concept}: erased with it: {', '.join(concept.aliases)}")
        elif concept.nearly:
            near = (f"{word.word} ({word.nearness:.2f})" for word in concept.nearly)
            lines.append(
                f"{concept.concept}: nearly the same, neither erased nor protected: "
                f"{', '.join(near)}"
            )
        if concept.drags:
            words = (f"{d.word} ({d.change:.0%})" for d in concept.drags)
            lines.append(f"{concept.concept}: words that change most: {', '.join(words)}")
    return [printable(line) for line in lines]


def _strengths(result: "ErasePlan") -> RenderableType:
    """What more and less protection would come to, all concepts together."""
    heads = ("protection", "separability", "captions that name no concept move by", "19 in 20 by")
    table = new_table(*heads)
    for strength in result.strengths:
        chosen = " (chosen)" if strength.protection == result.protection else ""
        beside = strength.collateral
        add_row(
            table,
            f"{strength.protection:g}{chosen}",
            strength.separability,
            None if beside is None else f"{beside.median:.0%}",
            None if beside is None else f"{beside.p95:.0%}",
        )
    return table
