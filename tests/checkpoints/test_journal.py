"""Writing in place survives a power failure at any moment; see tests/faults for the rest."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sepme_cli.checkpoints.disk import files, resizing
from sepme_cli.checkpoints.disk.resizing import can_resize
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import MalformedError, RefusedError, SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.operations.revert import revert
from sepme_cli.progress import Progress
from tests.layouts import write_layout
from tests.synthetic import Shape, make_checkpoint, make_patches, read_raw

TINY = Shape(width=40, channels=(16,), attention=(False,))
KILLED = 9


class Heard(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def half_shifted(descriptor: int, mode: int, offset: int, count: int) -> None:
    """Put pages in or take them out as a power failure leaves it: some extents have moved.

    The pages are then, as a hole, where the shifting stopped.
    """
    if mode == resizing._COLLAPSE_RANGE:
        resizing.fallocate(descriptor, mode, offset, count)
    middle = os.fstat(descriptor).st_size // 2 // files.BLOCK * files.BLOCK
    resizing.fallocate(descriptor, resizing._INSERT_RANGE, middle, count)


def killed_at(n: int, work: Callable[[], object], *, power: bool = False) -> bool:
    """Run `work` in a child that dies, as by kill -9, at its n-th system call that matters.

    power: what shifts a file's extents is cut short, as only a power failure can.
    Returns whether it died; otherwise it has finished, having made fewer such calls.
    """
    child = os.fork()
    if child == 0:
        left = n
        calls = ("pwrite", "copy_file_range", "fsync", "replace", "unlink", "rename")
        for owner, name in [*((os, name) for name in calls), (resizing, "fallocate")]:
            call = getattr(owner, name)

            def counted(*args: object, _call=call, _name=name, **more: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    if _name == "fallocate" and power:
                        setattr(resizing, _name, _call)
                        half_shifted(*args)  # type: ignore[arg-type]
                    if _name == "pwrite":  # half of it gets through
                        descriptor, data, offset = args
                        _call(descriptor, data[: len(data) // 2], offset)  # type: ignore[index]
                    os._exit(KILLED)
                # What is written outlives its process, synced or not.
                return None if _name == "fsync" else _call(*args, **more)

            setattr(owner, name, counted)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def settled(path: Path) -> bytes:
    """What the file is once the next command has looked at it."""
    with open_checkpoint(path):
        pass
    return whole(path)


def whole(path: Path) -> bytes:
    """A checkpoint's bytes, those of all weights of a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return b"".join(file.read_bytes() for file in files)


def leftovers(folder: Path) -> set[str]:
    names = [path.name for path in folder.rglob("*")]
    return {name for name in names if name.endswith(("-tmp", "-lock", "-pending"))}


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A checkpoint with one patch in it, so that the next fits in place, and three patches."""
    model = make_checkpoint(tmp_path / "base.safetensors", TINY, ema="F16")
    patches = make_patches(tmp_path, model)
    path = tmp_path / "work" / "m.safetensors"
    path.parent.mkdir()
    shutil.copy(model, path)
    return path, patches


def every_death(
    path: Path,
    work: Callable[[], object],
    follow: Callable[[], object],
    *,
    power: bool = False,
) -> tuple[int, set[bytes]]:
    """Kill `work` at each of its calls; returns how many there are and what files it left."""
    keep = path.parent.with_name("keep")
    shutil.copytree(path.parent, keep)
    found, n = set(), 0
    while True:
        n += 1
        died = killed_at(n, work, power=power)
        found.add(settled(path))
        assert pending_path(path).exists() is False
        follow()  # whatever was left, the next command goes through
        assert not leftovers(path.parent), "nothing of ours stays behind"
        if not died:
            return n, found
        shutil.rmtree(path.parent)
        shutil.copytree(keep, path.parent)


needs_resizing = pytest.mark.skipif(
    not can_resize(Path(__file__)), reason="this file system puts no pages into files"
)


@pytest.fixture
def roomy(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A checkpoint of some pages whose header has no room, and patches."""
    path = tmp_path / "work" / "m.safetensors"
    path.parent.mkdir()
    make_checkpoint(path, Shape(width=128, channels=(32,), attention=(False,)), ema="F32")
    assert path.stat().st_size > 8 * files.BLOCK
    return path, make_patches(tmp_path, path)


@needs_resizing
def test_the_first_apply_makes_room_in_the_file_or_does_not(
    roomy: tuple[Path, list[Path]],
) -> None:
    path, patches = roomy
    inode, before = path.stat().st_ino, path.read_bytes()
    apply(path, [patches[0]], path.parent.with_name("after"))
    _, found = every_death(
        path,
        lambda: apply(path, [patches[0]], in_place=True),
        lambda: apply(path, [patches[2]], in_place=True),
        power=True,
    )
    assert found == {before, path.parent.with_name("after").read_bytes()}
    fresh = path.with_name("fresh.safetensors")
    fresh.write_bytes(before)
    inode = fresh.stat().st_ino
    apply(fresh, [patches[0]], in_place=True)
    assert fresh.stat().st_ino == inode, "the file was not written anew"
    assert fresh.stat().st_size > len(before)


