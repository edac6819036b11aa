"""Names and values below each other, and tables: what `render` puts results into."""

from typing import TYPE_CHECKING

from rich.table import Table

from sepme_cli.render.wording import printable

if TYPE_CHECKING:
    from sepme_cli.planning.survey import BaseSummary


def new_table(*names: str) -> Table:
    """A table without rules, its columns so named."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(printable(name), overflow="fold")
    return table


def add_row(table: Table, *cells: str | float | None) -> None:
    """One more row; see `cell_text`."""
    table.add_row(*(printable(cell_text(cell)) for cell in cells))


def fields(*named: tuple[str, str | None]) -> Table:
    """Names and values below each other; a value of None is left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in named:
        if value is not None:
            grid.add_row(name, printable(value))
    return grid


def cell_text(value: str | float | None) -> str:
    """A dash for nothing, three digits of a number with a fraction."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def counted(number: int, noun: str) -> str:
    """1 tensor, 2 tensors."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def made_for(base: "BaseSummary") -> str:
    """The family that a patch is for, and how many weights it may change where that is known."""
    if base.targets is None:
        return base.family
    return f"{base.family}, {counted(base.targets, 'weight')}"
