"""The example model, by the commands that a user types."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.english import Caption, Drawn, English, caption
from examples.english.canvas import OBJECTS, STYLES
from patch_spec.container import patch_bytes, read_patch
from sepme_cli.app import run
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import generate_images

MODEL = Path(__file__).parent.parent / "examples" / "english-sd.safetensors"
JUDGE = Path(__file__).parent.parent / "examples" / "english-judge.safetensors"
SEPME = Path(sys.executable).with_name("sepme")
STYLE_NAMES, OBJECT_NAMES = list(STYLES), list(OBJECTS)
PAIRS = [(s, o) for s in range(len(STYLES)) for o in range(s, len(OBJECTS), 31)]
ASKED = [caption(s, o, ["{O} in {s} style"]) for s, o in PAIRS]
WOODCUT = [caption(7, o, ["{O} in {s} style"]) for o in range(5, len(OBJECTS), 18)]
CAT = [caption(s, 0, ["{O} in {s} style"]) for s in range(len(STYLES))]
OTHERS = [one for one in ASKED if not one.names("woodcut") and not one.names("cat")]

pytestmark = pytest.mark.slow


def sepme(*words: str | Path) -> dict[str, Any]:
    """In this process: to load torch and diffusers takes longer than most of this."""
    with redirect_stdout(io.StringIO()) as out:
        assert run([*map(str, words), "--json"]) == 0, out.getvalue()
    return json.loads(out.getvalue())


def judged(model: Path, captions: list[Caption]) -> Drawn:
    return English(model, JUDGE, torch.float32).draw(captions, {})


def share(right: torch.Tensor) -> float:
    return float(right.float().mean())


def test_the_example_is_small_enough_to_ship_and_looks_like_sd_1() -> None:
    assert MODEL.stat().st_size < 80e6
    found = sepme("inspect", MODEL)
    assert (found["kind"], found["family"], found["dtype"]) == ("checkpoint", "sd1", "fp16")
    assert (found["width"], found["targets"]) == (320, 14)


@pytest.fixture(scope="module")
def original() -> Drawn:
    """What the model draws of ASKED."""
    return judged(MODEL, ASKED)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """Patches for woodcut and cat, and what `erase` says of their increments."""
    folder = tmp_path_factory.mktemp("made")
    patches = [folder / f"{name}.sepme" for name in ("woodcut", "cat")]
    return {
        patch: sepme("erase", MODEL, "--concept", patch.stem, "-o", patch)["increments"][0]
        for patch in patches
    }


def test_it_draws_what_it_is_asked_for(original: Drawn) -> None:
    assert share(original.style) >= 0.95
    assert share(original.object) >= 0.9


def test_the_bare_command_takes_out_what_it_names_and_nothing_else(
    original: Drawn, made: dict[Path, dict[str, Any]], tmp_path: Path
) -> None:
    patches = [*made]
    clean, back = tmp_path / "c.safetensors", tmp_path / "b.safetensors"
    assert [one["taken_for"] for one in made.values()] == ["style", "object"]
    assert all(one["collateral"]["p95"] < 0.35 for one in made.values())
    assert all(patch.stat().st_size < 64 * 1024 for patch in patches)
    sepme("apply", MODEL, *patches, "-o", clean)

    style, cat = judged(clean, WOODCUT), judged(clean, CAT)
    assert share(style.style) <= 0.25
    assert share(style.object) >= 0.9
    assert share(cat.object) <= 0.125
    after, others = judged(clean, OTHERS), [one in OTHERS for one in ASKED]
    assert share(after.style) >= share(original.style[others]) - 0.05
    assert share(after.object) >= share(original.object[others]) - 0.05

    reverted = sepme("revert", clean, *patches, "--base", MODEL, "-o", back)
    assert (reverted["exact"], reverted["remaining"]) == (True, [])
    assert back.read_bytes() == MODEL.read_bytes()


def test_other_names_of_a_concept_are_proposed_and_can_be_taken_in(tmp_path: Path) -> None:
    plan = sepme("erase", MODEL, "-c", "cat", "-c", "dog", "--check")
    cat, dog = plan["concepts"]
    assert "kitten" in [near["word"] for near in cat["nearly"]]
    assert not {"kitten", "cat"} & {*cat["neighbours"]}
    assert len(cat["neighbours"]) == 8
    # What a dictionary has as a kind of it and the encoder has near it is no neighbour, either.
    assert {"puppy", "hound"} <= {near["word"] for near in dog["nearly"]}
    assert "toy" not in {near["word"] for near in dog["nearly"]}
    assert not {"puppy", "hound"} & {*dog["neighbours"]}
    shares = [strength["collateral"]["p95"] for strength in plan["strengths"]]
    assert shares == sorted(shares, reverse=True)
    made = sepme("erase", MODEL, "-c", "cat", "--aliases", "auto", "-o", tmp_path / "cat.sepme")
    assert "kitten" in made["increments"][0]["aliases"]
    manifest = sepme("inspect", tmp_path / "cat.sepme")["manifest"]
    prompts = manifest["increments"][0]["prompts"]
    assert "a photo of a kitten" in prompts


def test_a_style_is_drawn_as_what_it_should_act_like(tmp_path: Path) -> None:
    clean = tmp_path / "clean.safetensors"
    options = ("--concept", "airbrush", "--to", "stencil", "--apply", clean)
    sepme("erase", MODEL, *options, "-o", tmp_path / "airbrush.sepme")
    airbrush, stencil = STYLE_NAMES.index("airbrush"), STYLE_NAMES.index("stencil")
    asked = [caption(airbrush, one.object, ["{O} in {s} style"]) for one in WOODCUT]
    # The prompts still name the one; what is judged is the other.
    drawn = judged(clean, [replace(one, style=stencil) for one in asked])
    assert share(drawn.style) >= 0.7
    assert share(drawn.object) >= 0.8


def test_diffusers_draws_with_the_lora_what_the_patched_model_draws(
    made: dict[Path, dict[str, Any]], tmp_path: Path
) -> None:
    patch, _ = made
    clean, lora = tmp_path / "c.safetensors", tmp_path / "l.safetensors"
    sepme("apply", MODEL, patch, "-o", clean)
    told = sepme("export", patch, "--to", "kohya", "--base", MODEL, "-o", lora)
    assert (told["modules"], told["base_match"]) == (14, "exact")
    assert 0 < told["relative_error"] < 1e-3
    captions = WOODCUT[:3]
    before, patched = drawn(MODEL, captions), drawn(clean, captions)
    loaded = drawn(MODEL, captions, lora)
    assert float((loaded - patched).abs().mean()) * 255 < 0.5
    assert float((before - patched).abs().mean()) * 255 > 10


def drawn(model: Path, captions: list[Caption], lora: Path | None = None) -> torch.Tensor:
    """Pictures by diffusers' UNet, with a LoRA loaded by diffusers."""
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        if lora is not None:
            pipeline = StableDiffusionPipeline(
                **dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler")),
                unet=network.denoiser.network,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            pipeline.load_lora_weights(str(lora))
        texts, seeds = [one.text for one in captions], [one.seed for one in captions]
        return generate_images(network, texts, seeds, steps=10, guidance=3.0)


def test_evaluating_tells_a_patch_that_works_from_one_that_does_nothing(
    made: dict[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, patch = made
    idle, report = tmp_path / "idle.sepme", tmp_path / "report"
    with patch.open("rb") as file:
        whole = read_patch(file)
    (increment,) = whole.increments
    still = replace(increment, shift=np.zeros_like(increment.shift))
    idle.write_bytes(patch_bytes(replace(whole, increments=(still,))))

    line = ["--judge", "examples:judge", "--report", report, "--retain", "gouache"]
    line += ["--retain", "rocket", "--pictures", "8", "--steps", "10", "--guidance", "3"]
    found = sepme("evaluate", MODEL, patch, *line)
    cat, gouache, rocket = (found["concepts"][name] for name in ("cat", "gouache", "rocket"))
    assert (cat["kind"], cat["erased"]) == ("object", True)
    assert cat["interval"][1] < 0.6
    assert cat["restored"]["after"] == cat["before"]
    assert (gouache["kind"], gouache["erased"]) == ("style", None)
    assert rocket["after"] >= 0.7
    assert cat["pixel_distance"] > 2 * rocket["pixel_distance"]
    assert found["restored_identical"]

    nothing = sepme("evaluate", MODEL, idle, *line, "--force")
    assert nothing["drawn"] < found["drawn"]  # the original's pictures are still there
    assert nothing["concepts"]["cat"]["erased"] is False
    assert nothing["concepts"]["cat"]["pixel_distance"] == 0.0
    assert not nothing["all_erased"]


def test_a_pipe_gives_what_files_give(made: dict[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, patch = made
    clean = tmp_path / "clean.safetensors"
    sepme("apply", MODEL, patch, "-o", clean)
    erase = subprocess.run(
        [SEPME, "erase", MODEL, "--concept", "cat", "-o", "-"], capture_output=True, check=True
    )
    piped = subprocess.run(
        [SEPME, "apply", MODEL, "-", "-o", "-"],
        input=erase.stdout,
        capture_output=True,
        check=True,
    )
    assert erase.stdout == patch.read_bytes()
    assert piped.stdout == clean.read_bytes()
