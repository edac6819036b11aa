"""Ctrl-C and SIGTERM at any moment: an honest status, and nothing left behind."""

import signal
from pathlib import Path

import pytest

from tests.faults.calls import Signalled
from tests.faults.runs import in_child, run, tree
from tests.faults.scenes import FOLDERS, IN_PLACE, TO_FILES, Scene, stage

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAY = {signal.SIGINT: "error: interrupted", signal.SIGTERM: "error: terminated"}
#: One of each way of writing.
SOME = [TO_FILES[1], IN_PLACE[0], IN_PLACE[2], FOLDERS[0]]


@pytest.mark.parametrize("scene", SOME, ids=str)
def test_interrupted_at_every_call(scene: Scene, tmp_path: Path) -> None:
    """Before a call takes effect and after; by one signal and the other in turn."""
    staged = stage(scene, tmp_path)
    ends = set()
    for at, _ in enumerate(staged.calls, 1):
        for after in (False, True):
            number = (signal.SIGINT, signal.SIGTERM)[(at + after) % 2]
            here = staged.again()
            ended = in_child(scene.line, here, Signalled(at, number, after=after))
            assert ended.status == STATUS[number], (staged.calls[at - 1], ended.err)
            assert SAY[number] in ended.err
            now = tree(here)
            assert now in (staged.before, staged.after), staged.calls[at - 1]
            ends.add(now == staged.after)
    assert ends == {False, True}
    assert run(scene.line, staged.again()).status == 0
