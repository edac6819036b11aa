"""Running `sepme`: in this process, which is quick, or in one of its own, as scripts do."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sepme_cli.app import run

SEPME = Path(sys.executable).parent / "sepme"


@dataclass(frozen=True)
class Finished:
    """What a run left: its exit status and what it wrote."""

    status: int
    out: bytes
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as one JSON object and nothing else; standard error silent."""
        assert self.err == ""
        return parse_object(self.out.decode())


def parse_object(text: str) -> dict[str, Any]:
    """One JSON object in strict JSON (no NaN), with nothing after it."""
    value = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert isinstance(value, dict)
    return value


Run = Callable[..., Finished]


@pytest.fixture
def sepme(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `sepme` in this process and folder; arguments as on the command line."""

    def sepme(*arguments: object, stdin: bytes = b"") -> Finished:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = run([str(argument) for argument in arguments])
        sys.stdout.flush()
        written = capfdbinary.readouterr()
        return Finished(status, written.out, written.err.decode())

    return sepme


@pytest.fixture
def process() -> Run:
    """Runs the installed `sepme` in a process of its own, in this folder."""

    def process(*arguments: object, stdin: bytes = b"") -> Finished:
        done = subprocess.run(
            [SEPME, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            timeout=120,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr.decode())

    return process


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files good and bad; not to be changed."""
    from tests.cli.files import make_files

    folder = tmp_path_factory.mktemp("scene")
    make_files(folder)
    return folder
