"""Erasing from each of the streams that XL reads: the rows of a prompt, and its pooled text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from patch_spec.container import read_patch
from patch_spec.increment import Increment
from patch_spec.streams import Stream, stream_of
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.words import Item
from sepme_cli.errors import RefusedError, UsageError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import erase
from sepme_cli.operations.verify import verify
from sepme_cli.recipe import Recipe
from tests.small_model import small_parts, write_single_file

LEARNS = Recipe((Item("Monet", "style"),), method="sepme")
QUICK = Settings(steps=2, pictures=2, sampling_steps=2, batch_size=2)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(small_parts("sdxl"), tmp_path_factory.mktemp("xl") / "xl.safetensors")


def made(model: Path, folder: Path, **options: object) -> Increment:
    patch = folder / "monet.sepme"
    erase(model, ["Monet"], output=patch, kind="style", force=True, **options)  # type: ignore[arg-type]
    (increment,) = read_patch(patch).increments
    return increment


def test_all_streams_are_erased_from(xl: Path, tmp_path: Path) -> None:
    increment = made(xl, tmp_path)
    assert increment.on("tokens") and increment.on("pooled")
    out = tmp_path / "out.safetensors"
    result = apply(xl, [tmp_path / "monet.sepme"], out)
    assert result.warnings == ()
    assert verify([out, tmp_path / "monet.sepme"], base=xl).ok


@pytest.mark.parametrize("stream", ["tokens", "pooled"])
def test_one_stream_alone(stream: Stream, xl: Path, tmp_path: Path) -> None:
    increment = made(xl, tmp_path, streams=stream)
    assert [s for s in ("tokens", "pooled") if increment.on(s)] == [stream]
    # The same on that stream as when the other is erased from too.
    both, alone = made(xl, tmp_path).on(stream), increment.on(stream)
    assert both is not None and alone is not None
    assert np.array_equal(both.basis, alone.basis)


@pytest.mark.parametrize("method", ["closed-form", "sepme"])
def test_the_pooled_text_of_the_blank_stays_and_the_concepts_moves(
    method: str, xl: Path, tmp_path: Path
) -> None:
    made(xl, tmp_path, method=method, settings=QUICK)
    out = tmp_path / "out.safetensors"
    apply(xl, [tmp_path / "monet.sepme"], out)
    blank, concept = pooled(xl, ["", "a painting by Monet"])
    with open_checkpoint(xl) as before, open_checkpoint(out) as after:
        (name,) = [target.name for target in before.targets if stream_of(target.name) == "pooled"]
        old, new = (found.by_name[name].read().astype(float) for found in (before, after))
    moved, stayed = (
        np.linalg.norm(e @ (new - old).T) / np.linalg.norm(e @ old.T) for e in (concept, blank)
    )
    assert stayed < 1e-5
    assert moved > 0.05


def pooled(model: Path, prompts: Sequence[str]) -> np.ndarray:
    with open_checkpoint(model) as checkpoint:
        found: Tensor | None = (
            StableDiffusion.of(checkpoint, torch.device("cpu")).text.condition(prompts).pooled
        )
    assert found is not None
    return found.double().numpy()


def test_a_patch_that_leaves_a_stream_alone_is_warned_of(xl: Path, tmp_path: Path) -> None:
    made(xl, tmp_path, streams="tokens")
    result = apply(xl, [tmp_path / "monet.sepme"], tmp_path / "out.safetensors")
    (warning,) = result.warnings
    assert "add_embedding.linear_1.weight" in warning


def test_what_cannot_be_is_refused(xl: Path, small_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.sepme"
    with pytest.raises(RefusedError, match="reads no pooled text"):
        erase(small_model, ["Monet"], output=output, streams="pooled")
    with pytest.raises(UsageError, match="unknown stream"):
        erase(xl, ["Monet"], output=output, streams="third")  # type: ignore[typeddict-item]
    for learning in ({"method": "sepme"}, {"joint": True}, {"recipe": LEARNS}):
        with pytest.raises(UsageError, match="learns on the tokens"):
            concepts = () if "recipe" in learning else ("Monet",)
            erase(xl, concepts, output=output, streams="pooled", **learning)  # type: ignore[arg-type]
    assert not output.exists()
