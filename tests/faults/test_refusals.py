"""A full disk, a limit, a failing disk, no rights: status 5, the old files, words that help."""

import errno
import os
import re
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.calls import WRITES, Faults, Refused
from tests.faults.runs import Ended, in_child, leftovers, of, run, tree
from tests.faults.scenes import (
    FOLDERS,
    FOLDERS_IN_PLACE,
    IN_PLACE,
    TO_FILES,
    Scene,
    Staged,
    stage,
)

#: One of each way of writing.
SOME = [TO_FILES[1], IN_PLACE[0], IN_PLACE[3], FOLDERS[0], FOLDERS_IN_PLACE[0]]


def refuse(staged: Staged, error: int, names: tuple[str, ...], *, lasting: bool) -> list[Ended]:
    """Refuse each call of those names until a run goes through; how each of them ended.

    Each leaves all as it was, or finished. Where the disk stays full, what lies beside a
    checkpoint may say of itself that it belongs to the other state, until the next command.
    """
    found: list[Ended] = []
    scene = staged.scene
    old, new = of(scene.target, staged.before), of(scene.target, staged.after)
    while True:
        here = staged.again()
        faults = Refused(len(found) + 1, error, names, lasting=lasting)
        ended = in_child(scene.line, here, faults)
        found.append(ended)
        now = tree(here)
        if any(name.endswith(".sepme-pending") for name in now):
            assert ended.status == 5 and "the next command restores the file" in ended.err
            assert "the file is restored" in run(f"inspect {scene.target}", here).err
            now = tree(here)
            assert of(scene.target, now) == old
        elif lasting:
            assert of(scene.target, now) in (old, new) and not leftovers(now), ended.err
        else:
            assert now in (staged.before, staged.after), ended.err
        if of(scene.target, now) == old:
            assert ended.status == 5
            assert run(scene.line, here).status == 0
            assert tree(here) == staged.after
        if sum(call.name in names for call in staged.calls) < len(found):
            assert ended.status == 0
            return found


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("scene", SOME, ids=str)
def test_a_disk_that_fills_up_at_every_write(scene: Scene, lasting: bool, tmp_path: Path) -> None:
    staged = stage(scene, tmp_path)
    for ended in refuse(staged, errno.ENOSPC, WRITES, lasting=lasting):
        assert ended.status in (0, 5)
        assert ended.status == 0 or re.search("disk is full|No space left", ended.err), ended.err


@pytest.mark.parametrize("scene", SOME, ids=str)
def test_a_disk_that_fails_at_every_sync_and_rename(scene: Scene, tmp_path: Path) -> None:
    """Where all that failed is to sync the new name, the new file is there, and whole."""
    staged = stage(scene, tmp_path)
    for ended in refuse(staged, errno.EIO, ("fsync", "rename", "renameat2"), lasting=False):
        assert ended.status in (0, 5)
        assert ended.status == 0 or "the disk reports an error" in ended.err, ended.err


class Limited(Faults):
    """No file may grow beyond `size`; see setrlimit(2)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def begin(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("scene", SOME, ids=str)
def test_a_limit_on_the_size_of_files(scene: Scene, tmp_path: Path) -> None:
    """A sweep of them. A file system that makes room in a file asks nobody: then it is done."""
    staged = stage(scene, tmp_path)
    sizes = sorted({len(data) for data in staged.after.values() if len(data) > 1000})
    limits = [1, 1000, *(size + more for size in sizes for more in (-1, 0)), 2 * sizes[-1]]
    ends = []
    for limit in limits:
        here = staged.again()
        ended = in_child(scene.line, here, Limited(limit))
        assert ended.status in (0, 5), ended.err
        assert tree(here) == (staged.before if ended.status else staged.after), ended.err
        if ended.status:
            assert "of this size" in ended.err
        ends.append(ended.status)
    assert ends[0] == 5 and ends[-1] == 0


class Undressed(Faults):
    """The child is root no longer, so that modes hold for it."""

    def begin(self) -> None:
        if os.geteuid() == 0:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that a nobody gets to; pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        child = os.fork()
        if child == 0:
            Undressed().begin()
            os._exit(0 if os.access(folder, os.X_OK) else 1)
        if os.waitpid(child, 0)[1] != 0:
            pytest.skip("a user without rights does not reach the temporary folder here")
        yield folder


@pytest.mark.parametrize("scene", SOME, ids=str)
def test_a_folder_that_may_not_be_written(scene: Scene, reachable: Path) -> None:
    staged = stage(scene, reachable)
    here = staged.again()
    here.chmod(0o555)
    ended = in_child(scene.line, here, Undressed())
    assert ended.status == 5
    assert "permission denied" in ended.err and scene.target in ended.err
    assert tree(here) == staged.before


def test_a_checkpoint_that_may_not_be_read(reachable: Path) -> None:
    staged = stage(TO_FILES[0], reachable)
    here = staged.again()
    (here / "m.safetensors").chmod(0)
    here.chmod(0o777)
    ended = in_child(staged.scene.line, here, Undressed())
    assert ended.status == 5 and "m.safetensors: permission denied" in ended.err
    assert not (here / "out").exists()


class Unreadable(Faults):
    """Reading the input fails, from the n-th time on, as `spoil` has it."""

    def __init__(self, at: int, spoil: Callable[[], None]) -> None:
        super().__init__()
        self.at, self.spoil, self.reads = at, spoil, 0

    def begin(self) -> None:
        pread, copy = os.pread, os.copy_file_range

        def read(descriptor: int, count: int, offset: int) -> bytes:
            self.read(descriptor)
            return pread(descriptor, count, offset)

        def copied(source: int, *rest: int) -> int:
            self.read(source)
            return copy(source, *rest)

        os.pread, os.copy_file_range = read, copied

    def read(self, descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/m.safetensors"):
            self.reads += 1
            if self.reads >= self.at:
                self.spoil()


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def cut() -> None:
    os.truncate("m.safetensors", 20_000)


def replace() -> None:
    """As other programs save: another file under the name. Several threads read."""
    other = Path(f"other {threading.get_ident()}")
    other.write_bytes(b"another model")
    other.replace("m.safetensors")


@pytest.mark.parametrize("at", range(1, 12))
def test_an_input_that_cannot_be_read_on(at: int, tmp_path: Path) -> None:
    staged = stage(TO_FILES[1], tmp_path)
    here = staged.again()
    ended = in_child(staged.scene.line, here, Unreadable(at, fail))
    assert ended.status == 5
    assert "m.safetensors: the disk reports an error" in ended.err
    assert tree(here) == staged.before


@pytest.mark.parametrize("at", range(1, 12))
def test_an_input_that_becomes_shorter(at: int, tmp_path: Path) -> None:
    staged = stage(TO_FILES[1], tmp_path)
    here = staged.again()
    ended = in_child(staged.scene.line, here, Unreadable(at, cut))
    assert ended.status == 3, ended.err
    assert "m.safetensors" in ended.err and "something else is writing to it" in ended.err
    now = tree(here)
    now["m.safetensors"] = staged.before["m.safetensors"]
    assert now == staged.before


@pytest.mark.parametrize("at", range(1, 12, 2))
def test_an_input_that_is_replaced_is_read_to_its_end(at: int, tmp_path: Path) -> None:
    staged = stage(TO_FILES[1], tmp_path)
    here = staged.again()
    ended = in_child(staged.scene.line, here, Unreadable(at, replace))
    assert ended.status == 0, ended.err
    assert (here / "out").read_bytes() == staged.after["out"]
