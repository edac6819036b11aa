"""What a path really is: nothing that is read, or that others share, is written over."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepme_cli.errors import RefusedError, UsageError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import erase
from sepme_cli.operations.export import export
from sepme_cli.operations.extract import extract
from sepme_cli.operations.recipe import init
from sepme_cli.operations.revert import revert
from sepme_cli.operations.sample import sample
from sepme_cli.operations.verify import verify
from sepme_cli.progress import Progress
from tests.layouts import write_folder
from tests.small_model import small_parts
from tests.small_model import write_folder as write_parts
from tests.synthetic import checkpoint_tensors, make_checkpoint, make_patches

Files = dict[str, Path]
COMMIT = "0123456789" * 4


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    model = make_checkpoint(tmp_path / "m.safetensors")
    (patch,) = make_patches(tmp_path, model, ["Monet"])
    made = tmp_path / "patched.safetensors"
    apply(model, patch, made)
    return {"model": model, "patch": patch, "patched": made}


def itself(path: Path) -> Path:
    return path


def by_another_way(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


def by_a_link(path: Path) -> Path:
    link = path.with_name("link" + path.suffix)
    link.symlink_to(path.name)
    return link


def by_a_linked_folder(path: Path) -> Path:
    link = path.parent.parent / f"{path.parent.name}-link"
    link.symlink_to(path.parent)
    return link / path.name


def by_a_hard_link(path: Path) -> Path:
    link = path.with_name("hard" + path.suffix)
    link.hardlink_to(path)
    return link


NAMES = (itself, by_another_way, by_a_link, by_a_linked_folder, by_a_hard_link)

#: What would write over what: the file that is in danger, and the command.
WRITES: dict[str, tuple[str, Callable[[Files, Path], Any]]] = {
    "apply, the model": ("model", lambda f, o: apply(f["model"], f["patch"], o, force=True)),
    "apply --check, the model": (
        "model",
        lambda f, o: apply(f["model"], f["patch"], o, force=True, check=True),
    ),
    "apply, the patch": ("patch", lambda f, o: apply(f["model"], f["patch"], o, force=True)),
    "apply, a statement over the patch": (
        "patch",
        lambda f, o: apply(
            f["model"], f["patch"], o.with_name("out.safetensors"), statement=o, force=True
        ),
    ),
    "revert, the model": (
        "patched",
        lambda f, o: revert(f["patched"], base=f["model"], output=o, force=True),
    ),
    "revert, the base": (
        "model",
        lambda f, o: revert(f["patched"], base=f["model"], output=o, force=True),
    ),
    "erase, the model": ("model", lambda f, o: erase(f["model"], "Monet", output=o, force=True)),
    "erase --apply, the model": (
        "model",
        lambda f, o: erase(
            f["model"], "Monet", output=o.with_name("new.sepme"), apply_to=o, force=True
        ),
    ),
    "erase, a known patch": (
        "patch",
        lambda f, o: erase(f["model"], "Klimt", known=f["patch"], output=o, force=True),
    ),
    "sample, the model": ("model", lambda f, o: sample(f["model"], "a cat", output=o, force=True)),
    "export, the patch": ("patch", lambda f, o: export(f["patch"], "kohya", o, force=True)),
    "import, the edited": (
        "patched",
        lambda f, o: extract(f["model"], f["patched"], o, concept="Monet", force=True),
    ),
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.__name__)
@pytest.mark.parametrize("case", WRITES)
def test_nothing_takes_the_place_of_what_it_is_made_from(
    case: str, name: Callable[[Path], Path], files: Files, tmp_path: Path
) -> None:
    which, write = WRITES[case]
    output = name(files[which])
    before = everything(tmp_path)
    with pytest.raises(UsageError) as caught:
        write(files, output)
    assert caught.value.expected and caught.value.found
    assert everything(tmp_path) == before


def test_a_part_of_the_models_folder_is_the_model_too(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "model", checkpoint_tensors())
    before = everything(model)
    for part in ("unet/diffusion_pytorch_model.safetensors", "model_index.json"):
        with pytest.raises(UsageError, match="a part of"):
            erase(model, "Monet", output=model / part, force=True)
        with pytest.raises(UsageError, match="a part of"):
            sample(model, "a cat", output=model / part, force=True)
    assert everything(model) == before


def test_a_patch_may_lie_in_its_models_folder(tmp_path: Path) -> None:
    model = write_parts(small_parts("sd1"), tmp_path / "model")
    for force in (False, True):
        erase(model, "Monet", output=model / "p.sepme", kind="style", force=force)


# The hub's cache


@pytest.fixture
def blob(tmp_path: Path, files: Files) -> Path:
    """A model in a cache as the hub's client lays it out."""
    repository = tmp_path / "hub" / "models--somebody--something"
    blob = repository / "blobs" / ("0" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(files["model"].read_bytes())
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "m.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    (snapshot / "copied.safetensors").write_bytes(blob.read_bytes())
    return blob


def in_the_cache(blob: Path, tmp_path: Path) -> dict[str, Path]:
    snapshot = blob.parent.parent / "snapshots" / COMMIT
    link = tmp_path / "mine.safetensors"
    link.symlink_to(snapshot / "m.safetensors")
    folder = tmp_path / "folder"
    folder.symlink_to(snapshot)
    return {
        "the blob": blob,
        "the snapshot's link": snapshot / "m.safetensors",
        "without links, as on Windows": snapshot / "copied.safetensors",
        "a link of one's own": link,
        "a folder linked": folder / "m.safetensors",
    }


WAYS = (
    "the blob",
    "the snapshot's link",
    "without links, as on Windows",
    "a link of one's own",
    "a folder linked",
)


@pytest.mark.parametrize("way", WAYS)
def test_the_hubs_cache_is_never_written_to(
    way: str, blob: Path, files: Files, tmp_path: Path
) -> None:
    path = in_the_cache(blob, tmp_path)[way]
    before = everything(tmp_path)
    writes: tuple[Callable[[], Any], ...] = (
        lambda: apply(path, files["patch"], in_place=True),
        lambda: apply(files["model"], files["patch"], path, force=True),
        lambda: revert(files["patched"], base=files["model"], output=path, force=True),
        lambda: erase(files["model"], "Monet", output=path, force=True),
        lambda: export(files["patch"], "kohya", path, force=True),
        lambda: init(path, force=True),
    )
    for write in writes:
        with pytest.raises(RefusedError, match="hub's cache") as caught:
            write()
        assert caught.value.expected and caught.value.found
    assert everything(tmp_path) == before
    apply(path, files["patch"], tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == files["patched"].read_bytes()


@pytest.mark.parametrize("linked", [True, False])
def test_a_models_folder_in_the_hubs_cache(linked: bool, files: Files, tmp_path: Path) -> None:
    snapshots = tmp_path / "models--somebody--something" / "snapshots"
    snapshots.mkdir(parents=True)
    model = write_folder(snapshots / COMMIT, checkpoint_tensors())
    if linked:
        (tmp_path / "mine").symlink_to(model)
        model = tmp_path / "mine"
    before = everything(tmp_path)
    with pytest.raises(RefusedError, match="hub's cache"):
        apply(model, files["patch"], in_place=True)
    with pytest.raises(RefusedError, match="hub's cache"):
        apply(files["model"], files["patch"], model / "new.safetensors")
    assert everything(tmp_path) == before


def test_a_link_to_a_file_of_ones_own_is_written_through(files: Files, tmp_path: Path) -> None:
    """As people keep their models on another disk."""
    link = by_a_link(files["model"])
    apply(link, files["patch"], in_place=True)
    assert files["model"].read_bytes() == files["patched"].read_bytes()
    assert link.is_symlink() and verify([files["model"]]).ok


def test_other_names_of_a_file_that_is_written_in_place_are_told(
    files: Files, tmp_path: Path
) -> None:
    by_a_hard_link(files["model"])
    assert any(
        "2 names" in w for w in apply(files["model"], files["patch"], in_place=True).warnings
    )
    heard: list[str] = []

    class Heard(Progress):
        def warn(self, message: str) -> None:
            heard.append(message)

    revert(files["model"], in_place=True, progress=Heard())
    assert any("2 names" in message for message in heard)
