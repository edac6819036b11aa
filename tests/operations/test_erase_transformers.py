"""Erasing from Stable Diffusion 3, Flux.1 and Wan 2.1, and images of the first two."""

import json
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from torch import Tensor

import sepme_cli as sepme
from patch_spec.base import Family
from patch_spec.container import read_patch
from patch_spec.streams import stream_of
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.sampler import initial_noise, sample_latents
from sepme_cli.errors import MismatchError, SepmeError, UnsupportedError, UsageError
from tests.small_transformers import (
    T5_WIDTH,
    SmallTransformer,
    small_t5,
    small_transformer,
    write_tokenizer,
    write_transformer_file,
    write_transformer_folder,
)

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a painting by Van Gogh"]
FAMILIES: tuple[Family, ...] = ("sd3", "flux", "wan")


@pytest.fixture(scope="module")
def smalls() -> dict[Family, SmallTransformer]:
    return {name: small_transformer(name) for name in FAMILIES}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folders(
    smalls: dict[Family, SmallTransformer], tmp_path_factory: pytest.TempPathFactory
) -> dict[Family, Path]:
    place = tmp_path_factory.mktemp("folders")
    return {name: write_transformer_folder(small, place / name) for name, small in smalls.items()}


def conditioned(model: Path, prompts: list[str] = PROMPTS, **options: Any) -> Conditioning:
    with open_checkpoint(model) as checkpoint:
        return StableDiffusion.of(checkpoint, CPU, **options).text.condition(prompts)


@torch.no_grad()
def test_prompts_are_read_as_the_pipelines_read_them(
    folders: dict[Family, Path], smalls: dict[Family, SmallTransformer]
) -> None:
    """CLIP's rows side by side, filled up with zeros, then T5's; what is pooled of each CLIP."""
    for name in ("sd3", "flux"):
        texts = smalls[name].texts  # type: ignore[index]
        with open_checkpoint(folders[name]) as checkpoint:  # type: ignore[index]
            encoders = StableDiffusion.of(checkpoint, CPU).text
            found = encoders.condition(PROMPTS)
            clip_ids = [clip.tokens(PROMPTS) for clip in encoders.clips]
            t5 = encoders.readers[-1]
            t5_ids = torch.stack(t5.ids(PROMPTS))  # type: ignore[attr-defined]
        rows = texts[-1](t5_ids).last_hidden_state
        if name == "sd3":
            read = [
                text(ids, output_hidden_states=True)
                for text, ids in zip(texts[:2], clip_ids, strict=True)
            ]
            beside = torch.cat([one.hidden_states[-2] for one in read], -1)
            beside = F.pad(beside, (0, T5_WIDTH - beside.shape[-1]))
            rows = torch.cat([beside, rows], 1)
            pooled = torch.cat([one.text_embeds for one in read], -1)
        else:
            pooled = texts[0](clip_ids[0]).pooler_output
        assert found.pooled is not None
        assert torch.allclose(found.states, rows, atol=1e-5)
        assert torch.allclose(found.pooled, pooled, atol=1e-5)


def _sd3(small: SmallTransformer, read: Conditioning, blank: Conditioning, noise: Tensor) -> Tensor:
    pipeline = StableDiffusion3Pipeline(
        transformer=small.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small.vae,
        **dict.fromkeys([f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ENDS]),
    )
    found: Tensor = pipeline(
        prompt_embeds=read.states,
        pooled_prompt_embeds=read.pooled,
        negative_prompt_embeds=blank.states,
        negative_pooled_prompt_embeds=blank.pooled,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=noise.clone(),
        height=16,
        width=16,
        output_type="pt",
    ).images
    return found


ENDS = ("", "_2", "_3")


def _flux(
    small: SmallTransformer, read: Conditioning, blank: Conditioning, noise: Tensor
) -> Tensor:
    pipeline = FluxPipeline(
        transformer=small.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small.vae,
        **dict.fromkeys(
            [f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ENDS[:2]]
        ),
    )
    packed = pipeline._pack_latents(noise, len(noise), *noise.shape[1:])
    found: Tensor = pipeline(
        prompt_embeds=read.states,
        pooled_prompt_embeds=read.pooled,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=packed,
        height=16,
        width=16,
        output_type="pt",
    ).images
    return found


