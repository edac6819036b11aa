"""Every layout that models come in: patched, put back, and nothing else touched."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.patches import read_patch_file, select
from sepme_cli.checkpoints.structure.layout import ema_twin
from sepme_cli.errors import (
    MalformedError,
    MismatchError,
    RefusedError,
    SystemFailure,
    UnsupportedError,
    UsageError,
)
from sepme_cli.increments import compose
from sepme_cli.operations.apply import apply
from sepme_cli.operations.diff import diff
from sepme_cli.operations.inspect import CheckpointInfo, inspect
from sepme_cli.operations.revert import revert
from sepme_cli.progress import Progress
from tests.layouts import LAYOUTS, SAFE, parts, scaled, write_layout, write_shards
from tests.synthetic import (
    additive,
    base_of,
    checkpoint_tensors,
    make_checkpoint,
    make_patch,
    make_patches,
    raw_tensors,
    read_raw,
    write_safetensors,
)


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.said.append(message)


def files(path: Path) -> dict[str, bytes]:
    """All bytes of a checkpoint, by the names of its files."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def tensors(path: Path) -> dict[tuple[str, str], tuple[str, bytes]]:
    """Every tensor's dtype and bytes in the order of the files, by no code of ours."""
    weights = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return {
        (file.name if path.is_dir() else "", name): value
        for file in weights
        for name, value in raw_tensors(file).items()
    }


def is_target(name: str) -> bool:
    return name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))


