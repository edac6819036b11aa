"""What is loaded from a single file is what the libraries hold for the same weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from examples.emoji.pack import single_file
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.structure.families import SD1
from sepme_cli.diffusion.configs import unet_config, vae_config
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.text_encoder import text_config
from sepme_cli.diffusion.tokenizer import tokenize
from tests.small_model import POSITIONS, WIDTH, networks

CPU = torch.device("cpu")
PROMPTS = ["", "a cat in ink style", "zzz"]


@pytest.fixture(scope="module")
def model(small_model: Path) -> Iterator[StableDiffusion]:
    with open_checkpoint(small_model) as checkpoint:
        yield StableDiffusion.of(checkpoint, CPU)


def test_every_network_has_the_weights_it_was_saved_with(model: StableDiffusion) -> None:
    unet, vae, text = networks()
    for loaded, saved in (
        (model.denoiser.network, unet),
        (model.vae.network, vae),
        (model.text.clips[0].model, text),
    ):
        expected, found = saved.state_dict(), loaded.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_hidden_states_are_the_librarys(model: StableDiffusion) -> None:
    _, _, text = networks()
    with torch.no_grad():
        expected = text(tokenize(PROMPTS, POSITIONS)).last_hidden_state
    found = model.text.encode(PROMPTS)
    assert found.shape == (3, POSITIONS, WIDTH)
    torch.testing.assert_close(found, expected)


def test_the_end_of_a_text_is_what_the_whole_encoding_has_there(model: StableDiffusion) -> None:
    prompts = [*PROMPTS, "many words " * POSITIONS, "cat"]
    ends = model.text.tokens(prompts).argmax(dim=-1)
    expected = model.text.encode(prompts)[torch.arange(len(prompts)), ends]
    torch.testing.assert_close(model.text.ends(prompts), expected)


def test_predictions_are_the_librarys(model: StableDiffusion) -> None:
    unet, _, _ = networks()
    noisy, context = torch.randn(2, 4, 8, 8), model.text.condition(PROMPTS[1:])
    with torch.no_grad():
        expected = unet(noisy, 7, context.states).sample
        torch.testing.assert_close(model.denoiser.predict(noisy, 7, context), expected)


def test_the_vae_scales_latents_both_ways(model: StableDiffusion) -> None:
    _, vae, _ = networks()
    pictures = torch.rand(1, 3, 16, 16)
    latents = model.vae.encode(pictures)
    with torch.no_grad():
        expected = vae.encode(pictures * 2 - 1).latent_dist.mean
        drawn = vae.decode(expected).sample
    torch.testing.assert_close(latents, expected * 0.18215)
    torch.testing.assert_close(model.vae.decode(latents), (drawn / 2 + 0.5).clamp(0, 1))


def test_the_image_size_is_the_one_the_metadata_says(model: StableDiffusion) -> None:
    assert model.image_size == 16
    assert model.latent_shape() == (4, 8, 8)
    assert model.latent_shape(32) == (4, 16, 16)


def test_targets_are_the_cross_attention_keys_and_values(model: StableDiffusion) -> None:
    targets = model.denoiser.targets
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight" in targets
    assert all(layer.in_features == WIDTH for layer in targets.values())
    assert len(targets) == 2 * 4  # one down, one middle, two up


def test_replaced_weights_are_put_back_also_after_an_error(model: StableDiffusion) -> None:
    name, layer = next(iter(model.denoiser.targets.items()))
    original = layer.weight.data.clone()
    zeros = {name: torch.zeros_like(original)}
    with pytest.raises(RuntimeError), model.denoiser.with_weights(zeros):
        assert not layer.weight.data.any()
        raise RuntimeError
    assert torch.equal(layer.weight.data, original)


def test_an_increment_added_by_hooks_is_one_added_to_the_weights(model: StableDiffusion) -> None:
    denoiser, basis = model.denoiser, torch.randn(3, WIDTH)
    up = {name: torch.randn(layer.out_features, 3) for name, layer in denoiser.targets.items()}
    noisy, context = torch.randn(2, 4, 8, 8), model.text.condition(PROMPTS[1:])
    added = {n: layer.weight.data + up[n] @ basis for n, layer in denoiser.targets.items()}
    with torch.no_grad():
        with denoiser.with_weights(added):
            expected = denoiser.predict(noisy, 7, context)
        with denoiser.with_increment(up, basis):
            found = denoiser.predict(noisy, 7, context)
        untouched = denoiser.predict(noisy, 7, context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untouched, expected, atol=1e-3)


@pytest.mark.slow
def test_the_full_sd_1_architecture_is_read_off_its_shapes() -> None:
    """Stable Diffusion 1.5's own configuration, on the meta device: shapes without values."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    names = single_file(unet.state_dict(), vae.state_dict(), {}, layers=3)
    shapes = {name: tuple(value.shape) for name, value in names.items()}
    inner = {n.removeprefix("first_stage_model."): s for n, s in shapes.items()}
    bare = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    config = unet_config(bare, SD1)
    assert config["block_out_channels"] == [320, 640, 1280, 1280]
    assert config["layers_per_block"] == 2
    assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert config["cross_attention_dim"] == 768
    with torch.device("meta"):
        rebuilt = UNet2DConditionModel(**config)
        rebuilt_vae = AutoencoderKL(**vae_config(inner, SD1))
    for again, original in ((rebuilt, unet), (rebuilt_vae, vae)):
        assert {n: v.shape for n, v in again.state_dict().items()} == {
            n: v.shape for n, v in original.state_dict().items()
        }


def test_clip_l_is_read_off_its_shapes() -> None:
    config = text_config(
        {
            "embeddings.token_embedding.weight": (49408, 768),
            "embeddings.position_embedding.weight": (77, 768),
            "encoder.layers.0.mlp.fc1.weight": (3072, 768),
            **{f"encoder.layers.{i}.layer_norm1.weight": (768,) for i in range(12)},
        }
    )
    assert config["num_hidden_layers"] == 12
    assert config["num_attention_heads"] == 12
    assert config["intermediate_size"] == 3072
    assert config["max_position_embeddings"] == 77
