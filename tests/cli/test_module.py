"""`python -m sepme_cli` is the command."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--version"], 0), ([], 2), (["inspect", "nowhere"], 5)]
)
def test_the_package_is_a_command(arguments: list[str], status: int) -> None:
    command = [sys.executable, "-m", "sepme_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert (done.stdout + done.stderr).startswith(("sepme ", "Usage: sepme ", "error: ", "\n"))
