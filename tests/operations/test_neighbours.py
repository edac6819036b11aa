"""What other users of the machine may leave in a folder that they can write to too."""

import os
from pathlib import Path

import pytest

from sepme_cli.checkpoints.journals import in_place
from sepme_cli.errors import SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.operations.inspect import inspect
from sepme_cli.operations.revert import revert
from tests.synthetic import make_checkpoint, make_patches


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return make_checkpoint(tmp_path / "shared" / "model.safetensors")


@pytest.fixture
def patches(model: Path, tmp_path: Path) -> list[Path]:
    (tmp_path / "patches").mkdir()
    return make_patches(tmp_path / "patches", model, ["Monet", "Klimt"])


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["sepme-undo", "sepme-pending", "sepme-applied"])
def test_a_link_where_sepme_keeps_its_own_is_not_followed(
    name: str, model: Path, patches: list[Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    target = patches[0].parent if name == "sepme-applied" else mine
    link = model.with_name(f"{model.name}.{name}")
    link.symlink_to(target)
    before = everything(tmp_path)
    with pytest.raises(SystemFailure, match="not a file of your own"):
        apply(model, patches[:1], in_place=True)
    assert everything(tmp_path) == before
    link.unlink()
    apply(model, patches[:1], in_place=True)
    assert revert(model, in_place=True).exact


def cut_short(model: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave what a machine that went down in the middle leaves; the pending journal."""

    def down(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "_put", down)
        patch.setattr(in_place, "remove", down)
        with pytest.raises(KeyboardInterrupt):
            apply(model, patches, in_place=True)
    return model.with_name(f"{model.name}.sepme-pending")


def test_a_journal_of_another_user_moves_nothing(
    model: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, before = cut_short(model, patches, monkeypatch), model.read_bytes()
    assert journal.exists()
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(journal, 12345, -1)
    for open_it in (inspect, lambda path: apply(path, patches, in_place=True)):
        with pytest.raises(SystemFailure, match="not a file of your own"):
            open_it(model)
    assert model.read_bytes() == before
    # Of a checkpoint that is that user's it is obeyed: somebody of a group goes on for another.
    os.chown(model, 12345, -1)
    assert inspect(model).kind == "checkpoint"
    assert not journal.exists()
