"""What can be done with the files that a release has left, and what it comes to."""

import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from patch_spec.container import patch_bytes, read_patch
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.operations.apply import apply
from sepme_cli.operations.inspect import CheckpointInfo, inspect
from sepme_cli.operations.revert import revert
from sepme_cli.operations.verify import verify
from sepme_cli.recipe import SETTINGS, read_recipe
from tests.synthetic import read_raw

MODELS = ("model.safetensors", "folder")
PATCHES = ("additive.sepme", "operator.sepme", "every-field.sepme")


def outcomes(release: Path, scratch: Path) -> dict[str, str]:
    """A SHA-256 by what was done. Of checkpoints that of their weights: the header names a tool.

    release: a folder that `make` has filled; it is only read. scratch: an empty folder.
    """
    found: dict[str, str] = {}
    for name, work in _works(release):
        place = scratch / str(len(found))
        shutil.copytree(release, place)
        found[name] = work(place)
        shutil.rmtree(place)
    return found


def _works(release: Path) -> Iterator[tuple[str, Callable[[Path], str]]]:
    patches = [*PATCHES, *(path.name for path in [release / "erased.sepme"] if path.exists())]
    for patch in patches:
        yield f"read {patch}", lambda at, p=patch: sha256(_read(at / p)).hexdigest()
    yield "recipe", lambda at: read_recipe(at / "policy.yaml", SETTINGS).digest
    for model in MODELS:
        for patch in PATCHES:
            yield f"apply {patch} to {model}", lambda at, m=model, p=patch: _applied(at, m, [p])
        yield f"apply all to {model}", lambda at, m=model: _applied(at, m, PATCHES)
        patched = f"patched-{model}"
        yield f"inspect {patched}", lambda at, m=patched: _inspected(at / m)
        yield f"revert all of {patched}", lambda at, m=model: _reverted(at, m)
        yield f"revert some of {patched}", lambda at, m=model: _reverted(at, m, "Klimt")
    yield "in place, by its journal", lambda at: _in_place(at / "in-place" / MODELS[0])
    yield "in place, one concept", lambda at: _in_place(at / "in-place" / MODELS[0], "Klimt")
    yield "cut short", _settled


def _read(path: Path) -> bytes:
    """A patch, read and written again: the same bytes."""
    assert verify([path]).ok
    return patch_bytes(read_patch(path))


def _applied(at: Path, model: str, patches: tuple[str, ...] | list[str]) -> str:
    output = at / f"out-{model}"
    result = apply(at / model, [at / patch for patch in patches], output)
    assert result.exact and result.base_match == "exact" and result.warnings == ()
    assert verify([output, *(at / patch for patch in patches)], base=at / model).ok
    return weights(output)


def _reverted(at: Path, model: str, *concepts: str) -> str:
    patches = [at / patch for patch in PATCHES]
    output = at / f"out-{model}"
    result = revert(
        at / f"patched-{model}", patches, concepts=concepts, base=at / model, output=output
    )
    assert result.exact
    return weights(output)


def _in_place(path: Path, *concepts: str) -> str:
    assert verify([path]).ok, "its journal and the patches kept beside it say so"
    assert revert(path, concepts=concepts, in_place=True).exact
    return weights(path)


def _settled(at: Path) -> str:
    path = at / "cut" / MODELS[0]
    assert pending_path(path).exists()
    assert verify([path]).ok
    assert not pending_path(path).exists()
    return sha256(path.read_bytes()).hexdigest()


def _inspected(path: Path) -> str:
    info = inspect(path)
    assert isinstance(info, CheckpointInfo)
    told = [f"{entry.digest} {entry.concept} {entry.slug} {entry.scale}" for entry in info.applied]
    return sha256("\n".join([str(info.base), *told]).encode()).hexdigest()


def weights(path: Path) -> str:
    """Of a checkpoint's data sections."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return sha256(b"".join(read_raw(file)[1] for file in files)).hexdigest()
