"""The configurations of a single-file SD 1.x checkpoint's networks, read off its shapes.

Nothing is looked up by the checkpoint's name: scaled-down and distilled models have the same
tensor names with other shapes and fewer blocks.
"""

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."

#: Stable Diffusion's noise schedule and latent scale.
SCHEDULE: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
LATENT_SCALE = 0.18215

_HEADS = 8  # SD 1.x has eight heads at every level
_HEAD_WIDTH = 64  # every CLIP text encoder


def _indices(shapes: Shapes, pattern: str) -> list[int]:
    """The numbers that the pattern's group takes among the names, sorted."""
    compiled = re.compile(pattern)
    return sorted({int(found[1]) for name in shapes if (found := compiled.match(name))})


def unet_config(shapes: Shapes) -> Config:
    """UNet2DConditionModel's configuration.

    With L = layers_per_block + 1, ``input_blocks.{i}`` belongs to level (i - 1) // L, and every
    L-th of them is a downsampler.
    """
    blocks = re.escape(UNET) + r"input_blocks\.(\d+)\."
    downsamplers = _indices(shapes, blocks + r"0\.op\.weight")
    span = downsamplers[0] if downsamplers else len(_indices(shapes, blocks + "0")) - 1
    levels = len(downsamplers) + 1
    first = [level * span + 1 for level in range(levels)]
    attends = [f"{UNET}input_blocks.{i}.1.norm.weight" in shapes for i in first]
    depth = [
        max(
            len(
                _indices(
                    shapes, rf"{re.escape(UNET)}input_blocks\.{i}\.1\.transformer_blocks\.(\d+)"
                )
            ),
            1,
        )
        for i in first
    ]
    keys = [name for name in shapes if name.startswith(UNET) and name.endswith("attn2.to_k.weight")]
    projection = keys[0].split("transformer_blocks")[0] + "proj_in.weight"
    return {
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": [
            shapes[f"{UNET}input_blocks.{i}.0.out_layers.3.weight"][0] for i in first
        ],
        "layers_per_block": span - 1,
        "down_block_types": [_block("Down", attended) for attended in attends],
        "up_block_types": [_block("Up", attended) for attended in reversed(attends)],
        "transformer_layers_per_block": depth,
        "attention_head_dim": _HEADS,
        "cross_attention_dim": shapes[keys[0]][1],
        "use_linear_projection": len(shapes[projection]) == 2,
    }


def _block(way: str, attends: bool) -> str:
    return f"CrossAttn{way}Block2D" if attends else f"{way}Block2D"


def vae_config(shapes: Shapes) -> Config:
    """AutoencoderKL's configuration."""
    prefix = re.escape(VAE)
    levels = _indices(shapes, prefix + r"encoder\.down\.(\d+)\.")
    layers = _indices(shapes, prefix + r"encoder\.down\.0\.block\.(\d+)\.")
    return {
        "block_out_channels": [
            shapes[f"{VAE}encoder.down.{level}.block.0.conv1.weight"][0] for level in levels
        ],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": len(layers),
        "latent_channels": shapes[f"{VAE}post_quant_conv.weight"][0],
        "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
        "scaling_factor": LATENT_SCALE,
    }


def text_config(shapes: Shapes) -> Config:
    """CLIPTextModel's configuration. shapes are named as transformers names them."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(_indices(shapes, r"encoder\.layers\.(\d+)\.")),
        "num_attention_heads": width // _HEAD_WIDTH,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
    }
