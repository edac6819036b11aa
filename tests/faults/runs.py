"""Running a command in a child of this process, and what its folder is then."""

import gc
import io
import os
import pickle
import re
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sepme_cli import app
from tests.faults.calls import Call, Faults, Recorded, install

Tree = dict[str, bytes]
"""Files by their paths; of folders and links, what they are."""
_OURS = re.compile(r"\.sepme-(tmp|lock|pending)$")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, or minus the signal that killed it."""

    status: int
    out: str
    err: str
    calls: tuple[Call, ...] = ()


def in_child(line: str, folder: Path, faults: Faults) -> Ended:
    """Run a command line of `sepme` in `folder`, in a child whose calls go through `faults`.

    Forking spares the seconds that starting Python takes.
    """
    out, err, told = os.pipe(), os.pipe(), folder.with_name("calls")
    child = os.fork()
    if child == 0:
        try:
            _be_sepme(line, folder, (out[1], err[1]), faults)
            if isinstance(faults, Recorded):
                told.write_bytes(pickle.dumps(tuple(faults.calls)))
        finally:
            os._exit(faults.status)
    os.close(out[1])
    os.close(err[1])
    texts = [open(descriptor).read() for descriptor in (out[0], err[0])]  # noqa: SIM115
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = pickle.loads(told.read_bytes()) if isinstance(faults, Recorded) else ()
    return Ended(status, *texts, calls)


def _be_sepme(line: str, folder: Path, streams: tuple[int, int], faults: Faults) -> None:
    gc.disable()  # it would touch, and so copy, all that there is
    # Whoever runs the tests in the background may have had Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    install(faults)
    faults.begin()
    sys.argv = ["sepme", *line.split()]
    try:
        app.main()
    except SystemExit as end:
        faults.status = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()


def run(line: str, folder: Path) -> Ended:
    """Run a command line in `folder` in this process, with nothing going wrong (or synced)."""
    out, err, before, sync = io.StringIO(), io.StringIO(), Path.cwd(), os.fsync
    try:
        os.chdir(folder)
        os.fsync = lambda descriptor: None
        with redirect_stdout(out), redirect_stderr(err):
            status = app.run(line.split())
    finally:
        os.fsync = sync
        os.chdir(before)
    return Ended(status, out.getvalue(), err.getvalue())


def tree(folder: Path) -> Tree:
    """All that is in a folder."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = b"link to " + os.fsencode(os.readlink(path))
        else:
            found[name] = b"folder" if path.is_dir() else path.read_bytes()
    return found


def of(target: str, found: Tree) -> Tree:
    """What is under one name."""
    return {
        name: data
        for name, data in found.items()
        if (name == target or name.startswith(f"{target}/")) and ".sepme-" not in name
    }


def key(found: Tree) -> str:
    """The same for two folders that differ only in the process that made their temporaries."""
    digest = sha256()
    for name, data in found.items():
        plain = re.sub(r"\.\d+\.(old\.)?sepme-tmp", r".N.\1sepme-tmp", name)
        digest.update(plain.encode() + b"\0" + sha256(data).digest())
    return digest.hexdigest()


def leftovers(found: Tree) -> set[str]:
    """Temporaries, locks and pending journals."""
    return {name for name in found if any(_OURS.search(part) for part in Path(name).parts)}


def renew(folder: Path, template: Path) -> None:
    """Make `folder` a copy of `template` again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
