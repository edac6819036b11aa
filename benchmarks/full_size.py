"""Checkpoints as large as real ones: their true names, shapes and dtypes, random values.

    python -m benchmarks.full_size sd1 build/full/sd1.safetensors
    python -m benchmarks.full_size sdxl build/full/sdxl.safetensors
    python -m benchmarks.full_size sd3.5-large build/full/sd3.5-large.safetensors
    python -m benchmarks.full_size flux.1-dev build/full/flux.1-dev.safetensors
    python -m benchmarks.full_size t5xxl build/full/t5xxl.safetensors

Names and shapes of SD 1.5 and XL come from the libraries' own networks on the meta device, under
the published configurations, and are renamed as single files name them. Those of the transformers
and of T5-XXL are written down here as their authors name them. These files are sparse: they have
values where a patch changes something and in small tensors, and zeros elsewhere, which take no
room on the disk.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
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
_SPARSE_FROM = 2**22
"""How many numbers a tensor of a sparse file has at least that is left zero."""
_BLOCK = 2**24
"""Random numbers, drawn once and used again from ever another place."""


Shapes = dict[str, tuple[int, ...]]


def shapes(name: str) -> Shapes:
    """Every tensor of a single file of that model, and its shape."""
    return SPARSE[name]() if name in SPARSE else _stable_diffusion(name)


def _stable_diffusion(name: str) -> Shapes:
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


def _linear(name: str, out: int, inner: int) -> Shapes:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def stable_diffusion_3(depth: int = 38, width: int = 2432, rows: int = 4096) -> Shapes:
    """The transformer of SD 3.5 large, beside whose file the text encoders lie, and its VAE."""
    found: Shapes = {"pos_embed": (1, 192**2, width)}
    found |= {"x_embedder.proj.weight": (width, 16, 2, 2), "x_embedder.proj.bias": (width,)}
    found |= _linear("t_embedder.mlp.0", width, 256) | _linear("t_embedder.mlp.2", width, width)
    found |= _linear("y_embedder.mlp.0", width, 2048) | _linear("y_embedder.mlp.2", width, width)
    found |= _linear("context_embedder", width, rows)
    for block in range(depth):
        for side in ("x_block", "context_block"):
            name = f"joint_blocks.{block}.{side}"
            found |= _linear(f"{name}.attn.qkv", 3 * width, width)
            found |= {f"{name}.attn.ln_{part}.weight": (64,) for part in "qk"}
            # Behind the last block nothing reads the text any more.
            last = side == "context_block" and block == depth - 1
            found |= _linear(f"{name}.adaLN_modulation.1", (2 if last else 6) * width, width)
            if not last:
                found |= _linear(f"{name}.attn.proj", width, width)
                found |= _linear(f"{name}.mlp.fc1", 4 * width, width)
                found |= _linear(f"{name}.mlp.fc2", width, 4 * width)
    found |= _linear("final_layer.linear", 64, width)
    found |= _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return {f"model.diffusion_model.{name}": shape for name, shape in found.items()} | _vae()


def _vae() -> Shapes:
    """Of 16 channels, without the convolutions around the latent."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            **VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
        ).state_dict()
    return {n: tuple(v.shape) for n, v in single_file({}, vae, {}, layers=3).items()}


def flux(double: int = 19, single: int = 38, width: int = 3072, rows: int = 4096) -> Shapes:
    """The transformer of Flux.1 dev, which is a file of its own."""
    found = _linear("img_in", width, 64) | _linear("txt_in", width, rows)
    for name, inner in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        found |= _linear(f"{name}.in_layer", width, inner)
        found |= _linear(f"{name}.out_layer", width, width)
    for block in range(double):
        for side in ("img", "txt"):
            name = f"double_blocks.{block}.{side}"
            found |= _linear(f"{name}_mod.lin", 6 * width, width)
            found |= _linear(f"{name}_attn.qkv", 3 * width, width)
            found |= {f"{name}_attn.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
            found |= _linear(f"{name}_attn.proj", width, width)
            found |= _linear(f"{name}_mlp.0", 4 * width, width)
            found |= _linear(f"{name}_mlp.2", width, 4 * width)
    for block in range(single):
        name = f"single_blocks.{block}"
        found |= _linear(f"{name}.linear1", 7 * width, width)
        found |= _linear(f"{name}.linear2", width, 5 * width)
        found |= {f"{name}.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
        found |= _linear(f"{name}.modulation.lin", 3 * width, width)
    found |= _linear("final_layer.linear", 64, width)
    return found | _linear("final_layer.adaLN_modulation.1", 2 * width, width)


def t5(layers: int = 24, width: int = 4096, inner: int = 10240, heads: int = 64) -> Shapes:
    """The encoder of T5-XXL."""
    found: Shapes = {"shared.weight": (32128, width), "encoder.final_layer_norm.weight": (width,)}
    for layer in range(layers):
        name = f"encoder.block.{layer}.layer"
        for part in "qkvo":
            shape = (width, 64 * heads) if part == "o" else (64 * heads, width)
            found[f"{name}.0.SelfAttention.{part}.weight"] = shape
        found |= {f"{name}.{i}.layer_norm.weight": (width,) for i in range(2)}
        feed = f"{name}.1.DenseReluDense"
        found |= {f"{feed}.wi_{i}.weight": (inner, width) for i in range(2)}
        found[f"{feed}.wo.weight"] = (width, inner)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return found | {bias: (32, heads)}


SPARSE: Mapping[str, Callable[[], Shapes]] = {
    "sd3.5-large": stable_diffusion_3,
    "flux.1-dev": flux,
    "t5xxl": t5,
}
_PATCHED = (
    "context_embedder.weight",
    "y_embedder.mlp.0.weight",
    "txt_in.weight",
    "vector_in.in_layer.weight",
)


def make(name: str, path: Path) -> None:
    """Write the file: fp16, in the order and with the header that safetensors writes; of `SPARSE`
    as `make_sparse` does."""
    if name in SPARSE:
        make_sparse(shapes(name), path)
        return
    sized = dict(sorted(shapes(name).items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(_header(sized, "F16"))
        for part in _values(sized):
            file.write(part.tobytes())


def make_sparse(sized: Shapes, path: Path) -> None:
    """Write a file in bf16 that has values in what a patch changes and in small tensors."""
    sized = dict(sorted(sized.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        position = file.write(_header(sized, "BF16"))
        for tensor, shape in sized.items():
            if prod(shape) < _SPARSE_FROM or tensor.endswith(_PATCHED):
                file.seek(position)
                for part in _values({tensor: shape}):
                    file.write(part.astype(ml_dtypes.bfloat16).tobytes())
            position += 2 * prod(shape)
        file.truncate(position)


def _header(sized: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, shape in sized.items():
        end = position + 2 * prod(shape)
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@cache
def _block() -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    return (rng.standard_normal(_BLOCK, dtype=np.float32) * 0.02).astype(np.float16)


def _values(sized: Mapping[str, tuple[int, ...]]) -> Iterator[np.ndarray[Any, Any]]:
    """Every tensor's values, some at a time; norms scale by about one, so that networks run."""
    rng, block = np.random.default_rng(0), _block()
    for name, shape in sized.items():
        left = prod(shape)
        norm = len(shape) == 1 and name.endswith(".weight")
        while left > 0:
            start = int(rng.integers(_BLOCK // 2))
            part = block[start : start + min(left, _BLOCK // 2)]
            left -= len(part)
            yield part + np.float16(1) if norm else part


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
