"""The configurations of a checkpoint's networks, read off its shapes where no file says them.

Nothing is looked up by the checkpoint's name: scaled-down and distilled models have the same
tensor names with other shapes and fewer blocks.
"""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.layout import Naming

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

#: Stable Diffusion's noise schedule.
SCHEDULE: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_HEAD_WIDTH = 64
"""Of the attention of families that do not say how many heads they have."""


def _indices(shapes: Shapes, pattern: str) -> list[int]:
    """The numbers that the pattern's group takes among the names, sorted."""
    compiled = re.compile(pattern)
    return sorted({int(found[1]) for name in shapes if (found := compiled.match(name))})


def unet_config(shapes: Shapes, family: Family, pooled: int = 1280) -> Config:
    """UNet2DConditionModel's configuration. shapes are named as diffusers names them.

    pooled: how wide the pooled text is that XL embeds, which the UNet's shapes do not show.
    KeyError names a tensor that must be there and is not.
    """
    levels = _indices(shapes, r"down_blocks\.(\d+)\.")
    channels = [shapes[f"down_blocks.{i}.resnets.0.conv2.weight"][0] for i in levels]
    attends = [f"down_blocks.{i}.attentions.0.proj_in.weight" in shapes for i in levels]
    layers = [len(_indices(shapes, rf"down_blocks\.{i}\.resnets\.(\d+)\.")) for i in levels]
    down, up = ([_depths(shapes, f"{way}_blocks.{i}") for i in levels] for way in ("down", "up"))
    middle = max(_depths(shapes, "mid_block"), default=1)
    proj_in = next(shapes[name] for name in shapes if name.endswith("attentions.0.proj_in.weight"))
    keys = next(shapes[name] for name in shapes if name.endswith("attn2.to_k.weight"))
    config: Config = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": [_block("Down", attended) for attended in attends],
        "up_block_types": [_block("Up", _up_attends(shapes, i)) for i in levels],
        **_transformers(down, up, middle),
        "attention_head_dim": family.heads or [max(c // _HEAD_WIDTH, 1) for c in channels],
        "cross_attention_dim": keys[1],
        "use_linear_projection": len(proj_in) == 2,
    }
    if not any(name.startswith("mid_block.") for name in shapes):
        config["mid_block_type"] = None
    elif not any(name.startswith("mid_block.attentions.") for name in shapes):
        config["mid_block_type"] = "UNetMidBlock2D"  # as Segmind's distilled models have it
    if (distilled := shapes.get("time_embedding.cond_proj.weight")) is not None:
        config["time_cond_proj_dim"] = distilled[1]
    if family.sizes:
        config |= _added(shapes, family.sizes, pooled)
    return config


def _added(shapes: Shapes, sizes: int, pooled: int) -> Config:
    """What XL embeds beside the time step: pooled text, and as wide as the rest allows, `sizes`
    numbers."""
    width = shapes["add_embedding.linear_1.weight"][1]
    if width <= pooled or (width - pooled) % sizes:
        raise ValueError(f"add_embedding.linear_1 for {pooled} numbers of text and {sizes} sizes")
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled) // sizes,
        "projection_class_embeddings_input_dim": width,
    }


def _transformers(down: list[list[int]], up: list[list[int]], middle: int) -> Config:
    """How deep each attention is. Distilled models differ within a level, and going down from up.

    down, up: of each level, from the first that is passed to the last.
    """
    # A level without attention has no depth; what stands there is also the middle's.
    plain = [depths[0] if depths else middle for depths in down]
    pairs = zip((*down, *up), (*plain, *plain[::-1]), strict=True)
    if all(set(own) <= {usual} for own, usual in pairs):
        return {"transformer_layers_per_block": plain}
    return {
        "transformer_layers_per_block": [own or middle for own in down],
        "reverse_transformer_layers_per_block": [own or middle for own in up],
    }


def _depths(shapes: Shapes, block: str) -> list[int]:
    """Of each attention in a block how many transformers it has."""
    place = re.escape(block) + r"\.attentions\."
    return [
        len(_indices(shapes, rf"{place}{i}\.transformer_blocks\.(\d+)\."))
        for i in _indices(shapes, rf"{place}(\d+)\.")
    ]


def _up_attends(shapes: Shapes, level: int) -> bool:
    return f"up_blocks.{level}.attentions.0.proj_in.weight" in shapes


def _block(way: str, attends: bool) -> str:
    return f"CrossAttn{way}Block2D" if attends else f"{way}Block2D"


def vae_config(shapes: Shapes, family: Family, naming: Naming = "ldm") -> Config:
    """AutoencoderKL's configuration. shapes are named as in a single file, without a prefix, or
    as diffusers names them."""
    down, block = ("down", "block") if naming == "ldm" else ("down_blocks", "resnets")
    levels = _indices(shapes, rf"encoder\.{down}\.(\d+)\.")
    layers = _indices(shapes, rf"encoder\.{down}\.0\.{block}\.(\d+)\.")
    return {
        "block_out_channels": [
            shapes[f"encoder.{down}.{level}.{block}.0.conv1.weight"][0] for level in levels
        ],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": len(layers),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "scaling_factor": family.latent_scale,
        "shift_factor": family.latent_shift or None,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def transformer_config(shapes: Shapes, family: Family) -> Config:
    """SD3Transformer2DModel's or FluxTransformer2DModel's configuration. shapes are named as
    diffusers names them.

    KeyError names a tensor that must be there and is not.
    """
    hidden, tokens = shapes["context_embedder.weight"]
    config: Config = {
        "num_layers": len(_indices(shapes, r"transformer_blocks\.(\d+)\.")),
        "joint_attention_dim": tokens,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
    }
    norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    head = _HEAD_WIDTH if norm is None else norm[0]
    config |= {"attention_head_dim": head, "num_attention_heads": hidden // head}
    if family.name == "flux":
        # Of a position's three numbers the first, which images do not use, gets what is left.
        plane = 2 * (head * 7 // 32)
        return config | {
            "in_channels": shapes["x_embedder.weight"][1],
            "num_single_layers": len(_indices(shapes, r"single_transformer_blocks\.(\d+)\.")),
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
            "axes_dims_rope": (head - 2 * plane, plane, plane),
        }
    _, channels, patch, _ = shapes["pos_embed.proj.weight"]
    return config | {
        "sample_size": family.latent_side,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "caption_projection_dim": hidden,
        "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": _indices(shapes, r"transformer_blocks\.(\d+)\.attn2\."),
        "qk_norm": None if norm is None else "rms_norm",
    }
