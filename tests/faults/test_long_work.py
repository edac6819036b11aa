"""Work that takes long, cut short: nothing is left behind, or what is there is gone on with."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.calls import Faults, Killed, Recorded
from tests.faults.runs import in_child, leftovers, run, tree

ERASE = "erase model.safetensors --concept ink --rank 3 -o ink.sepme"
QUICK = "--steps 4 --device cpu --method sepme --batch-size 2"
EVALUATE = (
    "evaluate model.safetensors ink.sepme --judge tests.small_judge:judge --report report "
    "--retain style:Monet --as style --pictures 2 --steps 1 --device cpu"
)

pytestmark = pytest.mark.slow


class Stopped(Faults):
    """Gets a signal when progress is told for the n-th time."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__()
        self.at, self.number, self.told = at, number, 0

    def begin(self) -> None:
        from sepme_cli.render.console import Lines

        Lines.advance = self.advance  # type: ignore[method-assign,assignment]

    def advance(self, steps: int = 1) -> None:
        self.told += 1
        if self.told == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def here(tmp_path: Path, small_model: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copy(small_model, folder / "model.safetensors")
    return folder


def test_erase_is_killed_at_every_call_that_writes_its_patch(here: Path) -> None:
    before = tree(here)
    whole = run(ERASE, here)
    assert whole.status == 0, whole.err
    after = tree(here)
    (here / "ink.sepme").unlink()
    calls = in_child(ERASE, here, Recorded()).calls
    assert 5 < len(calls) < 20
    for at, call in enumerate(calls, 1):
        for halfway in (False, True)[: 1 + call.has_halves]:
            (here / "ink.sepme").unlink(missing_ok=True)
            assert in_child(ERASE, here, Killed(at, halfway=halfway)).status == -9
            now = tree(here)
            assert now.get("ink.sepme") in (None, after["ink.sepme"])
            assert {n: d for n, d in now.items() if n in before} == before
    assert run(f"{ERASE} --force", here).status == 0
    assert tree(here) == after


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 3])
def test_erase_is_stopped_while_it_optimises(at: int, number: int, here: Path) -> None:
    before = tree(here)
    stopped = in_child(f"{ERASE} {QUICK}", here, Stopped(at, number))
    assert stopped.status == 128 + number, stopped.err
    assert tree(here) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_evaluate_goes_on_where_it_was_stopped(number: int, here: Path) -> None:
    assert run(ERASE, here).status == 0
    stopped = in_child(EVALUATE, here, Stopped(2, number))
    assert stopped.status == (-9 if number == signal.SIGKILL else 128 + number), stopped.err
    if number != signal.SIGKILL:
        assert not leftovers(tree(here))
    drawn = {path: path.stat().st_mtime_ns for path in (here / "report/pictures").glob("*.png")}
    assert drawn and not (here / "report/report.html").exists()
    rest = run(EVALUATE, here)
    assert rest.status in (0, 1), rest.err
    assert (here / "report/report.html").exists() and not leftovers(tree(here))
    assert all(path.stat().st_mtime_ns == time for path, time in drawn.items()), "drawn again"
