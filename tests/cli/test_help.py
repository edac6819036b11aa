"""Help is quick, has an example for every command, and tells of every option."""

import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.synthetic import make_checkpoint, make_patches

COMMANDS = (
    "erase", "apply", "revert", "diff", "inspect", "verify", "sign", "sample", "evaluate", "attack",
    "card", "export", "import", "example", "recipe",
)  # fmt: skip
GROUPED = ("recipe init", "recipe check")
HEAVY = {"torch", "numpy", "diffusers", "transformers", "PIL", "huggingface_hub"}
#: By apply, of one file to another, off a terminal: other commands, their defaults, bars.
UNUSED = {
    "sepme_cli.commands.erase", "sepme_cli.diffusion", "sepme_cli.erasure",
    "sepme_cli.evaluation.protocol", "rich.progress", *HEAVY - {"numpy"},
}  # fmt: skip


@pytest.mark.parametrize("command", [*COMMANDS, *GROUPED])
def test_help_shows_an_example_of_the_command(sepme: Run, command: str) -> None:
    done = sepme(*command.split(), "--help")
    assert done.status == 0
    assert re.search(rf"Examples?:\n\n    sepme .*\b{command}\b", done.out.decode())
    assert done.err == ""


def test_help_lists_every_command_in_one_line(sepme: Run) -> None:
    text = sepme("--help").out.decode()
    listed = re.findall(r"^  (\w+) +\S.*$", text.partition("Commands:")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS
    assert "..." not in text.partition("Commands:")[2]


def test_help_fits_a_terminal(sepme: Run) -> None:
    for command in (*COMMANDS, *GROUPED):
        lines = sepme(*command.split(), "--help").out.decode().splitlines()
        assert max(len(line) for line in lines if "sepme" not in line) <= 80


def test_without_a_command_it_shows_the_help_and_says_that_this_is_no_use(sepme: Run) -> None:
    done = sepme()
    assert done.status == 2
    assert b"Commands:" in done.out


def test_version_is_that_of_the_package(sepme: Run) -> None:
    assert sepme("--version").out.decode() == f"sepme {metadata.version('sepme')}\n"


@pytest.mark.parametrize(
    "line", ["--help", "--version", "erase --help", "apply", "erase x --nonsense", "nonsense"]
)
def test_help_and_usage_errors_load_nothing_heavy(line: str) -> None:
    code = (
        "import sys\nfrom sepme_cli.app import run\n"
        f"run({line.split()!r})\n"
        f"print(*({HEAVY!r} & set(sys.modules)), file=sys.stderr, sep='!')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr.decode().splitlines()[-1:] == [""]


@pytest.mark.parametrize("line", ["--help", "erase --help", "erase x --nonsense", "nonsense"])
def test_help_and_usage_errors_answer_at_once(line: str, process: Run) -> None:
    def seconds() -> float:
        """Of the processor, not of the clock: other work on the machine must not count."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process(*line.split())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # A shared machine makes a processor slower now and then, and never faster.
    assert any(seconds() < 0.4 for _ in range(6))


def test_applying_waits_for_no_more_than_it_uses(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model.safetensors")
    patch, *_ = make_patches(tmp_path, model)
    line = ["apply", str(model), str(patch), "-o", str(tmp_path / "out.safetensors")]
    code = (
        "import sys\nfrom sepme_cli.app import run\n"
        f"status = run({line!r})\n"
        f"print(status, *{UNUSED!r} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr.decode().splitlines()[-1] == "0"
