from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion with random weights; see `tests.small_model`. Do not write to it."""
    from tests.small_model import save_small_model

    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_small_model(path)
    return path
