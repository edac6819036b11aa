"""Checkpoints as large as real ones: their true names, shapes and dtypes, random values.

    python -m benchmarks.full_size sd1 build/full/sd1.safetensors
    python -m benchmarks.full_size sdxl build/full/sdxl.safetensors

Names and shapes come from the libraries' own networks on the meta device, under the published
configurations, and are renamed as single files name them.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.openclip import openclip_names
from examples.emoji.pack import single_file

UNETS: Mapping[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
_BLOCK = 2**24
"""Random numbers, drawn once and used again from ever another place."""


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a single file of that family, and its shape."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name]).state_dict()
        vae = AutoencoderKL(**VAE).state_dict()
        clip_l = _bare(CLIPTextModel(CLIP_L))
        clip_g = _bare(CLIPTextModelWithProjection(CLIP_G)) if name == "sdxl" else {}
        added = {n: v for n, v in unet.items() if n.startswith("add_embedding.")}
        rest = {n: v for n, v in unet.items() if n not in added}
        tensors = single_file(rest, vae, clip_l if name == "sd1" else {}, layers=3)
        tensors |= {_label(n): v for n, v in added.items()}
        if name == "sdxl":
            first = "conditioner.embedders.0.transformer.text_model."
            tensors |= {first + n: v for n, v in clip_l.items()}
            second = "conditioner.embedders.1.model."
            tensors |= {second + n: v for n, v in openclip_names(clip_g).items()}
    return {n: tuple(v.shape) for n, v in tensors.items()}


def _bare(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}


def _label(name: str) -> str:
    number, leaf = name.removeprefix("add_embedding.linear_").split(".")
    return f"model.diffusion_model.label_emb.0.{2 * int(number) - 2}.{leaf}"


def make(name: str, path: Path) -> None:
    """Write the file: fp16, in the order and with the header that safetensors writes."""
    sized = dict(sorted(shapes(name).items()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, shape in sized.items():
        end = position + 2 * int(np.prod(shape, dtype=np.int64))
        header[tensor] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in _values(sized):
            file.write(part.tobytes())


def _values(sized: Mapping[str, tuple[int, ...]]) -> Iterator[np.ndarray[Any, Any]]:
    """Every tensor's values, some at a time; norms scale by about one, so that networks run."""
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(_BLOCK, dtype=np.float32) * 0.02).astype(np.float16)
    for name, shape in sized.items():
        left = int(np.prod(shape, dtype=np.int64))
        norm = len(shape) == 1 and name.endswith(".weight")
        while left > 0:
            start = int(rng.integers(_BLOCK // 2))
            part = block[start : start + min(left, _BLOCK // 2)]
            left -= len(part)
            yield part + np.float16(1) if norm else part


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
