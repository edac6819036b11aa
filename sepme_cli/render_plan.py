"""What an erasure would do, as a person reads it."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from sepme_cli.tables import add_row, cell_text, counted, fields, new_table
from sepme_cli.wording import duration, printable

if TYPE_CHECKING:
    from sepme_cli.operations.plan import ErasePlan


def plan(result: "ErasePlan") -> RenderableType:
    """The concepts, one a row, then what else is beside them and in each other's way."""
    parts: list[RenderableType] = [_concepts(result)]
    if result.crowded:
        table = new_table("in each other's way", "", "interference")
        for pair in result.crowded:
            add_row(table, *pair.concepts, pair.interference)
        parts += ["", table]
    parts += ["", *_beside(result)]
    said = fields(
        ("output", "nothing is written: this is a check"),
        ("for", f"{result.base.family}, {counted(result.base.targets, 'weight')}"),
        ("method", result.method),
        ("recipe", result.recipe),
        ("time", f"about {duration(result.expected_seconds)}"),
    )
    return Group(*parts, "", said)


def _concepts(result: "ErasePlan") -> RenderableType:
    table = new_table("concept", "acts like", "separability", "leakage", "rank", "dimensions taken")
    for concept in result.concepts:
        share = round(100 * concept.taken / result.width)
        taken = f"{concept.taken} of {result.width} ({share}%)"
        add_row(
            table,
            *(concept.concept, concept.like, concept.separability, concept.leakage),
            *(concept.rank, taken),
        )
    return table


def _beside(result: "ErasePlan") -> list[RenderableType]:
    """The neighbours of each concept: those that stay, and those that would change."""
    lines = []
    for concept in result.concepts:
        if concept.neighbours:
            lines.append(
                f"{concept.concept} has its neighbours {', '.join(concept.neighbours)} stay"
            )
        words = (f"{d.word} ({cell_text(d.change)})" for d in concept.drags)
        lines.append(f"{concept.concept} drags along, of what is not protected: {', '.join(words)}")
    return [printable(line) for line in lines]
