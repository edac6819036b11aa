"""Shells complete commands, options and the names of concepts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import SEPME

#: Typer looks which shell it runs in; this has it told instead.
TOLD = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
#: Asks bash itself what it would offer, with the script that sepme prints.
ASK = """
source <({sepme} --show-completion bash)
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_sepme_completion {sepme}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def offered(*words: str | Path) -> list[str]:
    """What bash offers for the last of the words."""
    script = ASK.format(sepme=SEPME)
    line = ["bash", "-c", script, "bash", "sepme", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=TOLD)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def test_commands_and_options() -> None:
    assert offered("app") == ["apply"]
    assert "--method" in offered("erase", "--m")
    assert offered("erase", "x", "--method", "se") == ["sepme"]


def test_concepts_of_the_patches_named(scene: Path) -> None:
    model, patch = scene / "model.safetensors", scene / "both.sepme"
    assert sorted(offered("apply", model, patch, "--only", "")) == ["Klimt", "Monet"]
    assert offered("apply", model, patch, "--only", "K") == ["Klimt"]


def test_concepts_that_are_out(scene: Path) -> None:
    assert offered("revert", scene / "clean.safetensors", "--concept", "") == ["Monet"]


@pytest.mark.parametrize("file", ["missing.sepme", "folder"])
def test_nothing_is_said_of_files_that_cannot_be_read(scene: Path, file: str) -> None:
    assert offered("apply", scene / file, "--only", "") == [""]


@pytest.mark.parametrize(
    ("shell", "words"),
    [("bash", "complete -o default"), ("zsh", "compdef"), ("fish", "complete --command")],
)
def test_every_shell_gets_a_script(shell: str, words: str, tmp_path: Path) -> None:
    line = [SEPME, "--show-completion", shell]
    environment = {**TOLD, "HOME": str(tmp_path)}
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    assert words in done.stdout and "_SEPME_COMPLETE" in done.stdout
    assert not list(tmp_path.iterdir())
