"""What a run says while it works: bars on a terminal, lines elsewhere, nothing where asked."""

import io
import sys

import pytest

from sepme_cli.progress import Progress
from sepme_cli.render import console
from sepme_cli.render.bars import Bars
from sepme_cli.render.console import Lines, Output, Reporter


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def work(progress: Progress) -> None:
    progress.stage("drawing", 3)
    for _ in range(3):
        progress.advance()
    progress.say("about a minute")
    progress.warn("odd base")
    progress.warn("odd base")
    progress.stage("writing")


def test_lines_are_plain_and_a_warning_comes_once() -> None:
    stream = io.StringIO()
    lines = Lines(stream, verbose=False)
    work(lines)
    lines.close()
    assert stream.getvalue() == ("drawing\nabout a minute\nwarning: odd base\nwriting\n")
    assert lines.warnings == ["odd base"]


def test_verbose_says_what_each_stage_took() -> None:
    stream = io.StringIO()
    lines = Lines(stream, verbose=True)
    work(lines)
    lines.close()
    assert "drawing: done in 0.0 s\n" in stream.getvalue()
    assert stream.getvalue().endswith("writing: done in 0.0 s\n")


def test_a_long_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    stream = io.StringIO()
    lines = Lines(stream, verbose=False)
    lines.stage("drawing", 100)
    for now in range(1, 101):  # noqa: B007
        lines.advance()
    reports = stream.getvalue().splitlines()[1:]
    assert reports[0] == "drawing: 10 of 100, 1 min 30 s left"
    assert len(reports) == 9


def test_bars_are_gone_when_the_work_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    bars = Bars(stream, verbose=False)
    work(bars)
    bars.close()
    text = stream.getvalue()
    assert "3/3" in text
    assert "about a minute\n" in text
    # The last thing a bar does is to clear its line and to show the cursor again.
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


@pytest.mark.parametrize(
    ("manner", "kind"),
    [
        ({}, Lines),
        ({"verbose": True}, Lines),
        ({"quiet": True}, Reporter),
        ({"as_json": True}, Reporter),
        ({"as_json": True, "verbose": True}, Lines),
        ({"as_json": True, "verbose": True, "piped": True}, Reporter),
    ],
)
def test_who_reports(manner: dict[str, bool], kind: type) -> None:
    plain = {"as_json": False, "quiet": False, "verbose": False}
    assert type(Output(**(plain | manner)).progress) is kind


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert type(Output(as_json=False, quiet=False, verbose=False).progress) is Bars


def test_what_others_wrote_cannot_drive_the_terminal() -> None:
    stream = Terminal()
    lines = Lines(stream, verbose=False)
    lines.warn("concept \x1b[2J [bold]x[/bold] :smile: \udc80")
    assert r"concept \x1b[2J [bold]x[/bold] :smile: \udc80" in stream.getvalue()
