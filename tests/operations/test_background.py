"""The background is computed once, kept whole or not at all, and never decides the patch."""

import io
import os
from pathlib import Path

import pytest
import torch

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.background import Background
from sepme_cli.erasure.settings import Settings
from sepme_cli.operations.erase import erase
from sepme_cli.planning import background as module
from sepme_cli.planning.background import background_of, cache_folder
from sepme_cli.progress import Progress

SETTINGS = Settings(rank=2, collateral=10.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


class Told(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.said.append(name)

    def say(self, message: str) -> None:
        self.said.append(message)


def patch(model: Path, *, cache: bool = True) -> bytes:
    stream = io.BytesIO()
    erase(model, ["ink"], output=stream, settings=SETTINGS, cache=cache)
    return stream.getvalue()


def test_the_patch_is_the_same_without_with_and_after_the_cache(
    small_model: Path, cache: Path
) -> None:
    without = patch(small_model, cache=False)
    assert not cache.exists()
    first = patch(small_model)
    (file,) = cache.iterdir()
    kept = file.read_bytes()
    again = patch(small_model)
    assert without == first == again
    assert file.read_bytes() == kept


def test_it_is_computed_once(
    small_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(small_model)

    def never(*_: object) -> Background:
        raise AssertionError("computed again")

    monkeypatch.setattr(module.Background, "of", never)
    patch(small_model)
    with pytest.raises(AssertionError, match="again"):
        patch(small_model, cache=False)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text", "folder"])
def test_a_damaged_file_is_made_anew(small_model: Path, cache: Path, damage: str) -> None:
    expected = patch(small_model)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        changed = bytearray(whole)
        changed[-1] ^= 1
        file.write_bytes(
            {"cut": whole[:-9], "changed": bytes(changed), "empty": b"", "text": b"hello"}[damage]
        )
    assert patch(small_model) == expected
    if damage != "folder":
        assert file.read_bytes() == whole


def test_where_nothing_can_be_kept_it_is_said_and_the_work_goes_on(
    small_model: Path, cache: Path
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"in the way")
    told = Told()
    stream = io.BytesIO()
    erase(small_model, ["ink"], output=stream, settings=SETTINGS, progress=told)
    assert stream.getvalue() == patch(small_model, cache=False)
    assert any("cannot be kept" in said for said in told.said)


def test_another_text_encoder_has_another_one(small_model: Path, tmp_path: Path) -> None:
    from tests.small_model import save_small_model

    other = tmp_path / "other.safetensors"
    save_small_model(other, seed=5)
    found = []
    for path in (small_model, other):
        with open_checkpoint(path) as checkpoint:
            network = StableDiffusion.of(checkpoint, torch.device("cpu"))
            found.append(background_of(network.text, checkpoint.base(text_encoders=True)))
    assert len(os.listdir(cache_folder())) == 2
    assert not found[0].moment.equal(found[1].moment)