def touched(names: list[str]) -> set[str]:
    """The targets among tensors' names, and their twins."""
    twins = {ema_twin(name) for name in names if is_target(name)}
    return {name for name in names if is_target(name) or name in twins}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in one file, and patches made from it, two kinds of them."""
    folder = tmp_path_factory.mktemp("base")
    model = make_checkpoint(folder / "base.safetensors")
    make_patches(folder, model, ["Monet", "Klimt"])
    return model


@pytest.fixture(scope="module")
def patches(base: Path) -> list[Path]:
    return sorted(base.parent.glob("*.sepme"))


@pytest.mark.parametrize("layout", SAFE)
def test_untouched_means_untouched(
    layout: str, base: Path, patches: list[Path], tmp_path: Path
) -> None:
    """Other tensors keep bytes, dtypes and order; other metadata and other files stay."""
    model = write_layout(layout, tmp_path)
    before = files(model)
    output = tmp_path / ("out" if model.is_dir() else "out.safetensors")
    result = apply(model, patches, output)
    assert files(model) == before
    old, new = tensors(model), tensors(output)
    assert list(old) == list(new)
    allowed = touched([name for _, name in old])
    changed = {key for key, value in old.items() if new[key] != value}
    assert {name for _, name in changed} <= allowed
    assert len(changed) == result.tensors_changed > 0
    assert {key: dtype for key, (dtype, _) in old.items()} == {
        key: dtype for key, (dtype, _) in new.items()
    }
    for place, data in files(output).items():
        if not (place or output.name).endswith(".safetensors"):
            assert data == before[place]
    for file in [output] if output.is_file() else output.rglob("*.safetensors"):
        source = model if output.is_file() else model / file.relative_to(output)
        theirs, ours = (read_raw(one)[0].get("__metadata__", {}) for one in (source, file))
        assert {k: v for k, v in ours.items() if k != "sepme"} == theirs
        has_target = any(is_target(name) for name in raw_tensors(source))
        assert ("sepme" in ours) == has_target


@pytest.mark.parametrize("layout", SAFE)
def test_reverting_gives_every_byte_back(layout: str, patches: list[Path], tmp_path: Path) -> None:
    model = write_layout(layout, tmp_path)
    before = files(model)
    both, one = (tmp_path / f"{name}{model.suffix}" for name in ("both", "one"))
    apply(model, patches, both)
    apply(model, patches[:1], one)
    back = tmp_path / f"back{model.suffix}"
    result = revert(both, patches, concepts=["Monet"], base=model, output=back)
    assert result.exact and result.remaining == ("Klimt",)
    assert tensors(back) == tensors(one)
    assert revert(both, base=model, output=back, force=True).exact
    assert files(back) == before


@pytest.mark.parametrize("layout", SAFE)
def test_in_place_and_back(layout: str, patches: list[Path], tmp_path: Path) -> None:
    model = write_layout(layout, tmp_path)
    whole = model if model.parent == tmp_path else model.parent
    before = files(whole)
    output = tmp_path / ("out" if model.is_dir() else "out.safetensors")
    apply(model, patches, output)
    apply(model, patches[:1], in_place=True)
    apply(model, patches[1:], in_place=True)
    assert tensors(model) == tensors(output)
    journals = list(tmp_path.rglob("*.sepme-undo"))
    with open_checkpoint(model) as checkpoint:
        assert len(journals) == len(checkpoint.target_files)
    assert revert(model, in_place=True).exact
    assert files(whole) == before
    assert [path for path in tmp_path.rglob("*.sepme-*") if "out" not in path.name] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_patch_fits_every_layout(
    layout: str, base: Path, patches: list[Path], tmp_path: Path
) -> None:
    """The same weights come out as in the single file that the patches were made from."""
    model = write_layout(layout, tmp_path)
    output = tmp_path / ("out" if model.is_dir() else "out.safetensors")
    result = apply(model, patches, output)
    reference = tmp_path / "reference.safetensors"
    apply(base, patches, reference)
    with open_checkpoint(output) as ours, open_checkpoint(reference) as theirs:
        assert ours.stack is not None and theirs.stack is not None
        assert ours.by_name.keys() == theirs.by_name.keys()
        if "fp8" in layout:
            assert result.base_match == "family"
            return
        assert result.base_match == "exact"
        assert ours.stack.base == theirs.stack.base
        for target in ours.targets:
            assert target.read().tobytes() == theirs.by_name[target.name].read().tobytes()


@pytest.mark.parametrize("layout", ["ckpt", "bin folder"])
def test_pickled_weights_become_safetensors(
    layout: str, patches: list[Path], tmp_path: Path
) -> None:
    model = write_layout(layout, tmp_path)
    output = tmp_path / ("out" if model.is_dir() else "out.safetensors")
    before = files(model)
    apply(model, patches, output)
    assert files(model) == before
    written = output if output.is_file() else output / "unet/diffusion_pytorch_model.safetensors"
    whole = checkpoint_tensors()
    expected = whole if output.is_file() else parts(whole)["unet"]
    found = raw_tensors(written)
    assert list(found) == list(expected)
    for name, (dtype, values) in expected.items():
        if not is_target(name):
            assert found[name] == (dtype, values.tobytes())
    assert not list(tmp_path.glob("out/**/*.bin"))
    back = tmp_path / f"back{output.suffix}"
    assert revert(output, base=model, output=back).exact
    with open_checkpoint(back) as ours, open_checkpoint(model) as theirs:
        assert ours.base() == theirs.base()
    with pytest.raises(UsageError, match="in place"):
        apply(model, patches, in_place=True)


def test_a_file_is_not_called_what_it_is_not(patches: list[Path], tmp_path: Path) -> None:
    model = write_layout("ckpt", tmp_path)
    with pytest.raises(UsageError, match="safetensors"):
        apply(model, patches, tmp_path / "clean.ckpt")


def test_base_and_journal_serve_across_layouts(
    base: Path, patches: list[Path], tmp_path: Path
) -> None:
    """A folder that was patched goes back with the single file as its base."""
    model = write_layout("shards", tmp_path)
    before = tensors(model)
    out, back = tmp_path / "out", tmp_path / "back"
    apply(model, patches, out)
    assert revert(out, base=base, output=back).exact
    assert tensors(back) == before
    with pytest.raises(MismatchError, match="further copy"):
        revert(_patched_variants(tmp_path, patches), base=base, output=tmp_path / "other")


def _patched_variants(folder: Path, patches: list[Path]) -> Path:
    (folder / "v").mkdir()
    model = write_layout("variants", folder / "v")
    apply(model, patches, folder / "v" / "out")
    return folder / "v" / "out"


def test_what_else_holds_the_weights_is_left_out_and_said(
    patches: list[Path], tmp_path: Path
) -> None:
    model = write_layout("folder", tmp_path)
    left = [model / "v1-5.safetensors", model / "unet" / "diffusion_pytorch_model.bin"]
    for path in left:
        path.write_bytes(b"weights")
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "model.bin").write_bytes(b"other weights")
    heard = Heard()
    apply(model, patches, tmp_path / "out", progress=heard)
    for path in left:
        assert any(str(path) in message for message in heard.said)
        assert not (tmp_path / "out" / path.relative_to(model)).exists()
    assert (tmp_path / "out" / "safety_checker" / "model.bin").read_bytes() == b"other weights"
    heard = Heard()
    apply(model, patches, in_place=True, progress=heard)
    assert all(any(str(path) in message for message in heard.said) for path in left)
    assert all(path.read_bytes() == b"weights" for path in left)


def test_links_are_followed_and_never_written_through(patches: list[Path], tmp_path: Path) -> None:
    """As in a download cache, where a model's files are links to what others share."""
    model = write_layout("folder", tmp_path)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    blob = tmp_path / "blob"
    weights.rename(blob)
    weights.symlink_to(blob)
    before = blob.read_bytes()
    with pytest.raises(RefusedError, match="is a link"):
        apply(model, patches, in_place=True)
    apply(model, patches, tmp_path / "out")
    assert blob.read_bytes() == before
    assert not (tmp_path / "out" / "unet" / weights.name).is_symlink()


