"""The commands that write, each with a folder to do it in."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sepme_cli.operations.apply import apply
from tests.faults.calls import Call, Recorded
from tests.faults.runs import Tree, in_child, renew, run, tree
from tests.layouts import write_folder
from tests.synthetic import (
    Shape,
    base_of,
    checkpoint_tensors,
    layered,
    make_checkpoint,
    make_patch,
    make_patches,
)

TINY = Shape(width=48, channels=(16,), attention=(False,))
"""One transformer block: the fewest calls. Wide enough for some pages."""


@dataclass(frozen=True)
class Scene:
    """line: what is run. target: what it writes. prepare: makes the folder, which holds the base
    and two patches, ready for it."""

    name: str
    line: str
    target: str
    prepare: Callable[[Path], object] = lambda folder: None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Staged:
    """A scene's folder as it was (template, before), and as it is when all goes well (after)."""

    scene: Scene
    template: Path
    here: Path
    before: Tree
    after: Tree
    calls: tuple[Call, ...]

    def again(self) -> Path:
        """The folder as it was."""
        renew(self.here, self.template)
        return self.here


def stage(scene: Scene, folder: Path) -> Staged:
    """Make a scene's folder, and run its command once undisturbed."""
    template, here = folder / "template", folder / "here"
    template.mkdir()
    model = make_checkpoint(template / "m.safetensors", TINY, ema="F16")
    make_patches(template, model, ["Monet", "Klimt"])
    scene.prepare(template)
    before = tree(template)
    renew(here, template)
    run(scene.line, here)  # so that children find all modules there
    renew(here, template)
    ended = in_child(scene.line, here, Recorded())
    assert ended.status == 0, ended.err
    return Staged(scene, template, here, before, tree(here), ended.calls)


def _in_place(*patches: str, model: str = "m.safetensors") -> Callable[[Path], object]:
    """A model that has the patches in it, each put in place."""

    def prepare(folder: Path) -> None:
        for patch in patches:
            apply(folder / model, [folder / patch], in_place=True)

    return prepare


def _clean(folder: Path) -> None:
    apply(folder / "m.safetensors", [folder / "monet.sepme"], folder / "clean.safetensors")


def _folder(folder: Path) -> None:
    """A model with two variants of its UNet: two files to write, or none. Of the files that are
    copied as they are, a few: each is as many calls as the next."""
    tensors, variants = checkpoint_tensors(TINY), {"": "F32", "fp16": "F16"}
    model = write_folder(folder / "model", tensors, variants=variants, metadata={"format": "pt"})
    shutil.rmtree(model / "text_encoder")
    (model / "vae/config.json").unlink()
    (model / "README.md").unlink()


def _folder_out(folder: Path) -> None:
    _folder(folder)
    shutil.copytree(folder / "model", folder / "out")
    (folder / "out/extra.txt").write_text("of the old one alone")


def _folder_with(*patches: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        _folder(folder)
        _in_place(*patches, model="model")(folder)

    return prepare


def _with_layers(*patches: str) -> Callable[[Path], object]:
    """A model with its text encoder, in which a patch changes a layer: two files to write, of which
    the other patches change one."""

    def prepare(folder: Path) -> None:
        model = write_folder(folder / "model", checkpoint_tensors(TINY))
        (model / "vae/config.json").unlink()
        (model / "README.md").unlink()
        base = base_of(model, layers=LAYERS)
        make_patch(folder / "layers.sepme", base, layered(base, "layers", seed=9))
        _in_place(*patches, model="model")(folder)

    return prepare


LAYERS = (
    "clip_l.encoder.layers.0.self_attn.q_proj.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight",
)


def _old(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"what was there before\n" * 50)


M, MONET, KLIMT = "m.safetensors", "monet.sepme", "klimt.sepme"
TO_FILES = [
    Scene("apply to a file", f"apply {M} {MONET} -o out", "out"),
    Scene("apply over a file", f"apply {M} {MONET} -o out --force", "out", _old("out")),
    Scene("revert to a file", f"revert clean.safetensors --base {M} -o out", "out", _clean),
]
IN_PLACE = [
    Scene("apply in place, first", f"apply {M} {MONET} --in-place", M),
    Scene("apply in place, second", f"apply {M} {KLIMT} --in-place", M, _in_place(MONET)),
    Scene("revert in place, last", f"revert {M} --in-place", M, _in_place(MONET)),
    Scene(
        "revert in place, one of two",
        f"revert {M} --concept Monet --in-place",
        M,
        _in_place(MONET, KLIMT),
    ),
]
FOLDERS = [
    Scene("apply over a folder", f"apply model {MONET} -o out --force", "out", _folder_out),
]
FOLDERS_IN_PLACE = [
    Scene("folder in place, first", f"apply model {MONET} --in-place", "model", _folder),
    Scene("folder reverted in place", "revert model --in-place", "model", _folder_with(MONET)),
    Scene(
        "layers in place, second",
        "apply model layers.sepme --in-place",
        "model",
        _with_layers(MONET),
    ),
    Scene(
        "layers reverted in place, one of two",
        "revert model --concept layers --in-place",
        "model",
        _with_layers(MONET, "layers.sepme"),
    ),
]
SCENES = [*TO_FILES, *IN_PLACE, *FOLDERS, *FOLDERS_IN_PLACE]