@needs_resizing
def test_the_last_revert_takes_the_room_away_or_does_not(
    roomy: tuple[Path, list[Path]],
) -> None:
    path, patches = roomy
    base = path.read_bytes()
    apply(path, [patches[0]], in_place=True)
    before = path.read_bytes()
    _, found = every_death(
        path,
        lambda: revert(path, in_place=True),
        lambda: apply(path, [patches[2]], in_place=True),
        power=True,
    )
    assert found == {before, base}


@needs_resizing
def test_all_files_of_a_folder_are_done_or_none(tmp_path: Path) -> None:
    path = tmp_path / "work" / "model"
    path.parent.mkdir()
    write_layout("sharded variant", path.parent)
    single = make_checkpoint(tmp_path / "m.safetensors")
    patches = make_patches(tmp_path, single)
    before = whole(path)
    apply(path, [patches[0]], tmp_path / "after")
    _, found = every_death(
        path,
        lambda: apply(path, [patches[0]], in_place=True),
        lambda: apply(path, [patches[2]], in_place=True),
        power=True,
    )
    assert found == {before, whole(tmp_path / "after")}


@needs_resizing
def test_putting_back_can_itself_be_cut_short(roomy: tuple[Path, list[Path]]) -> None:
    """However often, and wherever the file was then."""
    path, patches = roomy
    before = path.read_bytes()
    for n in range(1, 60):
        killed_at(n, lambda: apply(path, [patches[0]], in_place=True), power=True)
        for again in range(1, 20):
            if not killed_at(again, lambda: settled(path), power=True):
                break
        assert settled(path) in (before, whole(path))
        if path.read_bytes() != before:
            break
    assert path.read_bytes() != before, "it has come to its end"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system without it here")
def test_where_no_room_can_be_made_the_file_is_written_anew() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        path = make_checkpoint(folder / "m.safetensors", TINY)
        if can_resize(path):
            pytest.skip("this file system can make room too")
        patches = make_patches(folder, path)
        before = path.read_bytes()
        apply(path, [patches[0]], folder / "after")
        apply(path, [patches[0]], in_place=True)
        assert path.read_bytes() == (folder / "after").read_bytes()
        revert(path, in_place=True)
        assert path.read_bytes() == before
        model = write_layout("shards", folder)
        files = whole(model)
        other = make_patches(folder, make_checkpoint(folder / "o.safetensors"))
        with pytest.raises(RefusedError, match="no room"):
            apply(model, [other[0]], in_place=True)
        assert whole(model) == files and not leftovers(folder)
        assert not list(model.rglob("*.sepme-undo"))


@pytest.mark.parametrize(
    "names", ['["../m"]', '["/etc/passwd"]', '["a/../../m"]', '{"a": 1}', "null", "[3]", "{"]
)
def test_a_journal_that_leads_elsewhere_is_malformed(
    names: str, place: tuple[Path, list[Path]]
) -> None:
    path, patches = place
    apply(path, [patches[0]], in_place=True)
    for n in range(1, 500):
        killed_at(n, lambda: apply(path, [patches[1]], in_place=True))
        if pending_path(path).exists():
            break
    journal = pending_path(path)
    header, data = read_raw(journal)
    header["__metadata__"] = {"sepme_pending": names}
    text = json.dumps(header).encode()
    journal.write_bytes(len(text).to_bytes(8, "little") + text + data)
    before = path.read_bytes()
    with pytest.raises(MalformedError):
        open_checkpoint(path)
    assert path.read_bytes() == before


def test_the_first_apply_where_the_header_has_room(tmp_path: Path) -> None:
    path = tmp_path / "work" / "m.safetensors"
    path.parent.mkdir()
    make_checkpoint(path, TINY, pad=2**15)
    patches = make_patches(tmp_path, path)
    before = path.read_bytes()
    apply(path, [patches[0]], tmp_path / "after")
    _, found = every_death(
        path,
        lambda: apply(path, [patches[0]], in_place=True),
        lambda: apply(path, [patches[2]], in_place=True),
    )
    assert found == {before, (tmp_path / "after").read_bytes()}


def test_what_was_undone_is_said(place: tuple[Path, list[Path]]) -> None:
    path, patches = place
    apply(path, [patches[0]], in_place=True)
    before = path.read_bytes()
    for n in range(1, 500):
        killed_at(n, lambda: apply(path, [patches[1]], in_place=True))
        if pending_path(path).exists() and path.read_bytes() != before:
            break
    heard = Heard()
    with open_checkpoint(path, heard):
        pass
    assert path.read_bytes() == before
    assert len(heard.warnings) == 1 and "interrupted" in heard.warnings[0]
    with open_checkpoint(path, heard):
        pass
    assert len(heard.warnings) == 1


