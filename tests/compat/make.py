"""Keep files of this release for all later ones to read: `python -m tests.compat.make`.

Run once, when a release is made. What an earlier one has left is never touched.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from patch_spec.base import Base
from patch_spec.container import patch_bytes
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from patch_spec.provenance import Measurements, Method
from sepme_cli import __version__
from sepme_cli.app import run
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.operations.apply import apply
from sepme_cli.recipe import TEMPLATE
from tests.checkpoints.test_journal import killed_at
from tests.compat.release import MODELS, PATCHES, outcomes
from tests.layouts import write_folder
from tests.small_model import save_small_model
from tests.synthetic import (
    Shape,
    additive,
    base_of,
    checkpoint_tensors,
    lora,
    make_patch,
    operator,
    write_safetensors,
)

HERE = Path(__file__).parent
SMALL = Shape(width=16, channels=(8,), attention=(False,))
COMMANDS = {
    "erase": "erase small.safetensors --concept ink --method closed-form --rank 2 -o erased.sepme",
    "apply": "apply model.safetensors additive.sepme -o out",
    "revert": "revert patched-model.safetensors --base model.safetensors -o out",
    "diff": "diff model.safetensors patched-model.safetensors",
    "inspect": "inspect patched-model.safetensors",
    "verify": "verify patched-model.safetensors --base model.safetensors",
}
"""Whose JSON is kept. A small model with text encoder and VAE is there for the first."""


def main() -> None:
    folder = HERE / __version__
    if folder.exists():
        sys.exit(f"{folder.relative_to(HERE)} is what a release has left, and stays as it is")
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / __version__
        made.mkdir()
        _models_and_patches(made)
        _in_place(made / "in-place", made, cut=False)
        _in_place(made / "cut", made, cut=True)
        save_small_model(made / "small.safetensors")
        told = {command: said(line, made) for command, line in COMMANDS.items()}
        (made / "small.safetensors").unlink()
        _write(made / "json.json", told)
        (scratch := Path(name) / "scratch").mkdir()
        _write(made / "outcomes.json", outcomes(made, scratch))
        shutil.copytree(made, folder)


def said(line: str, folder: Path) -> dict[str, object]:
    """What a command prints with --json, run in a copy of a folder; what it makes comes back."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        status = run([*line.split(), "--json"])
        assert status in (0, 1), out.getvalue()  # 1: what is compared differs
    (folder / "out").unlink(missing_ok=True)
    found: dict[str, object] = json.loads(out.getvalue())
    return found


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _models_and_patches(made: Path) -> None:
    tensors = checkpoint_tensors(SMALL, ema="F32")
    plain = checkpoint_tensors(SMALL)
    model = write_safetensors(made / MODELS[0], tensors, {"title": "m"})
    write_folder(made / MODELS[1], plain, shards=2, metadata={"format": "pt"})
    (made / "policy.yaml").write_text(TEMPLATE)
    base = base_of(model)
    for name, parts in zip(PATCHES[:2], _increments(base), strict=True):
        make_patch(made / name, base, *parts)
    (made / PATCHES[2]).write_bytes(patch_bytes(_every_field(base, made / "policy.yaml")))
    for name in MODELS:
        output = made / f"patched-{name}"
        apply(made / name, [made / PATCHES[0]], made / "step", scale=0.5)
        others = [made / patch for patch in PATCHES]
        apply(made / "step", others, output, base=made / name)
        shutil.rmtree(made / "step") if name == MODELS[1] else (made / "step").unlink()


def _increments(base: Base) -> tuple[list[Increment], list[Increment]]:
    return (
        [additive(base, "Monet", seed=1), additive(base, "Klimt", seed=2, rank=2)],
        [operator(base, "Van Gogh", seed=3)],
    )


def _every_field(base: Base, recipe: Path) -> Patch:
    """All kinds, and a value for all that a manifest can say."""
    settings = {"seed": 3, "rate": 0.25, "joint": True, "to": "a cat", "protect": None}
    told = {
        "prompts": ("café", "a picture of a café"),
        "method": Method("closed-form", settings),
        "measured": Measurements(1.0, 0.125, 1e-7, 0.5, 17, "threshold"),
    }
    parts = [
        operator(base, "café", seed=4),
        additive(base, "gare", seed=5),
        lora(base, "quai", seed=6),
    ]
    return Patch(
        base=base,
        increments=tuple(replace(part, **told) for part in parts),
        separable_from=("", "a dog"),
        protected=("a picture", "an étude"),
        tool=f"sepme {__version__}",
        created="2024-01-31T00:00:00Z",
        recipe=sha256(recipe.read_bytes()).hexdigest(),
    )


def _in_place(folder: Path, made: Path, *, cut: bool) -> None:
    """A model with two patches in it; cut: and a third that was being written when it stopped."""
    folder.mkdir()
    path = Path(shutil.copy(made / MODELS[0], folder))
    apply(path, [made / PATCHES[0]], in_place=True)
    if not cut:
        apply(path, [made / PATCHES[1]], in_place=True)
        return
    before = path.read_bytes()
    for n in range(1, 500):
        assert killed_at(n, lambda: apply(path, [made / PATCHES[1]], in_place=True))
        if pending_path(path).exists() and path.read_bytes() != before:
            break
    for left in folder.glob(".*"):
        os.unlink(left)


if __name__ == "__main__":
    main()
