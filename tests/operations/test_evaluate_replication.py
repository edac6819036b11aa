"""Whether training images are drawn again: on images that the model does draw, and others."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.patches import read_patch_files
from sepme_cli.diffusion.classifiers import vision_features
from sepme_cli.diffusion.images import load_image
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.evaluation.replication import noise_gaps
from sepme_cli.evaluation.results import Replication
from sepme_cli.operations.erase import erase
from sepme_cli.operations.evaluate import evaluate
from sepme_cli.render import results
from tests.evaluation.test_judges import save_classifier
from tests.small_model import save_small_model

SAMPLING = SamplingOptions(images=4, steps=2, guidance=3.0)
#: The first names the concept; the second is the same picture's, under another name.
CAPTIONS = {"drawn.png": "a pond by Monet", "strange.png": "a blue door"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a patch, a vision model, and a folder of training images: what the model draws of
    the first caption with the first seed, and stripes."""
    folder = tmp_path_factory.mktemp("scene")
    save_small_model(folder / "model.safetensors")
    erase(folder / "model.safetensors", ["style:Monet"], output=folder / "monet.sepme")
    save_classifier(folder / "vit")
    (folder / "training").mkdir()
    drawn = images(folder, CAPTIONS["drawn.png"], {})[0]
    stripes = (torch.arange(16) % 2).float().expand(3, 16, 16)
    for (name, caption), image in zip(CAPTIONS.items(), (drawn, stripes), strict=True):
        pixels = (255 * image.permute(1, 2, 0)).round().byte().numpy()
        Image.fromarray(pixels).save(folder / "training" / name)
        (folder / "training" / name).with_suffix(".txt").write_text(caption)
    return folder


def images(folder: Path, caption: str, weights: Mapping[str, Tensor]) -> Tensor:
    """As `evaluate` draws them, and keeps them in 8 bits."""
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"))
        with model.denoiser.with_weights(weights):
            drawn = generate_images(model, [caption] * 4, range(4), steps=2, guidance=3.0)
    return (255 * drawn).round() / 255


def patched(folder: Path) -> dict[str, Tensor]:
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        (file,) = read_patch_files(folder / "monet.sepme")
        return patched_weights(checkpoint, [(one, 1.0) for one in file.patch.increments])


def run(folder: Path, report: Path, **scope: Any) -> tuple[Replication, Any]:
    result = evaluate(
        folder / "model.safetensors",
        folder / "monet.sepme",
        judge="tests.small_judge:judge",
        report=report,
        sampling=SAMPLING,
        options=ModelOptions(device="cpu"),
        retain=["object:tree"],
        training_images=folder / "training",
        features=str(folder / "vit"),
        **scope,
    )
    assert result.replication is not None
    return result.replication, result


def cosines(folder: Path, drawn: Tensor, name: str) -> Tensor:
    see = vision_features(str(folder / "vit"), "cpu")
    real = see(load_image(folder / "training" / name, 16)[None])
    return torch.nn.functional.cosine_similarity(see(drawn), real)


def test_similarity_is_the_cosine_to_the_training_image(scene: Path, tmp_path: Path) -> None:
    found, result = run(scene, tmp_path / "report", replication_threshold=0.999)
    first, strange = (found.images[name] for name in CAPTIONS)
    after = patched(scene)
    for weights, value in (({}, first.similarity.before), (after, first.similarity.after)):
        wanted = cosines(scene, images(scene, CAPTIONS["drawn.png"], weights), "drawn.png")
        assert value == pytest.approx(float(wanted.mean()), abs=1e-4)
    # The image of the first seed is the training image again, and no stripes are.
    similar = cosines(scene, images(scene, CAPTIONS["drawn.png"], {}), "drawn.png")
    assert first.replicated.before == float((similar >= 0.999).double().mean()) >= 0.25
    assert strange.replicated.before == 0
    # Monet is in the first caption alone: put back, it is as before.
    assert first.similarity.restored == first.similarity.before
    assert first.restored == first.replicated.before
    assert strange.similarity.restored is strange.restored is None
    assert first.similarity.after != first.similarity.before
    assert found.replicated.n == 8
    assert found.replicated.before == (first.replicated.before + strange.replicated.before) / 2
    other = cosines(scene, images(scene, CAPTIONS["strange.png"], {}), "drawn.png")
    own = cosines(scene, images(scene, CAPTIONS["drawn.png"], {}), "strange.png")
    assert found.unrelated == pytest.approx(float(max(other.max(), own.max())), abs=1e-4)
    said = json.loads((Path(result.report) / "report.json").read_text())["replication"]
    assert said["images"]["drawn.png"]["similarity"]["after"] == first.similarity.after
    page = Path(result.page).read_text()
    assert "Training images" in page and "a blue door" in page


def test_a_threshold_that_anything_passes_is_warned_of(scene: Path, tmp_path: Path) -> None:
    found, result = run(scene, tmp_path / "report", replication_threshold=-1.0)
    assert (found.replicated.before, found.replicated.after) == (1.0, 1.0)
    assert any("set --replication-threshold higher" in one for one in result.warnings)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(results.evaluate(result))
    said = console.export_text()
    assert "100% before, 100% after" in said
    similarity = found.images["strange.png"].similarity
    assert f"similarity {similarity.before:.2f} before, {similarity.after:.2f} after;" in said


def test_the_noise_gap_is_how_far_a_caption_moves_the_prediction(scene: Path) -> None:
    with open_checkpoint(scene / "model.safetensors") as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"))
        none, some = noise_gaps(model, ["", "a pond by Monet"], steps=2, seed=0).tolist()
        assert none == pytest.approx(0, abs=1e-6) and some > 1e-4
        # Keys of nothing but zeros attend alike everywhere, and values of zeros bring nothing.
        mute = {t.name: torch.zeros(t.shape) for t in checkpoint.targets}
        with model.denoiser.with_weights(mute):
            assert noise_gaps(model, ["a pond by Monet"], 2, 0).item() == pytest.approx(0, abs=1e-6)
