"""Run by `test_platforms` in a process that is like macOS or Windows; see `lacking`.

SEPME_FOLDER is where the suite's own process has left a model, patches, and what it made of them.
"""

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.checkpoints.disk.output import write_output
from sepme_cli.errors import SystemFailure, UsageError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.revert import revert
from tests.platforms.lacking import MODULES, NAMES

SYSTEM = os.environ["SEPME_AS"]
WINDOWS = SYSTEM == "windows"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    shutil.copytree(os.environ["SEPME_FOLDER"], tmp_path / "here")
    return tmp_path / "here"


def same(a: Path, b: Path) -> bool:
    if a.is_file():
        return a.read_bytes() == b.read_bytes()
    names = sorted(path.relative_to(a) for path in a.rglob("*"))
    return names == sorted(path.relative_to(b) for path in b.rglob("*")) and all(
        same(a / name, b / name) for name in names if (a / name).is_file()
    )


def test_it_is_elsewhere() -> None:
    for name in MODULES[SYSTEM]:
        with pytest.raises(ImportError):
            import_module(name)
    assert not [name for name in NAMES[SYSTEM] if hasattr(os, name)]
    assert sys.modules["sepme_cli.checkpoints.disk.system"]


def test_apply_and_revert_write_the_same_bytes(here: Path) -> None:
    before = set(os.listdir(here))
    apply(here / "m.safetensors", [here / "monet.sepme"], here / "new.safetensors")
    assert same(here / "new.safetensors", here / "clean.safetensors")
    apply(here / "m.safetensors", [here / "klimt.sepme"], here / "new.safetensors", force=True)
    assert not same(here / "new.safetensors", here / "clean.safetensors")
    revert(here / "new.safetensors", base=here / "m.safetensors", output=here / "back.safetensors")
    assert same(here / "back.safetensors", here / "m.safetensors")
    assert set(os.listdir(here)) == {*before, "new.safetensors", "back.safetensors"}


def test_a_folder_too(here: Path) -> None:
    for force in (False, True):
        apply(here / "model", [here / "monet.sepme"], here / "new", force=force)
        assert same(here / "new", here / "clean")
    assert not [name for name in os.listdir(here) if "sepme-" in name]


def test_in_place_it_is_written_or_refused(here: Path) -> None:
    model, original = here / "m.safetensors", (here / "m.safetensors").read_bytes()
    before = set(os.listdir(here))
    if WINDOWS:
        for name, patch in (("m.safetensors", "monet.sepme"), ("model", "monet.sepme")):
            with pytest.raises(UsageError, match="cannot replace a file that is open"):
                apply(here / name, [here / patch], in_place=True)
        with pytest.raises(UsageError, match="would be lost"):
            apply(model, [here / "monet.sepme"], model, force=True)
        with pytest.raises(UsageError, match="cannot replace a file that is open"):
            revert(here / "clean.safetensors", in_place=True)
    else:
        apply(model, [here / "monet.sepme"], in_place=True)
        assert same(model, here / "clean.safetensors")
        apply(model, [here / "klimt.sepme"], in_place=True)
        revert(model, in_place=True)
    assert model.read_bytes() == original
    assert set(os.listdir(here)) == before


def test_what_is_open_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with path.open("rb"):
        if WINDOWS:
            with pytest.raises(SystemFailure, match="a program has it open"):
                write_output(path, b"new", force=True)
            assert path.read_bytes() == b"old"
        else:
            write_output(path, b"new", force=True)
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with only_writer(path):
        with pytest.raises(SystemFailure, match="busy"):
            write_output(path, b"mine", force=False)
        assert os.listdir(tmp_path) == [".f.sepme-lock"]
    write_output(path, b"mine", force=False)
    assert os.listdir(tmp_path) == ["f"]
