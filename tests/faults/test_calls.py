"""That the calls these tests meet are all the calls there are: held against what strace sees."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.calls import Call
from tests.faults.runs import tree
from tests.faults.scenes import FOLDERS, IN_PLACE, Scene, stage

#: Whatever changes a file system, also what sepme does not use.
CHANGES = (
    "openat,open,creat,write,writev,pwrite64,pwritev,pwritev2,copy_file_range,sendfile,splice,"
    "fsync,fdatasync,msync,sync_file_range,rename,renameat,renameat2,link,linkat,symlink,"
    "symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,truncate,ftruncate,fallocate,mknod,mknodat,"
    "chmod,fchmod,fchmodat,chown,fchown,fchownat,setxattr,fsetxattr,utimensat,ioctl"
)
#: The same call by the other name that a C library may give it.
SAME = {"unlinkat": "unlink", "renameat": "rename", "mkdirat": "mkdir", "fchmodat": "chmod"}
BY_NAME = (
    "openat", "open", "creat", "rename", "renameat", "renameat2", "link", "symlink",
    "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "truncate", "chmod", "fchmodat",
)  # fmt: skip
_LINE = re.compile(r"\d+ +(\w+)\((.*)\) += (-?\d+)")
_QUOTED = re.compile(r'"([^"]*)"')
_OPENED = re.compile(r"\d+<([^>]*)>")


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode == 0


def seen_by_strace(line: str, folder: Path) -> list[tuple[str, str]]:
    """Call and file, of those that change something in the folder, with Python's own left out."""
    record = folder.with_name("strace")
    program = "import sys; from sepme_cli import app; app.main()"
    command = ["strace", "-f", "-y", "-qq", "-o", record, "-e", f"trace={CHANGES}"]
    done = subprocess.run(
        [*command, sys.executable, "-c", program, *line.split()], cwd=folder, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    found = []
    for name, given, result in _LINE.findall(unbroken(record.read_text())):
        paths = (_QUOTED if name in BY_NAME else _OPENED).findall(given)
        if not paths or int(result) < 0 or (name == "openat" and "O_CREAT" not in given):
            continue
        path = folder / paths[-1]
        if path.is_relative_to(folder) and not paths[-1].startswith("pipe:"):
            name = "rmdir" if "AT_REMOVEDIR" in given else SAME.get(name, name)
            found.append((name, plain(str(path))))
    return found


def unbroken(record: str) -> str:
    """The record with the lines put together that a call of another thread came between."""
    begun: dict[str, str] = {}
    lines = []
    for line in record.splitlines():
        thread = line.split()[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>").rstrip()
        elif "resumed>" in line:
            lines.append(begun.pop(thread) + line.split("resumed>", 1)[1])
        else:
            lines.append(line)
    return "\n".join(lines)


def plain(path: str) -> str:
    """A path without the number of the process in a temporary's name, of its last part."""
    return re.sub(r"\.\d+\.(?=(old\.)?sepme-tmp)", ".N.", Path(path).name)


def recorded(calls: tuple[Call, ...]) -> list[tuple[str, str]]:
    return [(call.name, plain(call.paths[-1])) for call in calls]


@pytest.mark.skipif(not strace_works(), reason="strace cannot run here")
@pytest.mark.parametrize("scene", [IN_PLACE[0], IN_PLACE[2], FOLDERS[0]], ids=str)
def test_no_call_is_missed(scene: Scene, tmp_path: Path) -> None:
    staged = stage(scene, tmp_path)
    ours = Counter(recorded(staged.calls))
    theirs = Counter(seen_by_strace(scene.line, staged.again()))
    assert tree(staged.here) == staged.after
    tried = {call for call in ours if call[0] in ("mkdir", "fchown")}  # those that may fail
    assert {c: n for c, n in theirs.items() if c not in tried} == {
        c: n for c, n in ours.items() if c not in tried
    }
