"""Where the power fails, what was not synced may be gone; the files are old or new ones still."""

import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from tests.faults.calls import Call
from tests.faults.power import Change, Disk, Traced, contents, write_out
from tests.faults.runs import in_child
from tests.faults.scenes import IN_PLACE, TO_FILES, Scene, stage
from tests.faults.test_kill import survives


def within(call: Call, folder: Path) -> Call:
    """The call with its paths from the folder on."""
    return replace(call, paths=tuple(str(Path(p).relative_to(folder)) for p in call.paths))


def key(found: dict[str, list[Change] | None]) -> str:
    digest = sha256()
    for name, changes in sorted(found.items()):
        digest.update(name.encode() + b"\0")
        if changes is not None:
            holes = str([change for change in changes if change[0] == "half"])
            digest.update(sha256(contents(b"", changes)).digest() + holes.encode())
    return digest.hexdigest()


@pytest.mark.parametrize("scene", [TO_FILES[1], IN_PLACE[0], IN_PLACE[2]], ids=str)
def test_the_power_fails_after_every_call(scene: Scene, tmp_path: Path) -> None:
    staged = stage(scene, tmp_path)
    here = staged.again()
    disk = Disk.holding(here)
    traced = in_child(scene.line, here, Traced())
    assert traced.status == 0
    seen = set()
    for call in traced.calls:
        disk.do(within(call, here))
        for found in disk.crashes():
            if (state := key(found)) in seen:
                continue
            seen.add(state)
            shutil.rmtree(here)
            here.mkdir()
            write_out(here, found)
            survives(staged)
    assert len(seen) > len(traced.calls)
    print(f"{scene}: {len(seen)} states after {len(traced.calls)} calls")
