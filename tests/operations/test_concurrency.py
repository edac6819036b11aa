"""Many processes on one file: each comes to its end or is told "busy", and nothing is lost."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pytest

from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import SepmeError, SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.operations.diff import diff
from sepme_cli.operations.inspect import CheckpointInfo, inspect
from sepme_cli.operations.revert import revert
from sepme_cli.operations.verify import verify
from sepme_cli.progress import Progress
from tests.checkpoints.test_journal import leftovers
from tests.layouts import write_layout
from tests.synthetic import make_checkpoint, make_patches

CONTEXT = multiprocessing.get_context("fork")
DONE, BUSY, TAKEN, OTHER = 0, 5, 6, 7
"""How a process ends. TAKEN: the output is there already."""
EIGHT = tuple(f"concept {number}" for number in range(8))

Work = Callable[[], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", ema="F32")


@pytest.fixture
def patches(tmp_path: Path, model: Path) -> list[Path]:
    return make_patches(tmp_path, model, EIGHT)


@pytest.fixture
def work(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "work").mkdir()
    return Path(shutil.copy(model, tmp_path / "work"))


def at_once(works: Sequence[Work], *, patient: bool = False) -> list[int]:
    """How each ends, in a process of its own, all begun together. patient: again while busy."""
    barrier = CONTEXT.Barrier(len(works))
    processes = [CONTEXT.Process(target=_end, args=(one, barrier, patient)) for one in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _end(work: Work, barrier: object, patient: bool) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    status = _status(work)
    while patient and status == BUSY:
        status = _status(work)
    os._exit(status)


def _status(work: Work) -> int:
    try:
        work()
    except SystemFailure as error:
        return BUSY if "busy" in error.message else TAKEN if "--force" in error.message else OTHER
    except BaseException:
        return OTHER
    return DONE


def applied(model: Path, patches: Sequence[Path]) -> bytes:
    """What the file is with these patches in it."""
    if not patches:
        return model.read_bytes()
    apply(model, patches, output := model.with_name("expected.safetensors"), force=True)
    return output.read_bytes()


def test_eight_patches_in_place_at_once(model: Path, work: Path, patches: list[Path]) -> None:
    ends = at_once([lambda p=patch: apply(work, [p], in_place=True) for patch in patches])
    assert set(ends) <= {DONE, BUSY} and DONE in ends
    inside = [patch for patch, end in zip(patches, ends, strict=True) if end == DONE]
    assert work.read_bytes() == applied(model, inside)
    rest = [patch for patch in patches if patch not in inside]
    again = at_once([lambda p=p: apply(work, [p], in_place=True) for p in rest], patient=True)
    assert set(again) <= {DONE}
    assert work.read_bytes() == applied(model, patches), "no update is lost"
    assert not leftovers(work.parent)


def test_some_go_in_while_others_come_out(model: Path, work: Path, patches: list[Path]) -> None:
    apply(work, patches[:4], in_place=True)
    out: list[Work] = [lambda p=p: revert(work, [p], in_place=True) for p in patches[:4]]
    into: list[Work] = [lambda p=p: apply(work, [p], in_place=True) for p in patches[4:]]
    assert set(at_once([*out, *into], patient=True)) == {DONE}
    assert work.read_bytes() == applied(model, patches[4:])
    assert not leftovers(work.parent)


def test_a_folder_in_shards(tmp_path: Path, patches: list[Path]) -> None:
    folder = write_layout("shards", tmp_path)
    apply(folder, patches[:4], tmp_path / "expected")
    works: list[Work] = [lambda p=p: apply(folder, [p], in_place=True) for p in patches[:4]]
    assert set(at_once(works, patient=True)) == {DONE}
    for file in (tmp_path / "expected" / "unet").glob("*.safetensors"):
        assert (folder / "unet" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("force", [False, True])
def test_eight_patches_to_one_output(model: Path, patches: list[Path], force: bool) -> None:
    output = model.with_name("out.safetensors")
    ends = at_once([lambda p=p: apply(model, [p], output, force=force) for p in patches])
    assert set(ends) <= {DONE, BUSY} | (set() if force else {TAKEN})
    done = [patch for patch, end in zip(patches, ends, strict=True) if end == DONE]
    assert done if force else len(done) == 1
    assert output.read_bytes() in [applied(model, [patch]) for patch in done]
    assert not leftovers(model.parent)


def test_the_lock_of_a_killed_process_holds_nobody(work: Path, patches: list[Path]) -> None:
    class Killed(Progress):
        def advance(self, steps: int = 1) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    before = work.read_bytes()
    doomed = lambda: apply(work, patches[:1], in_place=True, progress=Killed())  # noqa: E731
    assert at_once([doomed]) == [-signal.SIGKILL]
    assert any(name.endswith("-lock") for name in leftovers(work.parent))
    assert work.read_bytes() == before
    apply(work, patches[:1], in_place=True)
    assert not leftovers(work.parent)


def test_readers_see_the_old_the_new_or_are_told_busy(
    model: Path, work: Path, patches: list[Path]
) -> None:
    """Nothing in between, however the header grows and shrinks meanwhile."""
    writer = CONTEXT.Process(target=_to_and_fro, args=(work, patches[0], 12))
    writer.start()
    seen = set()
    while writer.is_alive():
        for look in (_inspected, _compared, _verified):
            try:
                seen.add(look(model, work))
            except SystemFailure as error:
                assert "busy" in error.message
            time.sleep(0.01)  # so that the writer gets its turn
    writer.join()
    assert writer.exitcode == DONE
    assert seen == {"old", "new"}


def _to_and_fro(work: Path, patch: Path, times: int) -> None:
    for number in range(2 * times):
        one = (lambda: revert(work, in_place=True)) if number % 2 else None
        while (status := _status(one or (lambda: apply(work, [patch], in_place=True)))) == BUSY:
            pass
        if status != DONE:
            os._exit(status)
    os._exit(DONE)


def _inspected(model: Path, work: Path) -> str:
    info = inspect(work)
    assert isinstance(info, CheckpointInfo)
    return "new" if info.applied else "old"


def _compared(model: Path, work: Path) -> str:
    result = diff(model, work)
    assert result.changed in (0, 28), "all targets and their twins, or none"
    return "new" if result.changed else "old"


def _verified(model: Path, work: Path) -> str:
    result = verify([work], base=model)
    assert result.ok, result.checks
    return "new" if "weights" in {check.name for check in result.checks} else "old"


def test_who_reads_is_not_written_under(model: Path, work: Path, patches: list[Path]) -> None:
    apply(work, patches[:1], in_place=True)
    before = {path: path.read_bytes() for path in work.parent.rglob("*") if path.is_file()}
    with open_checkpoint(work) as checkpoint:
        for write in (
            lambda: apply(work, patches[1:2], in_place=True),
            lambda: revert(work, in_place=True),
        ):
            with pytest.raises(SystemFailure, match="busy, another sepme is reading"):
                write()
        assert checkpoint.base().digest
        with open_checkpoint(work):
            pass  # readers do not mind each other
        apply(work, patches[1:2], work.with_name("out.safetensors"), base=model)
    work.with_name("out.safetensors").unlink()
    assert {p: p.read_bytes() for p in work.parent.rglob("*") if p.is_file()} == before
    apply(work, patches[1:2], in_place=True)
    assert work.read_bytes() == applied(model, patches[:2])


def test_who_writes_lets_nobody_read(
    model: Path, work: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two tensors, where the file is neither the old nor the new."""
    apply(work, patches[:1], in_place=True)
    busy: list[str] = []
    real = os.fsync

    def stopped(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(work):
            for read in (
                lambda: inspect(work),
                lambda: verify([work]),
                lambda: diff(model, work),
                lambda: apply(work, patches[2:3], work.with_name("out.safetensors")),
                lambda: revert(work, output=work.with_name("out.safetensors")),
                lambda: apply(work, patches[2:3], in_place=True),
            ):
                with pytest.raises(SystemFailure) as caught:
                    read()
                busy.append(caught.value.message)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", stopped)
    apply(work, patches[1:2], in_place=True)
    assert len(busy) >= 12 and all("busy" in message for message in busy)
    assert work.read_bytes() == applied(model, patches[:2])
    assert not work.with_name("out.safetensors").exists()


def test_a_file_by_another_name_is_the_same_file(
    tmp_path: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, the UNet's folder in it and a hard link have locks of their own beside them."""
    folder = write_layout("folder", tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    link = tmp_path / "link.safetensors"
    link.hardlink_to(weights)
    apply(folder, patches[:1], in_place=True)
    busy = 0
    real = os.fsync

    def stopped(descriptor: int) -> None:
        nonlocal busy
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(weights):
            for path in (folder / "unet", weights, link):
                with pytest.raises(SystemFailure, match="busy"):
                    apply(path, patches[2:3], in_place=True)
                busy += 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", stopped)
    apply(folder, patches[1:2], in_place=True)
    assert busy >= 6
    assert verify([folder]).ok


def test_a_write_that_died_just_after_we_looked(
    model: Path, work: Path, patches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that found no journal, and then a file that is neither the old nor the new."""
    from sepme_cli.checkpoints.reading import checkpoint

    apply(work, patches[:1], in_place=True)
    before = work.read_bytes()
    real, looks = checkpoint.undo_if_interrupted, 0

    def late(path: Path, progress: Progress) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            _die_half_way(work, patches[1])
        else:
            real(path, progress)

    monkeypatch.setattr(checkpoint, "undo_if_interrupted", late)
    assert verify([work]).ok
    assert looks == 2 and work.read_bytes() == before


def _die_half_way(work: Path, patch: Path) -> None:
    def dying() -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(work):
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        apply(work, [patch], in_place=True)

    assert at_once([dying]) == [-signal.SIGKILL]
    assert pending_path(work).exists()


def test_all_pairs_of_two_writers_end_as_one_after_the_other(
    model: Path, work: Path, patches: list[Path]
) -> None:
    """Also where both want the same: then one of them is told that it is done already."""
    for one, other in [*combinations(patches[:3], 2), (patches[0], patches[0])]:
        shutil.copy(model, work)
        ends = at_once(
            [lambda p=p: apply(work, [p], in_place=True) for p in (one, other)], patient=True
        )
        assert sorted(ends) == ([DONE, DONE] if one != other else [DONE, OTHER])
        assert work.read_bytes() == applied(model, sorted({one, other}))
        revert(work, in_place=True)


def test_busy_is_a_status_of_its_own_kind(work: Path, patches: list[Path]) -> None:
    with only_writer(work), pytest.raises(SepmeError) as caught:
        apply(work, patches[:1], in_place=True)
    assert (caught.value.kind, int(caught.value.status)) == ("system", BUSY)
