from collections.abc import Iterator

import pytest
import typer.main

from sepme_cli import app


@pytest.fixture(autouse=True, scope="package")
def built_once() -> Iterator[None]:
    """Typer builds its parser anew in every run, which is most of what one takes here."""
    command = typer.main.get_command(app.program())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", lambda program: command)
        yield
