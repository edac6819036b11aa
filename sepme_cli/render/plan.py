"""What an erasure would do, as a person reads it."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from sepme_cli.render.tables import add_row, fields, made_for, new_table
from sepme_cli.render.wording import duration, printable

if TYPE_CHECKING:
    from sepme_cli.operations.plan import ErasePlan

_STRENGTHS_LEGEND = (
    "collateral: relative change of keys and values for captions that name no concept, median and "
    "95th percentile"
)


def erasure(result: "ErasePlan") -> RenderableType:
    """The concepts, one per row, the words near them, conflicts, and strengths of protection."""
    parts: list[RenderableType] = [_concepts(result)]
    if result.crowded:
        table = new_table("conflict", "with", "interference")
        for pair in result.crowded:
            add_row(table, *pair.concepts, pair.interference)
        parts += ["", table]
    parts += ["", *_near(result), "", _strengths(result), _STRENGTHS_LEGEND]
    if result.refused:
        parts += ["", "erase would refuse this without --force-collateral"]
    rest = fields(
        ("output", "none: --check writes nothing"),
        ("for", made_for(result.base)),
        ("method", result.method),
        ("recipe", result.recipe),
        ("time", f"about {duration(result.expected_seconds)}"),
    )
    return Group(*parts, "", rest)


def _concepts(result: "ErasePlan") -> RenderableType:
    table = new_table(
        "concept", "kind", "anchor", "separability", "leakage", "rank", "dimensions used"
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


def _near(result: "ErasePlan") -> list[RenderableType]:
    """The words near each concept: protected, erased with it, and changed most."""
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
    """What more and less protection would give, for all concepts together."""
    table = new_table("protection", "separability", "collateral (median)", "collateral (95%)")
    for strength in result.strengths:
        chosen = " (chosen)" if strength.protection == result.protection else ""
        collateral = strength.collateral
        add_row(
            table,
            f"{strength.protection:g}{chosen}",
            strength.separability,
            None if collateral is None else f"{collateral.median:.0%}",
            None if collateral is None else f"{collateral.p95:.0%}",
        )
    return table
