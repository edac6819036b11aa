"""Evaluating on a small model with random weights: what is drawn, kept, drawn again and written."""

import csv
import io
import json
import shutil
from base64 import b64decode
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_spec.container import patch_bytes, read_patch
from sepme_cli.diffusion.classifiers import vision_features
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.words import Item
from sepme_cli.errors import SystemFailure
from sepme_cli.evaluation.distances import frechet_distance, kernel_distance
from sepme_cli.evaluation.page import data_uri
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.evaluation.results import EvaluateResult
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import erase
from sepme_cli.operations.evaluate import evaluate
from sepme_cli.operations.sample import sample
from sepme_cli.progress import Progress
from sepme_cli.recipe import Recipe
from tests.evaluation import random_lpips
from tests.evaluation.test_judges import save_classifier
from tests.small_model import save_small_model

SAMPLING = SamplingOptions(images=3, steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_small_model(path)
    return path


@pytest.fixture(scope="module")
def patches(model: Path) -> list[Path]:
    """Of a style and of an object."""
    paths = [model.with_name("monet.sepme"), model.with_name("pond.sepme")]
    for word, path in zip(["style:Monet", "object:pond"], paths, strict=True):
        erase(model, [word], output=path)
    return paths


def run(
    model: Path, patches: list[Path], report: Path, sampling: SamplingOptions = SAMPLING, **options
):
    return evaluate(
        model,
        patches,
        judge="tests.small_judge:judge",
        report=report,
        sampling=sampling,
        options=ModelOptions(device="cpu"),
        command="sepme evaluate m.safetensors 'two words.sepme'",
        **options,
    )


@pytest.fixture(scope="module")
def first(model: Path, patches: list[Path]) -> EvaluateResult:
    return run(model, patches, model.with_name("report"))


def test_a_mask_is_evaluated_and_restored(model: Path, patches: list[Path], tmp_path: Path) -> None:
    """Beside another patch, which stays where the mask is taken out."""
    settings = {"pictures": 4, "sampling_steps": 5, "pruned_share": 0.5}
    patch = tmp_path / "ink.sepme"
    erase(model, "style:ink", method="concept-prune", output=patch, settings=settings)
    result = run(model, [patch, patches[1]], tmp_path / "report")
    assert [name for name, one in result.concepts.items() if one.role == "erased"] == [
        "ink",
        "pond",
    ]
    assert result.restored_identical


def test_prompts_that_are_cut_are_told_once_a_concept(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    sampling = SamplingOptions(images=2, steps=1, restore=0)
    long = "cat " + "red " * 14
    found = run(model, patches[:1], tmp_path / "r", sampling, retain=[f"object:{long}"])
    cut = [warning for warning in found.warnings if "longer than the 14 tokens" in warning]
    assert 1 <= len(cut) <= 2 and all("red" in warning for warning in cut)
    found = run(model, patches[:1], tmp_path / "s", sampling, retain=["object:cat"])
    assert not any("longer than" in warning for warning in found.warnings)


class Links(HTMLParser):
    """What a page asks a browser to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_patch_says_what_its_concepts_are_and_the_judge_what_to_look_at(
    first: EvaluateResult,
) -> None:
    assert {n: (c.role, c.kind) for n, c in first.concepts.items()} == {
        "Monet": ("erased", "style"),
        "pond": ("erased", "object"),
        "Klimt": ("retained", "style"),
        "tree": ("retained", "object"),
    }
    assert first.concepts["Monet"].restored is not None
    assert first.concepts["Klimt"].restored is None
    assert first.restored_identical
    # Before and after of three concepts (Klimt and tree ask for the same), two put back in turn,
    # and those two with everything restored.
    assert first.drawn == (3 * 2 + 2 + 2) * 3
    assert first.retained_same_domain.n == 2 * 3


def test_the_page_needs_nothing_else_and_has_every_picture(first: EvaluateResult) -> None:
    page = Path(first.page).read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) == (2 * 3 + 2 * 2) * 3
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    assert "sepme evaluate m.safetensors 'two words.sepme'" in unescape(page)


def test_json_and_csv_say_the_same(first: EvaluateResult) -> None:
    folder = Path(first.report)
    said = json.loads((folder / "report.json").read_text())
    with (folder / "concepts.csv").open() as file:
        rows = {row["concept"]: row for row in csv.DictReader(file)}
    assert rows.keys() == said["concepts"].keys() == first.concepts.keys()
    for name, concept in first.concepts.items():
        assert said["concepts"][name]["pixel_distance"] == concept.pixel_distance
        assert float(rows[name]["pixel_distance"]) == concept.pixel_distance
        assert int(rows[name]["n"]) == concept.n == 3
    with (folder / "pictures.csv").open() as file:
        pictures = list(csv.DictReader(file))
    assert len(pictures) == (4 * 2 + 2) * 3
    mine = [p for p in pictures if p["concept"] == "Monet" and p["weights"] == "after"]
    share = sum(p["recognised_style"] == "Monet" for p in mine) / 3
    assert share == first.concepts["Monet"].after
    sheet = Image.open(folder / "sheets" / "erased-monet.png")
    assert sheet.size[1] == 3 * (16 + 2)


def test_a_rerun_draws_what_is_missing_or_damaged_and_says_the_same(
    model: Path, patches: list[Path], first: EvaluateResult, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    shutil.copytree(first.report, folder)
    page = Path(first.page).read_text().replace(first.report, str(folder))
    with pytest.raises(SystemFailure, match="--force"):
        run(model, patches, folder)
    assert run(model, patches, folder, force=True).drawn == 0
    kept = sorted((folder / "pictures").iterdir())
    before = {path.name: path.read_bytes() for path in kept}
    damaged = bytearray(kept[0].read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    kept[0].write_bytes(damaged)
    # One batch holds all three pictures of a concept, and is drawn as a whole.
    again = run(model, patches, folder, force=True)
    assert again.drawn == 3
    kept[1].unlink()
    kept[2].write_bytes(kept[2].read_bytes()[:-20])
    assert run(model, patches, folder, force=True).drawn in (3, 6)
    assert {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())} == (
        before
    )
    assert (folder / "report.html").read_text() == page
    assert run(model, patches, folder, replace(SAMPLING, steps=1), force=True).drawn == first.drawn


def test_an_interrupted_run_is_gone_on_with(
    model: Path, patches: list[Path], first: EvaluateResult, tmp_path: Path
) -> None:
    class Interrupt(Progress):
        def advance(self, steps: int = 1) -> None:
            raise KeyboardInterrupt

    report = tmp_path / "report"
    with pytest.raises(KeyboardInterrupt):
        run(model, patches, report, progress=Interrupt())
    assert len(list((report / "pictures").iterdir())) == 3
    rest = run(model, patches, report)
    assert rest.drawn == first.drawn - 3
    assert rest.concepts == first.concepts
    assert (report / "report.html").read_text() == Path(first.page).read_text().replace(
        first.report, str(report)
    )


def test_after_is_what_the_patched_checkpoint_draws(
    model: Path, patches: list[Path], first: EvaluateResult, tmp_path: Path
) -> None:
    clean = tmp_path / "clean.safetensors"
    apply(model, patches, clean)
    with (Path(first.report) / "pictures.csv").open() as file:
        asked = next(
            row
            for row in csv.DictReader(file)
            if (row["concept"], row["weights"]) == ("Monet", "after")
        )
    sheet = tmp_path / "sheet.png"
    seed = int(asked["seed"])
    sample(clean, [asked["prompt"]], output=sheet, sampling=SamplingOptions(1, seed, 2, 3.0))
    drawn = np.asarray(Image.open(sheet).convert("RGB"))[:16, -18:-2].astype(int)
    kept = [
        np.asarray(Image.open(path)).astype(int)
        for path in (Path(first.report) / "pictures").iterdir()
    ]
    # A batch of another size may round the last bit of a pixel differently.
    assert min(np.abs(picture - drawn).max() for picture in kept) <= 1


def test_a_patch_that_does_nothing_is_not_erased(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    with patches[0].open("rb") as file:
        whole = read_patch(file)
    increment = whole.increments[0]
    assert increment.shift is not None
    nothing = replace(increment, shift=np.zeros_like(increment.shift))
    path = tmp_path / "nothing.sepme"
    path.write_bytes(patch_bytes(replace(whole, increments=(nothing,))))
    result = run(model, [path], tmp_path / "report")
    found = result.concepts["Monet"]
    assert (found.erased, result.all_erased) == (False, False)
    assert found.before == found.after
    assert (found.pixel_distance, found.latent_distance) == (0.0, 0.0)


def test_a_recipe_says_what_is_what_and_what_to_look_at(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    with patches[1].open("rb") as file:
        whole = read_patch(file)
    (increment,) = whole.increments
    bare = replace(increment, concept="nave", slug="nave", prompts=("nave",))
    path = tmp_path / "nave.sepme"
    path.write_bytes(patch_bytes(replace(whole, increments=(bare,))))
    recipe = Recipe((Item("nave", "object"),), protect=("style:Klimt", "object:arch"))
    found = run(model, [path], tmp_path / "report", recipe=recipe)
    assert {n: c.kind for n, c in found.concepts.items()} == {
        "nave": "object",
        "Klimt": "style",
        "arch": "object",
    }
    assert (found.concepts["nave"].n, found.concepts["nave"].erased) == (0, None)
    assert any("knows no object 'nave'" in warning for warning in found.warnings)


def drawn(report: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the weights before and after drew of a concept, [3, 3, 16, 16] each, by its sheet."""
    sheet = np.asarray(Image.open(Path(report) / "sheets" / name).convert("RGB"))
    tiles = [
        [sheet[18 * row :, sheet.shape[1] - 18 * (3 - i) :][:16, :16] for i in range(3)]
        for row in range(2)
    ]
    before, after = torch.from_numpy(np.array(tiles)).permute(0, 1, 4, 2, 3).float() / 255
    return before, after


def test_references_are_compared_on_what_a_vision_model_sees(
    model: Path, patches: list[Path], first: EvaluateResult, tmp_path: Path
) -> None:
    """The references are what the original weights draw: no distance before, and after that
    which the patches make."""
    sheets = [drawn(first.report, f"retained-{name}.png") for name in ("klimt", "tree")]
    before, after = (torch.cat(images) for images in zip(*sheets, strict=True))
    (folder := tmp_path / "reference").mkdir()
    for i, image in enumerate(before):
        pixels = (255 * image.permute(1, 2, 0)).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    vit = str(save_classifier(tmp_path / "vit"))
    found = run(model, patches, tmp_path / "report", reference=folder, features=vit).reference
    assert found is not None
    assert (found.pictures, found.references) == (2 * 3, 6)
    old, new = map(vision_features(vit, "cpu"), (before, after))
    far, apart = frechet_distance(new, old), kernel_distance(new, old)
    assert found.fid_before == pytest.approx(0, abs=1e-3 * far)
    assert found.fid_after == pytest.approx(far, rel=1e-3)
    assert found.kid_before == pytest.approx(kernel_distance(old, old), rel=1e-3)
    assert found.kid_after == pytest.approx(apart, rel=1e-3)


def test_lpips_is_that_of_each_concepts_images(
    model: Path, patches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_lpips.install(tmp_path / "hub", monkeypatch)
    found = run(model, patches, tmp_path / "report", lpips=True)
    network = random_lpips.LPIPS(verbose=False).eval()
    for role, name in (("erased", "Monet"), ("retained", "Klimt")):
        before, after = drawn(found.report, f"{role}-{name.lower()}.png")
        expected = float(network(before, after, normalize=True).detach().mean())
        assert found.concepts[name].perceptual_distance == pytest.approx(expected, rel=1e-4)
        assert expected > 0


def test_the_page_holds_large_pictures_made_smaller() -> None:
    for side, kind, shown in ((100, "png", 100), (640, "jpeg", 256)):
        head, _, data = data_uri(torch.rand(3, side, side)).partition(",")
        assert head == f"data:image/{kind};base64"
        assert Image.open(io.BytesIO(b64decode(data))).size == (shown, shown)


def test_what_is_not_ours_in_the_folder_stays(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemFailure, match=r"thesis\.tex"):
        run(model, patches, tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
