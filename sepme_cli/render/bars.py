"""Progress on a terminal."""

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sepme_cli.render.console import Lines
from sepme_cli.render.wording import printable


class Bars(Lines):
    """A bar with the remaining time for the stage under way, gone when it is over."""

    _bars: Progress | None = None

    def _show_stage(self, name: str, total: int | None) -> None:
        counted = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            *((SpinnerColumn(), TimeElapsedColumn()) if total is None else counted),
            console=self.console,
            transient=True,
        )
        self._bars.add_task(printable(name).plain, total=total)
        self._bars.start()

    def _show_advance(self, steps: int) -> None:
        if self._bars is not None:
            self._bars.advance(self._bars.task_ids[0], steps)

    def _end_stage(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        super()._end_stage()
