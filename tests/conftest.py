import os
import shutil
import tempfile
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """One cache folder for the whole run, which its workers share: each text encoder of the tests
    is looked at once."""
    if not hasattr(config, "workerinput"):
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sepme-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion with random weights; see `tests.small_model`. Do not write to it."""
    from tests.small_model import save_small_model

    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_small_model(path)
    return path
