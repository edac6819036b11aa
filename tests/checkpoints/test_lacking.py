"""File systems that lack something: written all the same, said once, and nothing is left."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sepme_cli.checkpoints.disk import files
from sepme_cli.checkpoints.disk.files import new_file, only_writer, sweep, temporary
from sepme_cli.checkpoints.disk.output import write_output
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.errors import SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.operations.revert import revert
from sepme_cli.render.console import Reporter
from tests.layouts import write_folder
from tests.synthetic import checkpoint_tensors, make_checkpoint, make_patches

LONGEST = 255
ENDING = ".safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "m.safetensors")


@pytest.fixture
def patches(tmp_path: Path, model: Path) -> list[Path]:
    (tmp_path / "patches").mkdir()
    return make_patches(tmp_path / "patches", model, ["Monet", "Klimt"])


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def round_trip(model: Path, patches: list[Path], output: Path, reporter: Reporter) -> None:
    """All ways to write beside `output`, which end with what there was."""
    original = model.read_bytes()
    apply(model, patches, output, progress=reporter)
    written = output.read_bytes()
    apply(model, patches, output, force=True, progress=reporter)
    revert(output, base=model, in_place=True, progress=reporter)
    assert output.read_bytes() == original
    for patch in patches:
        apply(output, [patch], in_place=True, progress=reporter)
    assert output.read_bytes() == written
    revert(output, in_place=True, progress=reporter)
    assert output.read_bytes() == original


@pytest.mark.parametrize(
    "number",
    [
        *(errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL),
        *(errno.EACCES, errno.EPERM, errno.EIO, errno.EBADF),
    ],
    ids=errno.errorcode.get,
)
def test_without_locks(
    number: int, model: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := model.parent / "out").mkdir()
    monkeypatch.setattr(fcntl, "flock", failing(number))
    reporter = Reporter()
    round_trip(model, patches, out / "new.safetensors", reporter)
    assert os.listdir(out) == ["new.safetensors"]
    assert [text for text in reporter.warnings if "no locks" in text] == [
        f"{out}: there are no locks on this file system, so see to it that nothing else writes "
        "the same file"
    ]


def test_a_lock_that_is_held_is_no_lack_of_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SMB has another word for it."""
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        try:
            real(descriptor, how)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path / "f"):
        with pytest.raises(SystemFailure, match="busy"), only_writer(tmp_path / "f"):
            pytest.fail("two writers")
        assert os.listdir(tmp_path) == [".f.sepme-lock"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get
)
def test_without_modes_and_owners(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reporter = tmp_path / "f", Reporter()
    write_output(path, b"old", force=False)
    monkeypatch.setattr(os, "fchmod", failing(number))
    monkeypatch.setattr(os, "fchown", failing(number))
    write_output(path, b"new", force=True, progress=reporter)
    assert reporter.warnings == []  # it has the mode that it had
    path.chmod(0o604)
    for data in (b"newer", b"newest"):
        path.chmod(0o604)
        write_output(path, data, force=True, progress=reporter)
        assert path.read_bytes() == data
    assert len(reporter.warnings) == 1 and "permissions" in reporter.warnings[0]
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_without_modes(
    model: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(model.parent / "model", checkpoint_tensors())
    for path in folder.glob("*.*"):
        path.chmod(0o600)
    monkeypatch.setattr(os, "fchmod", failing(errno.EPERM))
    reporter = Reporter()
    apply(folder, patches, model.parent / "new", progress=reporter)
    assert len([text for text in reporter.warnings if "permissions" in text]) == 1
    assert (model.parent / "new" / "README.md").read_text() == "A model.\n"


@pytest.mark.parametrize("bytes_of_all", [0, 1])
def test_without_knowledge_of_the_room_left(
    bytes_of_all: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems say that they have no bytes at all; a full one says how many it has."""
    usage = SimpleNamespace(total=bytes_of_all, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    if bytes_of_all:
        with pytest.raises(SystemFailure, match="too little space"):
            write_output(tmp_path / "f", b"new", force=False)
    else:
        write_output(tmp_path / "f", b"new", force=False)
        assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize("lacking", ["holes", "calls"])
def test_without_holes_and_calls_of_linux(
    lacking: str, model: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lseek

    def lseek(descriptor: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_HOLE, os.SEEK_DATA):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, offset, whence)

    if lacking == "holes":
        monkeypatch.setattr(os, "lseek", lseek)
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    (out := model.parent / "out").mkdir()
    round_trip(model, patches, out / "new.safetensors", Reporter())
    assert os.listdir(out) == ["new.safetensors"]


def named(count: int, letter: str = "n") -> str:
    """A name of so many bytes."""
    room = count - len(ENDING)
    return letter * (room // len(letter.encode())) + "n" * (room % len(letter.encode())) + ENDING


@pytest.mark.parametrize("letter", ["n", "絵"])
@pytest.mark.parametrize("count", [LONGEST, LONGEST - 5, LONGEST - 11, LONGEST - 20, LONGEST - 40])
def test_names_near_the_limit(count: int, letter: str, model: Path, patches: list[Path]) -> None:
    (out := model.parent / "out").mkdir()
    round_trip(model, patches, out / named(count, letter), Reporter())
    assert os.listdir(out) == [named(count, letter)]


def test_a_lower_limit(model: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where file names are encrypted."""
    real = os.open

    def opened(path: Any, *rest: Any, **more: Any) -> int:
        assert len(os.fsencode(Path(path).name)) <= 143, path
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "pathconf", lambda path, name: 143)
    monkeypatch.setattr(os, "open", opened)
    (out := model.parent / "out").mkdir()
    round_trip(model, patches, out / named(143), Reporter())
    assert os.listdir(out) == [named(143)]


def test_a_folder_with_a_long_name(model: Path, patches: list[Path]) -> None:
    folder = write_folder(model.parent / "model", checkpoint_tensors())
    new = model.parent / ("f" * LONGEST)
    for force in (False, True):
        apply(folder, patches, new, force=force)
    assert not [name for name in os.listdir(model.parent) if ".sepme-" in name]


def test_long_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    one, other = (tmp_path / (letter.rjust(LONGEST, "n")) for letter in "ab")
    with only_writer(one):
        write_output(other, b"other", force=False)
        with pytest.raises(SystemFailure, match="busy"):
            write_output(one, b"one", force=False)


@pytest.mark.parametrize("count", [20, LONGEST - 20, LONGEST])
def test_what_a_killed_writer_left_is_swept(count: int, tmp_path: Path) -> None:
    path = tmp_path / named(count)
    ours = [temporary(file) for file in (path, undo_path(path), pending_path(path))]
    others = [temporary(tmp_path / named(count, "o")), path]
    for file in (*ours, *others):
        file.write_bytes(b"")
    sweep(path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_ordinary_names_are_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert temporary(path).name == f".m.safetensors.{os.getpid()}.sepme-tmp"
    assert undo_path(path).name == "m.safetensors.sepme-undo"
    assert pending_path(path).name == "m.safetensors.sepme-pending"
    assert files.companion(path, ".sepme-applied").name == "m.safetensors.sepme-applied"


def test_a_name_that_is_too_long_itself_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / ("n" * (LONGEST + 1))
    with pytest.raises(SystemFailure, match="too long"):
        write_output(path, b"new", force=False)
    with pytest.raises(SystemFailure, match="too long"), new_file(path, 3):
        pytest.fail("it was let in")
    assert os.listdir(tmp_path) == []
