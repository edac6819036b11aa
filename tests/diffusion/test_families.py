"""Every family gives what transformers and diffusers give for the same weights."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.lent import lend_text_encoders
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.diffusion.tokenizer import END, tokenize
from sepme_cli.errors import UnsupportedError
from tests.small_model import (
    POSITIONS,
    SMALL,
    Parts,
    small_parts,
    write_folder,
    write_single_file,
)

CPU = torch.device("cpu")
PROMPTS = ["", "a cat in ink style", "zebra " * 30]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Parts, Path, Path]]:
    """Every small model: its networks, its single file, its folder."""
    place = tmp_path_factory.mktemp("families")
    found = {}
    for name in SMALL:
        parts = small_parts(name)
        file = write_single_file(parts, place / f"{name}.safetensors")
        found[name] = (parts, file, write_folder(parts, place / name))
    return found


@pytest.fixture(params=["single file", "folder"])
def both(request: pytest.FixtureRequest, shelf: Any) -> Any:
    """A function that opens a model of the shelf in one of its two layouts."""
    with ExitStack() as stack:

        def opened(name: str, **more: Any) -> StableDiffusion:
            path = shelf[name][1 if request.param == "single file" else 2]
            checkpoint = stack.enter_context(open_checkpoint(path))
            assert checkpoint.family.name == SMALL[name].family
            return StableDiffusion.of(checkpoint, CPU, **more)

        yield opened


def ids(padding: int) -> Tensor:
    return tokenize(PROMPTS, POSITIONS, padding=padding)


@torch.no_grad()
def expected_states(parts: Parts) -> Tensor:
    """As diffusers' pipelines compute them from transformers' own models."""
    texts = parts.texts
    match parts.small.family:
        case "sd1":
            return texts[0](ids(END)).last_hidden_state
        case "sd2":
            penultimate = texts[0](ids(0), output_hidden_states=True).hidden_states[-2]
            model = texts[0]
            norm = getattr(model, "text_model", model).final_layer_norm
            return norm(penultimate)
        case "sdxl":
            states = [
                text(ids(padding), output_hidden_states=True).hidden_states[-2]
                for text, padding in zip(texts, (END, 0), strict=True)
            ]
            return torch.cat(states, -1)
        case _:
            return texts[0](ids(0), output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("name", SMALL)
def test_hidden_states_are_the_libraries(name: str, both: Any, shelf: Any) -> None:
    """Penultimate layers, padding, the final norm, and both streams in their places."""
    model = both(name)
    expected = expected_states(shelf[name][0])
    torch.testing.assert_close(model.text.encode(PROMPTS), expected, rtol=1e-5, atol=1e-5)
    assert model.text.encode(PROMPTS).shape[-1] == model.checkpoint.width


@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_pooled_states_are_the_libraries(name: str, both: Any, shelf: Any) -> None:
    with torch.no_grad():
        expected = shelf[name][0].texts[-1](ids(0)).text_embeds
    found = both(name).text.condition(PROMPTS).pooled
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner"])
def test_openclip_is_converted_as_diffusers_does(name: str, shelf: Any) -> None:
    """The libraries' own converter on the very file gives the states that ours gives."""
    parts, file, _ = shelf[name]
    prefix = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}.get(
        name, "conditioner.embedders.0.model."
    )
    config = parts.texts[-1].config
    kind = CLIPTextModel if name == "sd2" else CLIPTextModelWithProjection
    theirs = kind(config)
    converted = convert_open_clip_checkpoint(theirs, load_file(file), prefix)
    wanted = theirs.state_dict()
    if next(iter(wanted)).startswith("embeddings"):
        converted = {n.removeprefix("text_model."): v for n, v in converted.items()}
    theirs.load_state_dict({n: v for n, v in converted.items() if n in wanted})
    with torch.no_grad():
        expected = theirs.eval()(ids(0), output_hidden_states=True).hidden_states[-2]
    with open_checkpoint(file) as checkpoint:
        model = StableDiffusion.of(checkpoint, CPU)
        encoder = model.text.clips[-1]
        found = encoder.model(ids(0), output_hidden_states=True).hidden_states
    index = -1 if name == "sd2" else -2  # of SD 2.x the last layer is not even loaded
    torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_predictions_are_the_libraries(name: str, both: Any, shelf: Any) -> None:
    parts, model = shelf[name][0], both(name)
    asked = model.text.condition(PROMPTS)
    noisy = torch.randn(3, 4, 8, 8)
    beside: list[Tensor] = []
    if name == "inpainting":
        grey = model.vae.encode(torch.full((1, 3, 16, 16), 0.5)).mean((2, 3), keepdim=True)
        beside = [torch.ones(3, 1, 8, 8), grey.expand(3, 4, 8, 8)]
    if name == "editing":
        beside = [torch.zeros(3, 4, 8, 8)]
    told = {}
    if parts.small.pooled is not None:
        sizes = [16.0, 16.0, 0, 0, *([6.0] if name == "sdxl-refiner" else [16.0, 16.0])]
        times = torch.tensor([sizes]).expand(3, -1)
        told = {"added_cond_kwargs": {"text_embeds": asked.pooled, "time_ids": times}}
    with torch.no_grad():
        inputs = torch.cat([noisy, *beside], 1)
        expected = parts.unet(inputs, 7, asked.states, **told).sample
        found = model.denoiser.predict(noisy, 7, asked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_everything_draws(name: str, both: Any) -> None:
    pictures = generate_images(both(name), ["a cat", ""], [1, 2], steps=2, size=16)
    assert pictures.shape == (2, 3, 16, 16)
    assert torch.isfinite(pictures).all()


def test_velocity_is_turned_into_noise(shelf: Any) -> None:
    """eps = sqrt(abar) v + sqrt(1 - abar) x: what DDIM makes of either is one and the same."""
    with open_checkpoint(shelf["sd2"][1]) as checkpoint:
        velocity = StableDiffusion.of(checkpoint, CPU, prediction="velocity")
        asked, noisy = velocity.text.condition(["a cat"]), torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            raw = velocity.denoiser.network(noisy, 500, asked.states).sample
            eps = velocity.denoiser.predict(noisy, 500, asked)
            each = velocity.denoiser.predict(noisy, torch.tensor([500]), asked)
    kept = velocity.schedule.alphas[500]
    original = kept.sqrt() * noisy - (1 - kept).sqrt() * raw  # x_0, by the definition of v
    from_eps = (noisy - (1 - kept).sqrt() * eps) / kept.sqrt()
    torch.testing.assert_close(from_eps, original, rtol=1e-4, atol=1e-4)
    assert torch.equal(eps, each)


def test_what_a_folder_predicts_stands_in_its_schedule(shelf: Any, tmp_path: Path) -> None:
    folder = write_folder(shelf["sd2"][0], tmp_path / "v", prediction="v_prediction")
    for path, expected in ((folder, "velocity"), (shelf["sd2"][2], "epsilon")):
        with open_checkpoint(path) as checkpoint:
            assert StableDiffusion.of(checkpoint, CPU).schedule.prediction == expected
            told = StableDiffusion.of(checkpoint, CPU, prediction="velocity")
            assert told.schedule.prediction == "velocity"


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_a_unet_alone_with_text_encoders_from_elsewhere(
    name: str, naming: str, shelf: Any, tmp_path: Path
) -> None:
    _, file, folder = shelf[name]
    alone = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if naming == "ldm":
        alone = _only_unet(file, tmp_path / "unet.safetensors")
    with ExitStack() as stack:
        whole = stack.enter_context(open_checkpoint(file))
        expected = StableDiffusion.of(whole, CPU).text.encode(PROMPTS)
        encoders = [folder / "text_encoder"]
        encoders += [folder / "text_encoder_2"] * (name == "sdxl")
        for paths in ([file], [folder], encoders):
            bare = stack.enter_context(open_checkpoint(alone))
            with pytest.raises(UnsupportedError, match="--text-encoder"):
                _ = StableDiffusion.of(bare, CPU).text.clips
            lend_text_encoders(bare, paths, stack)
            model = StableDiffusion.of(bare, CPU)
            torch.testing.assert_close(model.text.encode(PROMPTS), expected, rtol=1e-5, atol=1e-5)
            assert bare.text_encoder_fingerprints() == whole.text_encoder_fingerprints()
            noisy, asked = torch.randn(3, 4, 8, 8), model.text.condition(PROMPTS)
            assert torch.isfinite(model.denoiser.predict(noisy, 3, asked)).all()


def _only_unet(file: Path, output: Path) -> Path:
    prefix = "model.diffusion_model."
    whole = load_file(file)
    save_file({n.removeprefix(prefix): v for n, v in whole.items() if n.startswith(prefix)}, output)
    return output


def test_what_holds_no_text_encoder_is_refused(shelf: Any, tmp_path: Path) -> None:
    alone = _only_unet(shelf["sd1"][1], tmp_path / "unet.safetensors")
    with ExitStack() as stack:
        bare = stack.enter_context(open_checkpoint(alone))
        for path in (alone, shelf["sd1"][2] / "scheduler", shelf["sd2"][1]):
            with pytest.raises(UnsupportedError, match="no text encoder"):
                lend_text_encoders(bare, [path], stack)


@pytest.mark.parametrize("name", SMALL)
def test_one_model_in_two_layouts_has_one_fingerprint(name: str, shelf: Any) -> None:
    _, file, folder = shelf[name]
    with open_checkpoint(file) as one, open_checkpoint(folder) as other:
        bases = [checkpoint.base(text_encoders=True) for checkpoint in (one, other)]
    assert bases[0] == bases[1]
    assert len(bases[0].text_encoders) == len(SMALL[name].widths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load(dtype: torch.dtype, shelf: Any, tmp_path: Path) -> None:
    path = write_single_file(shelf["sdxl"][0], tmp_path / "half.safetensors", dtype)
    with open_checkpoint(path) as half, open_checkpoint(shelf["sdxl"][1]) as whole:
        found, expected = (StableDiffusion.of(c, CPU).text.encode(PROMPTS) for c in (half, whole))
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()
    assert not torch.equal(found, expected)
