"""Killed at any moment, a command leaves old files or new ones, and can be run again."""

from pathlib import Path

import pytest

from tests.faults.calls import Killed
from tests.faults.runs import in_child, key, leftovers, of, run, tree
from tests.faults.scenes import SCENES, Scene, Staged, stage

KILLED = -9


def survives(staged: Staged) -> str:
    """Check the folder that a run was cut short in; returns what had become of it."""
    scene, here, now = staged.scene, staged.here, tree(staged.here)
    old, new = of(scene.target, staged.before), of(scene.target, staged.after)
    for name in staged.before.keys() - old.keys():
        if ".sepme-" not in name:
            assert now[name] == staged.before[name], f"{name} has changed"
    looked = run(f"inspect {scene.target}", here) if old else None
    found = of(scene.target, tree(here))
    if found != of(scene.target, now):
        assert looked is not None and "it is as it was before" in looked.err
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


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_killed_at_every_call(scene: Scene, tmp_path: Path) -> None:
    staged = stage(scene, tmp_path)
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