def test_a_folder_is_replaced_only_if_it_is_a_model(patches: list[Path], tmp_path: Path) -> None:
    model = write_layout("folder", tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(SystemFailure):
            apply(model, patches, output, force=force)
    assert files(output) == {"diary.txt": b"mine"}
    shutil.rmtree(output)
    apply(model, patches[:1], output)
    with pytest.raises(SystemFailure, match="--force"):
        apply(model, patches, output)
    apply(model, patches, output, force=True)
    with open_checkpoint(output) as checkpoint:
        assert checkpoint.stack is not None and len(checkpoint.stack.entries) == 2
    for inside in (model, model / "inside", tmp_path):
        with pytest.raises(UsageError, match="outside"):
            apply(model, patches, inside, force=True)
    assert not list(tmp_path.glob(".*sepme*"))


def test_a_failure_leaves_no_folder(patches: list[Path], tmp_path: Path) -> None:
    model = write_layout("shards", tmp_path)
    shard = sorted((model / "unet").glob("*.safetensors"))[-1]
    held = shard.read_bytes()
    shard.write_bytes(held[:-1])
    with pytest.raises(MalformedError):
        apply(model, patches, tmp_path / "out")
    shard.write_bytes(held)

    class Stopped(Progress):
        def advance(self, steps: int = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(model, patches, tmp_path / "out", progress=Stopped())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_shards_with_different_patches_in_them_are_told(
    patches: list[Path], tmp_path: Path
) -> None:
    model = write_layout("shards", tmp_path)
    apply(model, patches, tmp_path / "out")
    shard = sorted((tmp_path / "out" / "unet").glob("*.safetensors"))[0]
    shutil.copy(model / "unet" / shard.name, shard)
    with pytest.raises(MalformedError, match="same patches"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m | {"conv_in.weight": "../../etc/passwd"}, "no shard can be"),
        (lambda m: m | {"conv_in.weight": "other.safetensors"}, "no shard can be"),
        (lambda m: m | {"conv_in.weight": max(m.values())}, "lists in another shard"),
        (lambda m: m | {"nothing": min(m.values())}, "no shard holds"),
        (lambda m: {k: v for k, v in m.items() if k != "conv_in.weight"}, "lists in another shard"),
        (lambda m: {}, "weight_map"),
    ],
)
def test_an_index_that_lies_is_malformed(
    change: Callable[[dict[str, str]], dict[str, str]], told: str, tmp_path: Path
) -> None:
    model = write_layout("shards", tmp_path)
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(MalformedError, match=told) as caught:
        open_checkpoint(model)
    assert caught.value.file is not None
    for text in ("[", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(MalformedError):
            open_checkpoint(model)


@pytest.mark.parametrize("pipeline", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_a_transformer_that_was_not_downloaded_whole(pipeline: str, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
    with pytest.raises(UnsupportedError, match=r"transformer folder holds none.*get it again"):
        open_checkpoint(tmp_path)


def test_variants_of_different_models_are_malformed(tmp_path: Path) -> None:
    model = write_layout("folder", tmp_path)
    unet = parts(checkpoint_tensors())["unet"]
    unet.pop(next(name for name in unet if is_target(name)))
    write_shards(model / "unet", unet, variant="fp16")
    with pytest.raises(MalformedError, match="variants"):
        open_checkpoint(model)


def test_a_folder_goes_to_no_stream(patches: list[Path], tmp_path: Path) -> None:
    model = write_layout("folder", tmp_path)
    with pytest.raises(UsageError, match="stream"):
        apply(model, patches, io.BytesIO())


def test_another_dtype_for_a_whole_folder(patches: list[Path], tmp_path: Path) -> None:
    model = write_layout("shards", tmp_path)
    apply(model, patches, tmp_path / "out", dtype="fp32")
    for (_, name), (dtype, _) in tensors(tmp_path / "out").items():
        assert dtype in ("F32", "I64"), name
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.dtype == "fp32"


def test_the_layout_and_what_is_in_it_are_shown(tmp_path: Path) -> None:
    expected = {
        "single file": ("single-file", "fp16"),
        "with EMA": ("single-file", "fp16"),
        "UNet in LDM names": ("unet (ldm)", "fp16"),
        "UNet in diffusers names": ("unet (diffusers)", "fp16"),
        "shards": ("diffusers", "fp16"),
        "UNet folder": ("unet (diffusers)", "fp16"),
        "fp8": ("single-file", "fp8_e4m3"),
        "scaled fp8": ("single-file", "fp8_e4m3 (scaled)"),
        "ckpt": ("single-file", "fp16"),
    }
    for layout, told in expected.items():
        folder = tmp_path / layout
        folder.mkdir()
        info = inspect(write_layout(layout, folder))
        assert isinstance(info, CheckpointInfo)
        assert (info.layout, info.dtype) == told
        assert info.family == "sd1"
        assert info.text_encoders == (() if "UNet" in layout else ("clip_l",))
        assert info.ema == (layout == "with EMA")


def test_two_layouts_of_one_model_differ_in_nothing(base: Path, tmp_path: Path) -> None:
    for layout in ("shards", "variants", "ckpt", "UNet in diffusers names"):
        folder = tmp_path / layout
        folder.mkdir()
        result = diff(base, write_layout(layout, folder))
        assert result.same or layout == "ckpt"
        assert result.tensors == ()
    other = tmp_path / "other"
    other.mkdir()
    assert not diff(base, write_layout("shards", other, seed=3)).same


def test_small_increments_drown_in_fp8_and_that_is_said(tmp_path: Path) -> None:
    model = write_layout("fp8", tmp_path)
    known = base_of(model)
    small = make_patch(tmp_path / "s.sepme", known, additive(known, "faint", seed=1, size=2e-4))
    large = make_patch(tmp_path / "l.sepme", known, additive(known, "loud", seed=1, size=0.3))
    result = apply(model, [small], tmp_path / "s.safetensors")
    assert any("fp8" in warning and "%" in warning for warning in result.warnings)
    checked = apply(model, [small], check=True)
    assert checked.warnings == result.warnings
    result = apply(model, [large], tmp_path / "l.safetensors")
    assert not any("fp8 rounding" in warning for warning in result.warnings)


def test_scaled_fp8_is_as_near_as_fp8_can_be(patches: list[Path], tmp_path: Path) -> None:
    """Within half a step of fp8 of the exact result, and the scales stay."""
    model, output = write_layout("scaled fp8", tmp_path), tmp_path / "out.safetensors"
    apply(model, patches, output)
    terms = [(part, 1.0) for part in select([read_patch_file(path) for path in patches])]
    with open_checkpoint(model) as old, open_checkpoint(output) as new:
        for target in old.targets:
            exact = compose(target.read(), terms, target.name)
            scale = target.copies[0].scales()
            found = new.by_name[target.name].read()
            inside = np.abs(exact / scale) <= 448
            steps = np.spacing((found / scale).astype(ml_dtypes.float8_e4m3fn)).astype(float)
            steps = np.nan_to_num(np.abs(steps), nan=32.0)  # of 448, which has no next number
            assert (np.abs(found - exact) <= steps * scale * 0.5001)[inside].all()
            assert (np.abs(found / scale) <= 448).all()
    with pytest.raises(UnsupportedError, match="scale"):
        apply(model, patches, tmp_path / "x.safetensors", dtype="fp16")
    with pytest.raises(RefusedError, match="scaled fp8"):
        revert(output, patches, output=tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_scales_that_are_not_known_are_refused(tmp_path: Path) -> None:
    bad = scaled(checkpoint_tensors())
    name = next(name for name in bad if name.endswith("scale_weight"))
    bad[name] = ("F32", np.ones((3, 5), "<f4"))
    with pytest.raises(UnsupportedError, match="scales"):
        open_checkpoint(write_safetensors(tmp_path / "m.safetensors", bad))
