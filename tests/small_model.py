"""A whole Stable Diffusion with random weights, small enough to erase from in seconds."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from examples.emoji.pack import single_file

WIDTH = 64
POSITIONS = 16


def networks(seed: int = 0) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet with attention on the lower of two levels, VAE, text encoder."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=POSITIONS,
        )
    )
    with torch.no_grad():
        # At its initialisation CLIP barely tells two prompts apart.
        text.get_input_embeddings().weight.mul_(20)
    return unet.eval(), vae.eval(), text.eval()


def save_small_model(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Write it as a single-file SD 1.x checkpoint that draws 16-pixel pictures."""
    tensors = single_file(*(network.state_dict() for network in networks(seed)))
    contiguous = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(contiguous, path, metadata={"modelspec.resolution": "16x16"})
