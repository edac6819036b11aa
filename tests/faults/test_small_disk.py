"""A disk that really is full: a tmpfs of some pages, in a namespace of the child's own."""

import ctypes
import os
import pickle
import shutil
from pathlib import Path

import pytest

from tests.faults.runs import Tree, of, run, tree
from tests.faults.scenes import FOLDERS, IN_PLACE, TO_FILES, Scene, Staged, stage

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
PAGE = 4096


def mount_tmpfs(folder: Path, size: int) -> None:
    """An empty file system of `size` bytes, seen by this process alone; OSError if not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _NEW_MOUNTS | (0 if os.geteuid() == 0 else _NEW_USER)
    options = f"size={size}".encode()
    for done in (
        lambda: libc.unshare(flags),
        lambda: libc.mount(b"none", b"/", None, 0x44000, None),  # private, all the way down
        lambda: libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, options),
    ):
        if done() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def on_a_disk_of(size: int, staged: Staged, *, unseen: bool) -> tuple[int, str, Tree] | None:
    """Status, what was said and what was left, of the scene's command; None where it may not be.

    unseen: the space is looked for before another program takes it.
    """
    folder = staged.here
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        left: tuple[int, str, Tree] | None = None
        try:
            mount_tmpfs(folder, size)
            shutil.copytree(staged.template, folder, dirs_exist_ok=True)
            if unseen:
                real = os.statvfs
                os.statvfs = lambda path: real("/")  # type: ignore[assignment]
            ended = run(staged.scene.line, folder)
            left = ended.status, ended.err, tree(folder)
        finally:
            folder.with_name("found").write_bytes(pickle.dumps(left))
            os._exit(0)
    os.waitpid(child, 0)
    found: tuple[int, str, Tree] | None = pickle.loads(folder.with_name("found").read_bytes())
    return found


def but_undo(found: Tree) -> Tree:
    """The undo journal holds the base either way; which state it lies beside takes space to say."""
    return {name: data for name, data in found.items() if not name.endswith(".sepme-undo")}


@pytest.mark.parametrize("unseen", [False, True], ids=["seen", "unseen"])
@pytest.mark.parametrize("scene", [TO_FILES[1], IN_PLACE[0], IN_PLACE[3], FOLDERS[0]], ids=str)
def test_a_small_disk(scene: Scene, unseen: bool, tmp_path: Path) -> None:
    """From just what is there to enough for everything."""
    staged = stage(scene, tmp_path)
    files = [path.stat().st_size for path in staged.template.rglob("*") if path.is_file()]
    taken = sum(-(-size // PAGE) for size in files) * PAGE
    ends = []
    for more in (0, 1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 200):
        found = on_a_disk_of(taken + more * PAGE, staged, unseen=unseen)
        if found is None:
            pytest.skip("no file system may be mounted here")
        status, said, left = found
        assert status in (0, 5), said
        ends.append(status)
        if status == 5:
            assert but_undo(left) == but_undo(staged.before)
            assert "the disk is full" in said or "too little space" in said
        else:
            assert of(scene.target, left) == of(scene.target, staged.after)
    assert ends[0] == 5 and ends[-1] == 0, ends
