import pytest
import typer.main

from sepme_cli import app


@pytest.fixture(autouse=True)
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer builds its parser anew in every run, which is most of what one takes here."""
    command = typer.main.get_command(app.app)
    monkeypatch.setattr(typer.main, "get_command", lambda app: command)
