"""macOS and Windows, as far as that can be told on Linux: without what those do not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sepme_cli.operations.apply import apply
from tests.layouts import write_folder
from tests.platforms.lacking import SYSTEMS
from tests.synthetic import checkpoint_tensors, make_checkpoint, make_patches

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, patches, and what Linux makes of them."""
    folder = tmp_path_factory.mktemp("made")
    model = make_checkpoint(folder / "m.safetensors")
    monet, _ = make_patches(folder, model, ["Monet", "Klimt"])
    write_folder(folder / "model", checkpoint_tensors())
    apply(model, [monet], folder / "clean.safetensors")
    apply(folder / "model", [monet], folder / "clean")
    return folder


def run_like(system: str, made: Path, *tests: str) -> str:
    """What pytest says of tests that it runs in a process like that system's."""
    plain = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.platforms.lacking", *plain, *tests],
        env={**os.environ, "SEPME_AS": system, "SEPME_FOLDER": str(made)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("system", SYSTEMS)
def test_files_are_written_as_on_linux(system: str, made: Path) -> None:
    assert "6 passed" in run_like(system, made, "tests/platforms/elsewhere.py")


@pytest.mark.parametrize("system", SYSTEMS)
def test_patches_are_applied_in_other_programs(system: str, made: Path) -> None:
    """ComfyUI's nodes and the web UIs' extension, whose users are mostly on Windows. No system
    has dtypes of its own: one is enough."""
    tests = ("tests/test_comfyui.py", "tests/test_webui.py", "-k", "not F32 and not BF16")
    assert " passed" in run_like(system, made, *tests)
