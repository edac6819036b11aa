"""What a patched checkpoint says of itself: what is in it, from what, and nothing that is stale."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from patch_spec.container import read_patch
from sepme_cli import __version__
from sepme_cli.operations.apply import apply
from sepme_cli.operations.revert import revert
from tests.layouts import LAYOUTS, SAFE, write_layout
from tests.synthetic import base_of, make_checkpoint, make_patches, raw_tensors, read_raw

LASTING = {"title": "é \U0001f600", "modelspec.title": "m", "sshs_epochs": "3", "x": ""}
STALE = {"modelspec.hash_sha256": "0x12", "sshs_model_hash": "34", "sshs_legacy_hash": "56"}


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("patches")
    return make_patches(folder, make_checkpoint(folder / "base.safetensors"), ["Monet", "Klimt"])


def described(path: Path, metadata: dict[str, str]) -> None:
    """Put metadata into a safetensors file, beside what it says."""
    header, data = read_raw(path)
    header["__metadata__"] = header.get("__metadata__", {}) | metadata
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def metadata_of(model: Path) -> dict[str, dict[str, str]]:
    """File by file."""
    return {str(path.relative_to(model)): said(path) for path in safetensors(model)}


def said(path: Path) -> dict[str, str]:
    return read_raw(path)[0].get("__metadata__", {})


def safetensors(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(model.rglob("*.safetensors"))


def told(patch: Path, scale: float) -> dict[str, object]:
    (part,) = read_patch(patch).increments
    return {"digest": part.digest, "concept": part.concept, "slug": part.slug, "scale": scale}


def record(base: str, patches: list[Path], scale: float = 1) -> dict[str, object]:
    """The whole of it, made by no code that writes records."""
    increments = [told(patch, scale) for patch in patches]
    return {
        "format": "sepme-stack",
        "version": 1,
        "base": base,
        "family": "sd1",
        "increments": sorted(increments, key=lambda one: str(one["digest"])),
        "patches": sorted(sha256(patch.read_bytes()).hexdigest() for patch in patches),
        "tool": f"sepme {__version__}",
    }


def check(
    model: Path, before: dict[str, dict[str, str]], expected: dict[str, object] | None
) -> None:
    """Every file that holds a target says `expected` and nothing stale, others what they did."""
    for place, ours in metadata_of(model).items():
        theirs = before[place]
        tensors = raw_tensors(model if model.is_file() else model / place)
        if expected is None or not any("attn2.to_k" in name for name in tensors):
            assert ours == theirs
            continue
        found = ours.pop("sepme")
        assert json.loads(found) == expected
        lasting = {key: value for key, value in theirs.items() if key not in STALE}
        assert ours == lasting


@pytest.mark.parametrize("layout", SAFE)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_in_it_and_from_what(
    layout: str, in_place: bool, patches: list[Path], tmp_path: Path
) -> None:
    model = write_layout(layout, tmp_path)
    for path in safetensors(model):
        described(path, LASTING | STALE)
    before, base = metadata_of(model), base_of(model).digest
    original = [path.read_bytes() for path in safetensors(model)]

    def step(name: str) -> dict[str, object]:
        return {"in_place": True} if in_place else {"output": tmp_path / f"{name}{model.suffix}"}

    def at(name: str) -> Path:
        return model if in_place else tmp_path / f"{name}{model.suffix}"

    given = {} if in_place else {"base": model}
    apply(model, patches[:1], scale=0.5, **step("one"))
    check(at("one"), before, record(base, patches[:1], 0.5))
    apply(at("one"), patches, scale=0.5, **given, **step("both"))
    check(at("both"), before, record(base, patches, 0.5))
    revert(at("both"), patches, concepts=["Monet"], **given, **step("klimt"))
    check(at("klimt"), before, record(base, patches[1:], 0.5))
    revert(at("klimt"), **given, **step("none"))
    check(at("none"), before, None)
    assert [path.read_bytes() for path in safetensors(at("none"))] == original


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in SAFE])
def test_pickles_that_become_safetensors_say_it_too(
    layout: str, patches: list[Path], tmp_path: Path
) -> None:
    model = write_layout(layout, tmp_path)
    output = tmp_path / ("out" if model.is_dir() else "out.safetensors")
    apply(model, patches, output)
    found = [said(path).get("sepme") for path in safetensors(output)]
    (text,) = {text for text in found if text is not None}
    assert json.loads(text) == record(base_of(model).digest, patches)


@pytest.mark.parametrize("layout", ["single file", "shards"])
def test_in_another_dtype_no_file_keeps_a_stale_digest(
    layout: str, patches: list[Path], tmp_path: Path
) -> None:
    model = write_layout(layout, tmp_path)
    for path in safetensors(model):
        described(path, LASTING | STALE)
    output = tmp_path / ("out" if model.is_dir() else "out.safetensors")
    apply(model, patches, output, dtype="fp32")
    for path in safetensors(output):
        ours = said(path)
        assert LASTING.items() <= ours.items()
        assert not ours.keys() & STALE.keys()


def test_a_subtraction_says_what_is_left_and_nothing_stale(
    patches: list[Path], tmp_path: Path
) -> None:
    model = write_layout("single file", tmp_path)
    described(model, LASTING | STALE)
    base, clean, back = base_of(model).digest, tmp_path / "clean", tmp_path / "back"
    apply(model, patches, clean)
    assert not revert(clean, patches[:1], output=back).exact
    left = said(back)
    assert json.loads(left.pop("sepme")) == record(base, patches[1:])
    assert left == {"format": "pt"} | LASTING
    last = tmp_path / "last"
    assert not revert(back, patches[1:], output=last).exact
    assert said(last) == {"format": "pt"} | LASTING
