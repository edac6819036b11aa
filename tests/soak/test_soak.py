"""A thousand random operations on a checkpoint, and after each one the very bytes there must be."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.soak import Soak


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power failure shows what was not synced; here processes die."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder that no disk is behind, where there is one: a thousand steps then take seconds."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_thousand_operations_on_one_checkpoint(memory: Path) -> None:
    soak = Soak.of(memory, "few tensors", "F16", seed=1)
    soak.run(1000)
    assert min(soak.done[name] for name in ("died", "outlived", "exact", "not exact")) > 20
    assert soak.done["refused"] > 100


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("few tensors", "F32"),
        ("few tensors", "F64"),
        ("folder", "BF16"),
        ("shards", "F16"),
        ("variants", "F32"),
        ("fp8", "F16"),
        ("scaled fp8", "F16"),
        ("UNet in diffusers names", "BF16"),
    ],
)
def test_other_shapes_and_dtypes(layout: str, dtype: str, tmp_path: Path) -> None:
    soak = Soak.of(tmp_path, layout, dtype, seed=2)
    soak.run(50)
    assert soak.done["exact"] > 4
