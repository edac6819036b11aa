"""Files are whole or not there, have one writer, and keep their manners."""

import multiprocessing
import os
import resource
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from sepme_cli.checkpoints.disk import files
from sepme_cli.checkpoints.disk.files import (
    BLOCK,
    check_writable,
    copy_all,
    new_file,
    only_writer,
    write_all,
)
from sepme_cli.errors import SystemFailure


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def write(path: Path, data: bytes = b"new", *, force: bool = False) -> None:
    with only_writer(path), new_file(path, len(data), force=force) as descriptor:
        write_all(descriptor, data, 0)


def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: None) -> None:
    write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["f"]


def test_a_replaced_file_keeps_its_mode(tmp_path: Path, umask: None) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o604)
    write(tmp_path / "f", force=True)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o604


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("folder/real")
    write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder/real").read_bytes() == b"new"


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".f.sepme-lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemFailure):
        write(tmp_path / "f")
    assert os.listdir(tmp_path) == [".f.sepme-lock"]


def test_a_temporary_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / f".f.{os.getpid()}.sepme-tmp").symlink_to(tmp_path / "mine")
    write(tmp_path / "f")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / "f").is_symlink()


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(SystemFailure, match="--force"):
        write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_file_that_turns_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(SystemFailure, match="--force"), new_file(path, 3):
        path.write_bytes(b"somebody else's")
    assert path.read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["f"]


def test_what_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "f", 3) as descriptor:
        write_all(descriptor, b"new", 0)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_temporaries_of_the_killed_are_swept_and_others_left(tmp_path: Path) -> None:
    mine = [".f.123.sepme-tmp", ".f.sepme-undo.5.sepme-tmp", ".f.sepme-pending.6.sepme-tmp"]
    others = [".f.txt.5.sepme-tmp", ".f.12.tmp", "f.1.sepme-tmp", ".g.1.sepme-tmp"]
    for name in mine + others:
        (tmp_path / name).write_bytes(b"")
    write(tmp_path / "f")
    assert set(os.listdir(tmp_path)) == {"f", *others}


def test_folders_that_are_not_there_or_are_the_output(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="not found"):
        write(tmp_path / "nowhere" / "f")
    with pytest.raises(SystemFailure, match="folder"):
        write(tmp_path, force=True)


def test_space_is_looked_for_first(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="space") as caught, new_file(tmp_path / "f", 2**60):
        pytest.fail("there was space for an exabyte")
    assert str(2**60) in (caught.value.expected or "")
    assert os.listdir(tmp_path) == []


def test_a_file_that_may_not_be_so_large_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(SystemFailure, match="of this size"):
            write(tmp_path / "f", b"x" * 20_000, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_failed_copy_in_the_kernel_is_done_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(files, "COPY_BYTES", 7)
    (tmp_path / "a").write_bytes(bytes(range(50)))
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("w+b") as b:
        done = 0
        while copied := files.copy_range(
            a.fileno(), 10 + done, b.fileno(), done, 30 - done, tmp_path / "a"
        ):
            done += copied
        assert files.copy_range(a.fileno(), 50, b.fileno(), 0, 5, tmp_path / "a") == 0
    assert (tmp_path / "b").read_bytes() == bytes(range(10, 40))


def test_a_second_writer_is_told_busy_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with only_writer(path):
        with pytest.raises(SystemFailure, match="busy"), only_writer(path):
            pytest.fail("two writers")
        with only_writer(tmp_path / "g"):
            pass
    child = os.fork()
    if child == 0:
        with only_writer(path):
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".f.sepme-lock").exists()
    write(path)
    assert os.listdir(tmp_path) == ["f"]


def _count(path: Path) -> None:
    done = 0
    while done < 25:
        try:
            with only_writer(path):
                value = int(path.read_text())
                with new_file(path, 8, force=True) as descriptor:
                    write_all(descriptor, str(value + 1).encode(), 0)
        except SystemFailure as error:
            assert "busy" in error.message
        else:
            done += 1


def test_no_update_is_lost_among_eight_processes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(path,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_text() == "200"
    assert os.listdir(tmp_path) == ["f"]


def in_namespace(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with a user and mount namespace of its own, `folder` a tmpfs of 1 MiB."""
    mount = f"mount -t tmpfs -o size=1m none {folder}"
    command = ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable]
    return subprocess.run([*command, textwrap.dedent(script)], capture_output=True, text=True)


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    script = f"""
        import os, pathlib
        from sepme_cli.checkpoints.disk.files import new_file, write_all
        from sepme_cli.errors import SystemFailure
        path = pathlib.Path({str(tmp_path)!r}) / "f"
        path.write_bytes(b"old")
        try:
            with new_file(path, 10, force=True) as descriptor:
                write_all(descriptor, bytes(2**21), 0)
        except SystemFailure as error:
            assert "full" in error.message, error.message
        else:
            raise SystemExit("no error")
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["f"]
        print("as promised")
    """
    done = in_namespace(script, tmp_path)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no user namespaces here")
    assert (done.returncode, done.stdout) == (0, "as promised\n"), done.stderr


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    script = f"""
        import pathlib, subprocess
        from sepme_cli.checkpoints.disk.files import new_file, only_writer
        from sepme_cli.errors import SystemFailure
        folder = pathlib.Path({str(tmp_path)!r})
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        for attempt in (lambda: only_writer(folder / "f"), lambda: new_file(folder / "f", 3)):
            try:
                with attempt():
                    raise SystemExit("it was let in")
            except SystemFailure as error:
                assert "read-only" in error.message or "permission" in error.message
        print("as promised")
    """
    done = in_namespace(script, tmp_path)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no user namespaces here")
    assert (done.returncode, done.stdout) == (0, "as promised\n"), done.stderr


@pytest.mark.parametrize(("source", "target"), [(8, 8 + 4096), (5000, 904), (0, 4096), (7, 8)])
def test_whole_blocks_are_copied_as_such(
    source: int, target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a file system that can share blocks does."""
    data = os.urandom(40_000)
    (tmp_path / "a").write_bytes(data)
    calls: list[tuple[int, int]] = []
    real = os.copy_file_range

    def seen(a: int, b: int, count: int, begin: int, to: int) -> int:
        calls.append((begin, to))
        return real(a, b, count, begin, to)

    monkeypatch.setattr(os, "copy_file_range", seen)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        copy_all(a.fileno(), source, b.fileno(), target, 30_000, tmp_path / "a")
    copied = (tmp_path / "b").read_bytes()
    assert copied[target:] == data[source : source + 30_000]
    if (source - target) % BLOCK == 0:
        assert all(begin % BLOCK == to % BLOCK == 0 for begin, to in calls[source % BLOCK > 0 :])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="there is no folder") as caught:
        check_writable(tmp_path / "patches" / "cat.sepme", 0, force=False)
    assert str(tmp_path / "patches;") in caught.value.message
