"""Killed at any moment, a command leaves old files or new ones, and can be run again."""

import errno
import os
from pathlib import Path

import pytest

from sepme_cli.checkpoints.writing import folder, writer
from tests.faults.calls import Killed, Refused
from tests.faults.runs import in_child, key, leftovers, of, run, tree
from tests.faults.scenes import FOLDERS, IN_PLACE, SCENES, Scene, Staged, stage

KILLED = -9


def survives(staged: Staged) -> str:
    """Check the folder that a run was cut short in; returns what had become of it."""
    scene, here, now = staged.scene, staged.here, tree(staged.here)
    old, new = of(scene.target, staged.before), of(scene.target, staged.after)
    for name in staged.before.keys() - old.keys():
        if ".sepme-" not in name:
            assert now[name] == staged.before[name], f"{name} has changed"
    found = of(scene.target, now)
    if any(name.endswith(".sepme-pending") for name in now):
        # The next command that looks at it puts that right, whichever it is.
        looked = run(f"inspect {scene.target}", here)
        assert found == of(scene.target, tree(here)) or "the file is restored" in looked.err
        found = of(scene.target, tree(here))
    assert found in (old, new), "neither the old files nor the new ones"
    again = run(scene.line, here)
    left = tree(here)
    if again.status == 0:
        assert left == staged.after
        return "done again"
    assert found == new and again.status in (1, 5), again.err
    assert {n: d for n, d in left.items() if not n.endswith(".sepme-lock")} == staged.after
    if again.status == 1:
        assert not leftovers(left)
    return "was done"


def kill_at_every_call(scene: Scene, folder: Path) -> None:
    """And halfway through each that has halves. States that were seen are not looked at again."""
    staged = stage(scene, folder)
    seen: dict[str, str] = {}
    points = 0
    for at, call in enumerate(staged.calls, 1):
        for halfway in (False, True)[: 1 + call.has_halves]:
            here = staged.again()
            ended = in_child(scene.line, here, Killed(at, halfway=halfway))
            assert ended.status == KILLED, ended.err
            points += 1
            state = key(tree(here))
            if state not in seen:
                seen[state] = survives(staged)
    assert set(seen.values()) <= {"done again", "was done"}
    print(f"{scene}: {points} points, {len(seen)} states, {len(staged.calls)} calls")


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_killed_at_every_call(scene: Scene, tmp_path: Path) -> None:
    kill_at_every_call(scene, tmp_path)


def test_killed_where_a_file_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, where the header has no room and the file system makes none."""
    monkeypatch.setattr(writer, "can_resize", lambda path: False)
    kill_at_every_call(IN_PLACE[0], tmp_path)


def test_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be exchanged, the old folder may for a moment be known by another name.

    The next command gives it its own again before anything else, even if it then fails.
    """

    def cannot(one: Path, other: Path) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(folder, "exchange", cannot)
    staged = stage(FOLDERS[0], tmp_path)
    old, new = of("out", staged.before), of("out", staged.after)
    renames = [n for n, call in enumerate(staged.calls, 1) if call.paths[-1].endswith("/out")]
    assert renames
    gone = 0
    for at in range(renames[-1] - 2, len(staged.calls) + 1):
        here = staged.again()
        assert in_child(staged.scene.line, here, Killed(at)).status == KILLED
        gone += not (here / "out").exists()
        failing = Refused(1, errno.ENOSPC, ("pwrite64",), lasting=True)
        assert in_child(staged.scene.line, here, failing).status == 5
        assert of("out", tree(here)) in (old, new)
        assert run(staged.scene.line, here).status == 0
        assert tree(here) == staged.after
    assert gone == 1
