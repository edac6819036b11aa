"""The example model, by the commands that a user types."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from examples.emoji.canvas import OBJECTS, STYLES
from examples.emoji.judging import Caption, Verdict, all_pairs, verdict
from examples.emoji.networks import load_judge
from patch_spec.container import patch_bytes, read_patch
from sepme_cli.checkpoints.reader import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import draw_pictures

MODEL = Path(__file__).parent.parent / "examples" / "emoji-sd.safetensors"
JUDGE = Path(__file__).parent.parent / "examples" / "emoji-judge.safetensors"
SEPME = Path(sys.executable).with_name("sepme")
PAIRS = all_pairs(["{O} in {s} style"])
INK = [caption for caption in PAIRS if caption.names("ink")][::2]
OTHERS = [caption for caption in PAIRS if not caption.names("ink")][::14]

pytestmark = pytest.mark.slow


def sepme(*words: str | Path) -> dict[str, Any]:
    done = subprocess.run([SEPME, *words, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def judged(model: Path, captions: list[Caption]) -> Verdict:
    seeds = [caption.style * 100 + caption.object for caption in captions]
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        pictures = draw_pictures(network, [c.text for c in captions], seeds, guidance=3.0)
    return verdict(load_judge(str(JUDGE)), pictures, captions)


def test_the_example_is_small_enough_to_ship_and_looks_like_sd_1() -> None:
    assert MODEL.stat().st_size < 60e6
    found = sepme("inspect", MODEL)
    assert (found["kind"], found["family"], found["dtype"]) == ("checkpoint", "sd1", "fp16")
    assert (found["width"], found["targets"]) == (256, 14)


def test_a_style_disappears_and_the_rest_stays(tmp_path: Path) -> None:
    patch, clean, back = (tmp_path / name for name in ("p.sepme", "c.safetensors", "b.safetensors"))
    protect = [f"style:{s}" for s in STYLES if s != "ink"] + [f"object:{o}" for o in OBJECTS]
    options = [word for name in protect for word in ("--protect", name)]
    made = sepme("erase", MODEL, "--concept", "ink", "--as", "style", "-o", patch, *options)
    assert made["bytes"] == patch.stat().st_size < 64 * 1024
    applied = sepme("apply", MODEL, patch, "-o", clean)
    assert applied["concepts"] == ["ink"]
    assert applied["base_match"] == "exact"

    before, after = judged(MODEL, INK), judged(clean, INK)
    assert before.style.float().mean() >= 0.9
    assert after.style.float().mean() <= 0.15
    assert after.object.float().mean() >= 0.9
    kept = judged(clean, OTHERS)
    assert kept.style.float().mean() >= 0.9
    assert kept.object.float().mean() >= 0.9

    reverted = sepme("revert", clean, patch, "--base", MODEL, "-o", back)
    assert (reverted["exact"], reverted["remaining"]) == (True, [])
    assert back.read_bytes() == MODEL.read_bytes()


def test_a_style_is_drawn_as_what_it_should_act_like(tmp_path: Path) -> None:
    clean = tmp_path / "clean.safetensors"
    options = ("--concept", "ink", "--as", "style", "--to", "noto", "--apply", clean)
    made = sepme("erase", MODEL, *options, "-o", tmp_path / "ink.sepme")
    assert made["increments"][0]["separability"] > 0.9
    noto = list(STYLES).index("noto")
    drawn = judged(clean, [replace(caption, style=noto) for caption in INK])
    assert drawn.style.float().mean() >= 0.9
    assert drawn.object.float().mean() >= 0.9


def test_diffusers_draws_with_the_lora_what_the_patched_model_draws(tmp_path: Path) -> None:
    patch, clean, lora = (tmp_path / n for n in ("p.sepme", "c.safetensors", "l.safetensors"))
    sepme("erase", MODEL, "--concept", "style:ink", "--to", "noto", "-o", patch, "--apply", clean)
    told = sepme("export", patch, "--to", "kohya", "--base", MODEL, "-o", lora)
    assert (told["modules"], told["base_match"]) == (14, "exact")
    assert 0 < told["relative_error"] < 1e-3
    captions = INK[:3]
    before, patched = drawn(MODEL, captions), drawn(clean, captions)
    loaded = drawn(MODEL, captions, lora)
    assert float((loaded - patched).abs().mean()) * 255 < 0.5
    assert float((before - patched).abs().mean()) * 255 > 20


def drawn(model: Path, captions: list[Caption], lora: Path | None = None) -> torch.Tensor:
    """Pictures by diffusers' UNet, with a LoRA loaded by diffusers."""
    seeds = [caption.style * 100 + caption.object for caption in captions]
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        if lora is not None:
            pipeline = StableDiffusionPipeline(
                **dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler")),
                unet=network.unet,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            pipeline.load_lora_weights(str(lora))
        texts = [caption.text for caption in captions]
        return draw_pictures(network, texts, seeds, steps=10, guidance=3.0)


def test_evaluating_tells_a_patch_that_works_from_one_that_does_nothing(tmp_path: Path) -> None:
    patch, idle, report = (tmp_path / name for name in ("ink.sepme", "idle.sepme", "report"))
    names = [f"style:{s}" for s in STYLES if s != "ink"] + [f"object:{o}" for o in OBJECTS]
    protect = [word for name in names for word in ("--protect", name)]
    sepme("erase", MODEL, "--concept", "ink", "-o", patch, *protect)
    with patch.open("rb") as file:
        whole = read_patch(file)
    (increment,) = whole.increments
    still = replace(increment, shift=np.zeros_like(increment.shift))
    idle.write_bytes(patch_bytes(replace(whole, increments=(still,))))

    line = ["--judge", "examples:judge", "--report", report, "--retain", "noto"]
    line += ["--retain", "rocket", "--pictures", "6", "--steps", "10", "--guidance", "3"]
    found = sepme("evaluate", MODEL, patch, *line)
    ink, noto, rocket = (found["concepts"][name] for name in ("ink", "noto", "rocket"))
    assert (ink["kind"], ink["before"], ink["erased"]) == ("style", 1.0, True)
    assert ink["interval"][1] < 0.5
    assert ink["restored"]["after"] == 1.0
    assert (noto["kind"], noto["after"], noto["erased"]) == ("style", 1.0, None)
    assert (rocket["kind"], rocket["after"]) == ("object", 1.0)
    assert ink["pixel_distance"] > 20 > 2 > noto["pixel_distance"]
    assert found["restored_identical"]

    nothing = sepme("evaluate", MODEL, idle, *line, "--force")
    assert nothing["drawn"] < found["drawn"]  # the original's pictures are still there
    assert nothing["concepts"]["ink"]["erased"] is False
    assert nothing["concepts"]["ink"]["pixel_distance"] == 0.0
    assert not nothing["all_erased"]


def test_a_pipe_gives_what_files_give(tmp_path: Path) -> None:
    patch, clean = tmp_path / "ink.sepme", tmp_path / "clean.safetensors"
    sepme("erase", MODEL, "--concept", "ink", "-o", patch)
    sepme("apply", MODEL, patch, "-o", clean)
    erase = subprocess.run(
        [SEPME, "erase", MODEL, "--concept", "ink", "-o", "-"], capture_output=True, check=True
    )
    piped = subprocess.run(
        [SEPME, "apply", MODEL, "-", "-o", "-"],
        input=erase.stdout,
        capture_output=True,
        check=True,
    )
    assert erase.stdout == patch.read_bytes()
    assert piped.stdout == clean.read_bytes()