@pytest.mark.parametrize(("name", "draw"), [("sd3", _sd3), ("flux", _flux)])
def test_images_are_those_of_the_pipelines(
    name: Family,
    draw: Callable[..., Tensor],
    smalls: dict[Family, SmallTransformer],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    """From the single file, whose schedule and guidance are the family's."""
    file = write_transformer_file(smalls[name], tmp_path / "m.safetensors")
    with open_checkpoint(file) as checkpoint:
        model = StableDiffusion.of(checkpoint, CPU, tokenizer=tokenizer)
        read, blank = model.text.condition(PROMPTS), model.text.condition([""])
        noise = initial_noise(model.latent_shape(16), [0, 1])
        latents = sample_latents(model, read, noise, blank=blank, steps=3, guidance=4.0)
        found = model.vae.decode(latents)
    twice = Conditioning.cat([blank, blank])
    assert torch.allclose(found, draw(smalls[name], read, twice, noise), atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_patch_from_either_layout(
    name: Family,
    smalls: dict[Family, SmallTransformer],
    folders: dict[Family, Path],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    """On every stream that the family reads; the blank stays there, the concept moves."""
    file = write_transformer_file(smalls[name], tmp_path / "m.safetensors")
    with_tokenizer = ModelOptions(tokenizer=tokenizer)
    asked: dict[str, Any] = {"kind": "style", "force_collateral": True}
    result = sepme.erase(folders[name], ["Van Gogh"], output=tmp_path / "folder.sepme", **asked)
    sepme.erase(file, ["Van Gogh"], output=tmp_path / "file.sepme", options=with_tokenizer, **asked)
    one, other = (read_patch(tmp_path / f"{n}.sepme") for n in ("folder", "file"))
    assert one.base == other.base
    ours, theirs = one.increments[0], other.increments[0]
    assert np.abs(ours.basis - theirs.basis).max() < 1e-3
    streams = ("tokens",) if name == "wan" else ("tokens", "pooled")
    assert [s for s in ("tokens", "pooled") if ours.on(s)] == [*streams]  # type: ignore[arg-type]
    assert (
        set(one.base.text_encoders)
        == {
            "sd3": {"clip_l", "clip_g", "t5xxl"},
            "flux": {"clip_l", "t5xxl"},
            "wan": {"umt5"},
        }[name]
    )
    assert result.increments[0].separability and result.increments[0].separability > 0.3

    out = tmp_path / "out"
    sepme.apply(folders[name], tmp_path / "folder.sepme", out)
    blank, concept = (conditioned(folders[name], [p]) for p in ("", "a painting by Van Gogh"))
    with open_checkpoint(folders[name]) as before, open_checkpoint(out) as after:
        for target in before.targets:
            old, new = (
                torch.from_numpy(found.by_name[target.name].read().astype(np.float32))
                for found in (before, after)
            )
            for asked_for, least, most in ((blank, 0.0, 1e-3), (concept, 0.02, 10.0)):
                pooled = stream_of(target.name) == "pooled"
                rows = asked_for.pooled if pooled else asked_for.states
                assert rows is not None
                moved = (rows @ (new - old).T).norm() / (rows @ old.T).norm()
                assert least <= moved <= most


@pytest.mark.parametrize("stream", ["tokens", "pooled"])
def test_one_stream_alone(stream: str, folders: dict[Family, Path], tmp_path: Path) -> None:
    sepme.erase(
        folders["sd3"],
        ["Van Gogh"],
        output=tmp_path / "p.sepme",
        streams=stream,  # type: ignore[arg-type]
        force_collateral=True,
    )
    (increment,) = read_patch(tmp_path / "p.sepme").increments
    assert [s for s in ("tokens", "pooled") if increment.on(s)] == [stream]


def test_without_t5(
    smalls: dict[Family, SmallTransformer], tokenizer: Path, tmp_path: Path
) -> None:
    """A folder without T5 is used without; of a single file nobody knows."""
    folder = write_transformer_folder(smalls["sd3"], tmp_path / "folder")
    for place in ("text_encoder_3", "tokenizer_3"):
        for path in (folder / place).iterdir():
            path.unlink()
        (folder / place).rmdir()
    asked: dict[str, Any] = {"kind": "style", "force_collateral": True}
    sepme.erase(folder, ["Van Gogh"], output=tmp_path / "a.sepme", **asked)
    file = write_transformer_file(smalls["sd3"], tmp_path / "m.safetensors", encoders=2)
    with pytest.raises(UnsupportedError, match=r"t5xxl.*--text-encoder.*--no-t5") as caught:
        sepme.erase(file, ["Van Gogh"], output=tmp_path / "b.sepme", **asked)
    assert caught.value.file == str(file) and not (tmp_path / "b.sepme").exists()
    without = ModelOptions(t5=False)
    sepme.erase(file, ["Van Gogh"], output=tmp_path / "b.sepme", options=without, **asked)
    one, other = (read_patch(tmp_path / f"{n}.sepme").increments[0] for n in "ab")
    assert np.abs(one.basis - other.basis).max() < 1e-3
    # With T5 from a file of its own it is the patch of the whole.
    encoder = tmp_path / "t5xxl.safetensors"
    save_file({n: v.clone() for n, v in smalls["sd3"].texts[2].state_dict().items()}, encoder)
    lent = ModelOptions(text_encoders=(encoder,), tokenizer=tokenizer)
    sepme.erase(file, ["Van Gogh"], output=tmp_path / "c.sepme", options=lent, **asked)
    assert "t5xxl" in read_patch(tmp_path / "c.sepme").base.text_encoders


def test_all_text_encoders_from_elsewhere(
    smalls: dict[Family, SmallTransformer],
    folders: dict[Family, Path],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    """Files of one encoder each, as they are beside a transformer alone; or a model's folder."""
    for name in ("sd3", "flux"):
        small = smalls[name]  # type: ignore[index]
        alone = write_transformer_file(small, tmp_path / f"{name}.safetensors", prefix="")
        places = []
        for i, text in enumerate(small.texts):
            places.append(tmp_path / f"{name}-{i}.safetensors")
            save_file({n: v.clone() for n, v in text.state_dict().items()}, places[-1])
        expected = conditioned(folders[name])  # type: ignore[index]
        for lent in (tuple(places), (folders[name],)):  # type: ignore[index]
            found = conditioned_with(alone, lent, tokenizer)
            assert torch.allclose(found.states, expected.states, atol=1e-5)
            assert found.pooled is not None and expected.pooled is not None
            assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)


def conditioned_with(model: Path, lent: tuple[Path, ...], tokenizer: Path) -> Conditioning:
    from sepme_cli.diffusion.opening import opened_model

    options = ModelOptions(text_encoders=lent, tokenizer=tokenizer, dtype="fp32")
    with opened_model(model, options) as network:
        return network.text.condition(PROMPTS)


def _of_another_width(path: Path) -> None:
    encoder = small_t5()
    state = {n: v[..., : T5_WIDTH - 8].clone() for n, v in encoder.state_dict().items()}
    save_file(state, path)


def _quantised(path: Path) -> None:
    state = {n: v.clone() for n, v in small_t5().state_dict().items()}
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    state[name] = torch.zeros(8, 1, dtype=torch.uint8)
    save_file(state, path)


def _truncated(path: Path) -> None:
    save_file({n: v.clone() for n, v in small_t5().state_dict().items()}, path)
    path.write_bytes(path.read_bytes()[:-100])


def _in_part(path: Path) -> None:
    state = {n: v.clone() for n, v in small_t5().state_dict().items()}
    save_file({n: v for n, v in state.items() if "block.1.layer.1" not in n}, path)


def _another_kind(path: Path) -> None:
    save_file({"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4)}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_of_another_width, "another width"),
        (_quantised, "stored as u8"),
        (_truncated, "cut off"),
        (_in_part, "whole T5"),
        (_another_kind, "no text encoder"),
    ],
)
def test_a_t5_that_will_not_do(
    spoil: Callable[[Path], None],
    said: str,
    smalls: dict[Family, SmallTransformer],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    file = write_transformer_file(smalls["sd3"], tmp_path / "m.safetensors", encoders=2)
    spoil(tmp_path / "t5.safetensors")
    options = ModelOptions(text_encoders=(tmp_path / "t5.safetensors",), tokenizer=tokenizer)
    with pytest.raises(SepmeError, match=said) as caught:
        sepme.erase(file, ["Van Gogh"], output=tmp_path / "p.sepme", options=options)
    assert caught.value.expected and caught.value.found
    assert not (tmp_path / "p.sepme").exists()


def test_tokenizers_that_will_not_do(
    smalls: dict[Family, SmallTransformer], tmp_path: Path
) -> None:
    file = write_transformer_file(smalls["flux"], tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedError, match="--tokenizer"):
        sepme.erase(file, ["Van Gogh"], output=tmp_path / "p.sepme")
    # Of one with more words than the text encoder.
    place = write_tokenizer(tmp_path / "t") / "tokenizer.json"
    known = json.loads(place.read_text())
    known["model"]["vocab"] += [[f"▁word{i}", -1.0] for i in range(9)] + [["▁drawing", -1.0]]
    place.write_text(json.dumps(known))
    options = ModelOptions(tokenizer=tmp_path / "t")
    with pytest.raises(UnsupportedError, match="has words that the text encoder"):
        sepme.erase(file, ["Van Gogh"], output=tmp_path / "p.sepme", options=options)
    assert not (tmp_path / "p.sepme").exists()


def test_a_folder_that_mixes_families(
    smalls: dict[Family, SmallTransformer], folders: dict[Family, Path], tmp_path: Path
) -> None:
    """Stable Diffusion 3's transformer, and text encoders of another width beside it."""
    folder = write_transformer_folder(smalls["sd3"], tmp_path / "m")
    place = folder / "text_encoder" / "model.safetensors"
    config = folder / "text_encoder" / "config.json"
    other = folders["sd3"] / "text_encoder_2"
    place.write_bytes((other / "model.safetensors").read_bytes())
    config.write_bytes((other / "config.json").read_bytes())
    with pytest.raises(MismatchError, match="another width") as caught:
        sepme.erase(folder, ["Van Gogh"], output=tmp_path / "p.sepme")
    assert caught.value.found and not (tmp_path / "p.sepme").exists()


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_what_reads_t5_alone_is_not_used_without(
    name: Family, folders: dict[Family, Path], tmp_path: Path
) -> None:
    options = ModelOptions(t5=False)
    with pytest.raises(UsageError, match="leave out --no-t5"):
        sepme.erase(folders[name], ["Van Gogh"], output=tmp_path / "p.sepme", options=options)
    assert not (tmp_path / "p.sepme").exists()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_sizes_that_do_not_divide_into_patches(
    name: Family, folders: dict[Family, Path], tmp_path: Path
) -> None:
    """As with other models what is too much is left away; a size that cannot be is refused."""
    with open_checkpoint(folders[name]) as checkpoint:
        model = StableDiffusion.of(checkpoint, CPU)
        assert [model.latent_shape(size)[1] for size in (16, 18, 19, 20)] == [8, 8, 8, 10]
    for size in (3, *([4000] if name == "sd3" else [])):
        with pytest.raises(UsageError, match=f"no images of {size} pixels"):
            sample(folders[name], tmp_path, size)
    assert sample(folders[name], tmp_path, 14) == (12, 12)


def sample(model: Path, folder: Path, size: int) -> tuple[int, int]:
    """Of one image beside its prompt, as high and wide as it is."""
    sampling = sepme.SamplingOptions(images=1, steps=1, size=size)
    sepme.sample(model, ["a cat"], output=folder / "grid.png", sampling=sampling, force=True)
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, CPU)
        shape = network.vae.decode(torch.zeros(1, *network.latent_shape(size))).shape
    return shape[2], shape[3]


def test_learning_is_refused(folders: dict[Family, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="closed-form"):
        sepme.erase(folders["sd3"], ["Van Gogh"], output=tmp_path / "p.sepme", method="sepme")
    assert not (tmp_path / "p.sepme").exists()


def test_wan_generates_nothing(folders: dict[Family, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="generates nothing"):
        sepme.sample(folders["wan"], ["a cat"], output=tmp_path / "grid.png")


@pytest.mark.parametrize(("name", "scale"), [("sd3", "7"), ("flux", "3.5")])
def test_judged_before_and_after(
    name: Family, scale: str, folders: dict[Family, Path], tmp_path: Path
) -> None:
    """By the guidance that the family is used with, where nobody says another."""
    patch = tmp_path / "p.sepme"
    sepme.erase(folders[name], ["style:Monet"], output=patch, force_collateral=True)
    sepme.evaluate(
        folders[name],
        patch,
        judge="tests.small_judge:judge",
        report=tmp_path / "report",
        sampling=sepme.SamplingOptions(images=2, steps=2, size=16, restore=1),
        options=ModelOptions(device="cpu"),
    )
    (page,) = (tmp_path / "report").glob("*.html")
    said = unescape(page.read_text())
    assert f"Euler's steps of rectified flow, 2 steps, guidance {scale}," in said


def test_sampled_before_and_after(folders: dict[Family, Path], tmp_path: Path) -> None:
    sepme.erase(folders["flux"], ["Van Gogh"], output=tmp_path / "p.sepme", force_collateral=True)
    result = sepme.sample(
        folders["flux"],
        ["a painting by Van Gogh"],
        patches=tmp_path / "p.sepme",
        output=tmp_path / "grid.png",
        sampling=sepme.SamplingOptions(images=2, steps=2, size=16),
    )
    assert result.images == 4 and (tmp_path / "grid.png").stat().st_size