def test_another_file_in_its_place_is_left_alone(place: tuple[Path, list[Path]]) -> None:
    path, patches = place
    apply(path, [patches[0]], in_place=True)
    for n in range(1, 500):
        killed_at(n, lambda: apply(path, [patches[1]], in_place=True))
        if pending_path(path).exists():
            break
    # Another model with the very same header: only its numbers tell.
    header = path.read_bytes()[: -len(read_raw(path)[1])]
    other = header + random.Random(1).randbytes(len(read_raw(path)[1]))
    path.write_bytes(other)
    with pytest.raises(RefusedError, match="another file"):
        open_checkpoint(path)
    assert path.read_bytes() == other
    longer = make_checkpoint(path, TINY, metadata={"a": "b"}).read_bytes()
    with pytest.raises(RefusedError, match="another file"):
        open_checkpoint(path)
    assert path.read_bytes() == longer


def test_an_error_on_the_way_is_undone_at_once(
    place: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, patches = place
    apply(path, [patches[0]], in_place=True)
    before = path.read_bytes()
    real, calls = os.pwrite, 0

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
            calls += 1
            if calls == 1:  # the header; the tensors are written by then
                raise OSError(5, "input/output error")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(SystemFailure):
        apply(path, [patches[1]], in_place=True)
    assert path.read_bytes() == before
    assert not pending_path(path).exists()


def test_a_write_that_is_going_on_is_not_undone(place: tuple[Path, list[Path]]) -> None:
    from sepme_cli.checkpoints.disk.files import only_writer

    path, patches = place
    apply(path, [patches[0]], in_place=True)
    for n in range(1, 500):
        killed_at(n, lambda: apply(path, [patches[1]], in_place=True))
        if pending_path(path).exists():
            break
    with only_writer(path), pytest.raises(SystemFailure, match="busy"):
        open_checkpoint(path)
    assert pending_path(path).exists()


def test_the_undo_journal_keeps_the_base(place: tuple[Path, list[Path]]) -> None:
    """By the format's own means: header and weights put back give the original file."""
    from hashlib import sha256

    from patch_spec.header import read_header
    from patch_spec.undo import original_header, undo_record

    path, patches = place
    original = path.read_bytes()
    for patch in patches[:2]:
        apply(path, [patch], in_place=True)
        with undo_path(path).open("rb") as file:
            own = read_header(file, undo_path(path).stat().st_size)
            record = undo_record(own)
            data = file.read()
        entry = own.by_name["header"]
        header_bytes = data[entry.begin : entry.end]
        header = original_header(own, header_bytes)
        patched = path.read_bytes()
        start = 8 + int.from_bytes(patched[:8], "little")
        assert sha256(patched[:start]).hexdigest() == record.patched_header
        restored = bytearray(header_bytes + patched[start:])
        for kept in own.tensors[1:]:
            place_of = header.by_name[kept.name]
            at = header.data_start + place_of.begin
            restored[at : at + kept.nbytes] = data[kept.begin : kept.end]
        assert bytes(restored) == original


@pytest.mark.parametrize("name", ["m.safetensors.sepme-undo", "m.safetensors.sepme-pending"])
@pytest.mark.parametrize("there", [True, False])
def test_a_journal_is_not_written_through_a_link(
    name: str, there: bool, place: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """A link that came with a download would have a file of the user's overwritten, or made."""
    path, patches = place
    # The header has room, so that the file is written over and not anew.
    make_checkpoint(path, TINY, pad=2**15)
    mine = tmp_path / "mine"
    if there:
        mine.write_text("mine")
    path.with_name(name).symlink_to(mine)
    before = path.read_bytes()
    with pytest.raises((SystemFailure, MalformedError)):
        apply(path, [patches[0]], in_place=True)
    assert path.read_bytes() == before
    assert mine.read_text() == "mine" if there else not mine.exists()
    assert path.with_name(name).is_symlink() and not leftovers(path.parent) - {name}


def test_patches_behind_a_link_are_not_tidied_up(
    place: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    path, patches = place
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(patches[1], mine / "kept.sepme")
    path.with_name(f"{path.name}.sepme-applied").symlink_to(mine)
    before = path.read_bytes()
    with pytest.raises(SystemFailure, match="not a file of your own"):
        apply(path, [patches[0]], in_place=True)
    assert [file.name for file in mine.iterdir()] == ["kept.sepme"]
    assert path.read_bytes() == before and not undo_path(path).exists()


def test_a_lock_is_not_made_through_a_link(place: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path, patches = place
    path.with_name(f".{path.name}.sepme-lock").symlink_to(tmp_path / "mine")
    with pytest.raises(SystemFailure):
        apply(path, [patches[0]], in_place=True)
    assert not (tmp_path / "mine").exists()
