"""Erasing from every family, in every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patch_spec.container import read_patch
from patch_spec.streams import stream_of
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import UnsupportedError
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import erase
from sepme_cli.operations.sample import sample
from tests.small_model import SMALL, small_parts, write_folder, write_single_file

QUICK = Settings(
    pictures=8,
    sampling_steps=3,
    steps=40,
    batch_size=16,
    threshold=-9.0,
    start=0.0,
    insistence=1.0,
    protection=1.0,
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Every small model, as a single file and as a folder."""
    place = tmp_path_factory.mktemp("families")
    found = {}
    for name in SMALL:
        parts = small_parts(name)
        file = write_single_file(parts, place / f"{name}.safetensors")
        found[name] = (file, write_folder(parts, place / name))
    return found


@pytest.mark.parametrize("name", SMALL)
def test_a_patch_is_the_same_from_either_layout(
    name: str, shelf: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    file, folder = shelf[name]
    erase(file, ["Monet"], output=tmp_path / "file.sepme", kind="style")
    erase(folder, ["Monet"], output=tmp_path / "folder.sepme", kind="style")
    one, other = (tmp_path / f"{each}.sepme" for each in ("file", "folder"))
    assert read_patch(one).base == read_patch(other).base
    # Two ways to store a matrix may give its products another last bit, and no more.
    ours, theirs = (read_patch(path).increments[0] for path in (one, other))
    assert np.abs(ours.basis - theirs.basis).max() < 1e-3
    for path, model in ((one, folder), (other, file)):
        output = tmp_path / f"{path.stem}-out{model.suffix}"
        assert apply(model, [path], output).base_match == "same-values"


@pytest.mark.parametrize("name", SMALL)
def test_the_blank_prompt_stays_and_the_concept_moves(
    name: str, shelf: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """On the states that each family's UNet reads, those of both encoders of XL."""
    model = shelf[name][0]
    erase(model, ["Monet"], output=tmp_path / "m.sepme", kind="style")
    apply(model, [tmp_path / "m.sepme"], tmp_path / "out.safetensors")
    with open_checkpoint(model) as before, open_checkpoint(tmp_path / "out.safetensors") as after:
        states = StableDiffusion.of(before, torch.device("cpu")).text.encode(["", "Monet"]).double()
        blank, concept = states.numpy()
        for target in before.targets:
            if stream_of(target.name) != "tokens":
                continue
            old, new = target.read(), after.by_name[target.name].read()
            change = new.astype(float) - old
            moved = np.linalg.norm(concept @ change.T) / np.linalg.norm(concept @ old.T)
            stayed = np.linalg.norm(blank @ change.T) / np.linalg.norm(blank @ old.T)
            assert stayed < 1e-5
            assert moved > 100 * stayed


@pytest.mark.parametrize(
    ("name", "prediction"),
    [("sd2", "epsilon"), ("sd2", "velocity"), ("sdxl", None), ("inpainting", None)],
)
def test_the_optimisation_lowers_the_correlation(
    name: str, prediction: Any, shelf: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    result = erase(
        shelf[name][0],
        ["Monet"],
        output=tmp_path / "m.sepme",
        kind="style",
        method="sepme",
        settings=QUICK,
        options=ModelOptions(prediction=prediction),
    )
    correlation = result.increments[0].correlation
    assert correlation.start is not None and correlation.end is not None
    assert correlation.end < 0.8 * correlation.start


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_unet_alone_borrows_its_text_encoder(
    name: str, shelf: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    file, folder = shelf[name]
    unet = folder / "unet"
    with pytest.raises(UnsupportedError, match="--text-encoder"):
        erase(unet, ["Monet"], output=tmp_path / "x.sepme")
    assert not (tmp_path / "x.sepme").exists()
    erase(unet, ["Monet"], output=tmp_path / "alone.sepme", options=ModelOptions([folder]))
    erase(folder, ["Monet"], output=tmp_path / "whole.sepme")
    alone, whole = (tmp_path / f"{each}.sepme" for each in ("alone", "whole"))
    assert alone.read_bytes() == whole.read_bytes()
    assert len(read_patch(alone).base.text_encoders) == len(SMALL[name].widths)
    result = apply(file, [alone], tmp_path / "out.safetensors")
    assert result.warnings == ()


@pytest.mark.parametrize("name", SMALL)
def test_samples_are_drawn(name: str, shelf: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model = shelf[name][1]
    erase(model, ["Monet"], output=tmp_path / "m.sepme")
    result = sample(
        model,
        ["a pond by Monet"],
        patches=[tmp_path / "m.sepme"],
        output=tmp_path / "grid.png",
        sampling=SamplingOptions(1, steps=2, size=16),
    )
    assert result.images == 2
    assert (tmp_path / "grid.png").stat().st_size > 100


def test_the_closed_form_needs_no_unet_that_runs(
    shelf: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """What sepme cannot run it can still erase from in closed form: here a depth model."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(shelf["sd2"][0])
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:, :1]], 1)
    save_file(tensors, tmp_path / "depth.safetensors")
    erase(tmp_path / "depth.safetensors", ["Monet"], output=tmp_path / "m.sepme")
    with pytest.raises(UnsupportedError, match="beside the noise"):
        erase(
            tmp_path / "depth.safetensors",
            ["Monet"],
            output=tmp_path / "n.sepme",
            method="sepme",
            settings=QUICK,
        )
    assert not (tmp_path / "n.sepme").exists()
