"""Checkpoints as large as real ones: only what should change does, in memory that stays small."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import pytest

from benchmarks.full_size import make
from benchmarks.speed import increment
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from tests.synthetic import make_patch

MEMORY = 500
"""Megabytes over the interpreter with its imports."""
PEAK = """
import sys
from sepme_cli.app import run
status = run(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) * 1024 // 10**6, file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    if disk_usage(folder).free < 8e9:
        pytest.skip("there is no room on the disk for full-size files")
    make("sd1", path := folder / "model.safetensors")
    yield path
    for file in folder.iterdir():
        file.unlink()


def sepme(*arguments: object) -> int:
    """Run it in a process of its own; its peak memory in megabytes."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stderr.split()[-1])


def entries(path: Path) -> tuple[dict[str, Any], np.memmap[Any, Any]]:
    """What the header says of the tensors, and the bytes behind it; by no code of ours."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    return header, np.memmap(path, np.uint8, "r", 8 + length)


def differing(a: Path, b: Path) -> set[str]:
    """The tensors whose bytes differ, of files that hold the same ones in the same places."""
    (ours, left), (theirs, right) = entries(a), entries(b)
    assert ours == theirs and len(left) == len(right)
    places = {name: slice(*fields["data_offsets"]) for name, fields in ours.items()}
    return {name for name, at in places.items() if not np.array_equal(left[at], right[at])}


@pytest.mark.slow
def test_a_full_size_checkpoint_there_and_back(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
        targets = {target.copies[0].name for target in checkpoint.targets}
    both = [increment(base, "monet", "operator", 1), increment(base, "klimt", "additive", 2)]
    patch = make_patch(model.with_name("p.sepme"), base, *both)
    idle = sepme("inspect", patch)
    clean, back = model.with_name("clean.safetensors"), model.with_name("back.safetensors")

    assert sepme("apply", model, patch, "-o", clean) < idle + MEMORY
    assert differing(model, clean) == targets
    assert sepme("revert", clean, "--base", model, "-o", back) < idle + MEMORY
    assert differing(model, back) == set()
    back.unlink()

    before = model.stat().st_size
    assert sepme("apply", model, patch, "--in-place") < idle + MEMORY
    assert differing(model, clean) == set()
    assert sepme("revert", model, "--in-place") < idle + MEMORY
    assert model.stat().st_size == before
    assert differing(model, clean) == targets
