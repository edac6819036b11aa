"""What a file holds, from its header alone and at once."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patch_spec.container import read_manifest
from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.errors import MalformedError, SystemFailure
from sepme_cli.operations.apply import apply
from sepme_cli.operations.inspect import CheckpointInfo, PatchInfo, UndoInfo, inspect
from tests.synthetic import base_of, make_checkpoint, make_patches


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "m.safetensors", ema="F32", metadata={"title": "x"})


def test_a_checkpoint(model: Path, tmp_path: Path) -> None:
    info = inspect(model)
    assert isinstance(info, CheckpointInfo)
    assert (info.kind, info.family, info.layout, info.dtype) == (
        "checkpoint",
        "sd1",
        "single-file",
        "fp16",
    )
    assert (info.width, info.targets, info.ema, info.text_encoders) == (24, 14, True, ("clip_l",))
    assert (info.applied, info.base, info.undo) == ((), None, None)
    assert info.bytes == model.stat().st_size
    apply(model, make_patches(tmp_path, model)[:2], scale=0.5, in_place=True)
    info = inspect(model)
    assert isinstance(info, CheckpointInfo)
    assert [(e.concept, e.scale) for e in sorted(info.applied, key=lambda e: e.concept)] == [
        ("Monet", 0.5),
        ("Van Gogh", 0.5),
    ]
    assert info.undo == str(undo_path(model))


def test_a_patch_and_a_journal_whatever_their_names(model: Path, tmp_path: Path) -> None:
    base = base_of(model).digest
    [patch, *_] = make_patches(tmp_path, model)
    renamed = patch.rename(tmp_path / "patch.safetensors")
    info = inspect(renamed)
    assert isinstance(info, PatchInfo)
    assert info.kind == "patch"
    assert info.manifest == read_manifest(renamed).to_json()
    with renamed.open("rb") as stream:
        piped = inspect(stream)
    assert isinstance(piped, PatchInfo) and piped.manifest == info.manifest
    apply(model, [renamed], in_place=True)
    journal = inspect(undo_path(model))
    assert isinstance(journal, UndoInfo)
    assert (journal.kind, journal.base, journal.tensors) == ("undo", base, 28)


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure):
        inspect(tmp_path / "nowhere")
    with pytest.raises(MalformedError):
        inspect(io.BytesIO(b"nothing of the kind"))
    (tmp_path / "x.sepme").write_bytes(b"nothing of the kind")
    with pytest.raises(MalformedError, match=r"x\.sepme"):
        inspect(tmp_path / "x.sepme")


def test_values_are_not_looked_at(model: Path) -> None:
    """The data may be a hole: only the header is read."""
    header = model.read_bytes()[: 8 + int.from_bytes(model.read_bytes()[:8], "little")]
    size = model.stat().st_size
    model.write_bytes(header)
    with model.open("r+b") as file:
        file.truncate(size)
    assert isinstance(inspect(model), CheckpointInfo)


def test_nothing_heavy_is_imported(model: Path) -> None:
    script = (
        "import sys; from pathlib import Path;"
        "from sepme_cli.operations.inspect import inspect;"
        "import sepme_cli.operations.apply, sepme_cli.operations.revert, sepme_cli.operations.diff;"
        f"inspect(Path({str(model)!r}));"
        "print({'torch', 'safetensors', 'diffusers', 'transformers', 'rich'} & set(sys.modules))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr
    assert time.monotonic() - started < 5, "ten times what it should take"
