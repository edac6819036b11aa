"""Memory is bounded: a checkpoint's size is no part of what patching it takes.

The files are holes, which cost no disk, and the processes may not have more memory than said.
"""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from tests.synthetic import (
    DTYPES,
    SMALL,
    Shape,
    additive,
    base_of,
    make_patch,
    operator,
    unet_shapes,
)

ROOM = 400
"""Megabytes of data that a command may take beside the interpreter and its imports."""
LIMITED = """
import resource, sys
import sepme_cli.operations.apply, sepme_cli.operations.revert, sepme_cli.render.results
from sepme_cli.app import run
used = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
most = int(used.split()[1]) * 1024 + int(sys.argv[1]) * 10**6
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
if sys.argv[2] == "read":
    open(sys.argv[3], "rb").read()
sys.exit(run(sys.argv[2:]))
"""
LARGE = Shape("sdxl", 2048, channels=(1280, 1280), attention=(True, True), depth=5)


def hollow(path: Path, shape: Shape, dtype: str, more: int = 0) -> Path:
    """A UNet of nothing but zeros that are nowhere on the disk, with room in its header.

    more: bytes of another tensor.
    """
    unet = {f"model.diffusion_model.{name}": size for name, size in unet_shapes(shape).items()}
    shapes = unet | {"first_stage_model.decoder.conv_in.weight": (more // 4,)}
    header, position = {}, 0
    for name, size in shapes.items():
        kind = dtype if name in unet else "F32"
        end = position + prod(size) * DTYPES[kind].itemsize
        entry = {"dtype": kind, "shape": list(size), "data_offsets": [position, end]}
        header[name], position = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + 2**15)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(ROOM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_gigabytes_go_through_a_little_memory(tmp_path: Path) -> None:
    model = hollow(tmp_path / "model.safetensors", LARGE, "F32")
    with open_checkpoint(model) as checkpoint:
        targets = sum(target.copies[0].entry.nbytes for target in checkpoint.targets)
    base = base_of(model, text_encoders=False)
    parts = [additive(base, "a", seed=1, rank=8), operator(base, "o", seed=2, rank=8)]
    patch = make_patch(tmp_path / "p.sepme", base, *parts)
    assert targets > 1.5 * ROOM * 10**6 and model.stat().st_size > 4 * ROOM * 10**6

    whole = limited("read", model)
    assert "MemoryError" in whole.stderr, "that the limit is one"
    for arguments in (
        ("apply", model, patch, "-o", "/dev/null"),
        ("inspect", model),
        ("verify", model),
    ):
        done = limited(*arguments)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_in_place_only_the_targets_are_touched(tmp_path: Path) -> None:
    """Of a hundred gigabytes; those that are not targets stay holes."""
    model = hollow(tmp_path / "model.safetensors", SMALL, "F16", more=10**11)
    base = base_of(model, text_encoders=False)
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "a", seed=1))
    for line in (["apply", model, patch, "--in-place"], ["revert", model, "--in-place"]):
        done = limited(*line)
        assert done.returncode == 0, done.stderr
        assert model.stat().st_blocks * 512 < 10**6
    assert base_of(model, text_encoders=False) == base
