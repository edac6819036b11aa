"""verify finds every single thing that is not what it says."""

from pathlib import Path

import numpy as np
import pytest

from sepme_cli.errors import MalformedError, UnsupportedError, UsageError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.verify import VerifyResult, verify
from tests.layouts import write_layout
from tests.synthetic import Shape, make_checkpoint, make_patches, read_raw


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", ema="F32")


@pytest.fixture
def patches(model: Path) -> list[Path]:
    return make_patches(model.parent, model, ["Monet", "Klimt"])


@pytest.fixture
def clean(model: Path, patches: list[Path]) -> Path:
    apply(model, patches, model.with_name("clean.safetensors"))
    return model.with_name("clean.safetensors")


def failed(result: VerifyResult) -> list[str]:
    names = [check.name.split(": ")[-1] for check in result.checks if not check.ok]
    assert result.ok == (not names)
    return names


def flip(path: Path, name: str) -> None:
    """Change one bit of one tensor."""
    header, data = read_raw(path)
    begin, end = header[name]["data_offsets"]
    start = path.stat().st_size - len(data)
    with path.open("r+b") as file:
        file.seek(start + (begin + end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


TARGET = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
TWIN = "model_ema.diffusion_modelmiddle_block1transformer_blocks0attn2to_kweight"
OTHER = "first_stage_model.decoder.conv_in.weight"


def test_what_is_as_it_says_is_verified(clean: Path, model: Path, patches: list[Path]) -> None:
    result = verify([clean, *patches], base=model)
    assert failed(result) == []
    assert result.unchecked == ()
    assert {check.name for check in result.checks} >= {"weights", "the rest", "base", "record"}
    assert failed(verify(patches)) == []


@pytest.mark.parametrize(
    ("name", "check"), [(TARGET, "weights"), (TWIN, "weights"), (OTHER, "the rest")]
)
def test_one_bit_is_found(
    name: str, check: str, clean: Path, model: Path, patches: list[Path]
) -> None:
    flip(clean, name)
    assert failed(verify([clean, *patches], base=model)) == [check]


def test_the_undo_journal_serves_as_the_base(model: Path, patches: list[Path]) -> None:
    apply(model, patches, in_place=True)
    result = verify([model])
    assert failed(result) == [] and "weights" in {check.name for check in result.checks}
    flip(model, TARGET)
    assert failed(verify([model])) == ["weights"]


def test_what_could_not_be_looked_at_is_said(clean: Path, model: Path, patches: list[Path]) -> None:
    assert "--base" in " ".join(verify([clean]).unchecked)
    assert "Klimt" in " ".join(verify([clean, patches[0]], base=model).unchecked)


def test_what_is_not_in_there_fails(model: Path, clean: Path, patches: list[Path]) -> None:
    assert failed(verify([model, *patches])) == ["applied", "applied"]
    apply(model, patches[:1], model.with_name("one.safetensors"))
    assert failed(verify([model.with_name("one.safetensors"), *patches], base=model)) == ["applied"]


def test_another_base_fails(clean: Path, patches: list[Path], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other.safetensors", ema="F32", seed=5)
    assert failed(verify([clean, *patches], base=other)) == ["base"]


def test_an_unpatched_model_is_held_against_its_base(model: Path, tmp_path: Path) -> None:
    same = make_checkpoint(tmp_path / "same.safetensors", ema="F32")
    assert failed(verify([model], base=same)) == []
    flip(same, TARGET)
    assert failed(verify([model], base=same)) == ["base", "the rest"]
    flip(same, TARGET)
    flip(same, TWIN)
    assert failed(verify([model], base=same)) == ["the rest"]
    flip(same, TWIN)
    flip(same, OTHER)
    assert failed(verify([model], base=same)) == ["the rest"]


def test_values_that_are_not_finite_fail(model: Path) -> None:
    header, data = read_raw(model)
    begin, _ = header[TWIN]["data_offsets"]
    with model.open("r+b") as file:
        file.seek(model.stat().st_size - len(data) + begin)
        file.write(np.float32("nan").tobytes())
    assert failed(verify([model])) == ["finite"]


def test_a_patch_for_another_model_does_not_fit(patches: list[Path], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "sd2.safetensors", Shape(family="sd2"))
    assert "fits" in failed(verify([other, *patches]))


def test_layouts(patches: list[Path], tmp_path: Path) -> None:
    for layout in ("shards", "scaled fp8", "UNet in diffusers names"):
        folder = tmp_path / layout
        folder.mkdir()
        source = write_layout(layout, folder)
        output = folder / f"out{source.suffix}"
        apply(source, patches, output)
        assert failed(verify([output, *patches], base=source)) == []


def test_what_makes_no_sense(model: Path, clean: Path, patches: list[Path]) -> None:
    for files, base in (([], None), ([model, clean], None), (patches, model)):
        with pytest.raises(UsageError):
            verify(files, base=base)
    cut = model.with_name("cut.sepme")
    cut.write_bytes(patches[0].read_bytes()[:-1])
    with pytest.raises(MalformedError):
        verify([cut])
    apply(model, patches, in_place=True)
    with pytest.raises(UnsupportedError, match="journal"):
        verify([model.with_name(model.name + ".sepme-undo")])
